"""What the trials of a study say together: means and spreads over seeds, differences with their intervals."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np
from scipy.special import stdtrit

from rt_detectron.study.measurements import Quantity

CONFIDENCE = 0.95
SEEDS, IMAGES = "seeds", "images"  # what an interval is over

Scores = Mapping[int, Mapping[Quantity, float]]  # seed -> what was measured


@dataclass(frozen=True)
class Summary:
    """``sd`` is the sample standard deviation (n - 1 in the denominator); None for a single value."""

    n: int
    mean: float
    sd: float | None


@dataclass(frozen=True)
class Interval:
    """A confidence interval of a difference; ``over`` says which chance it covers, SEEDS or IMAGES."""

    low: float
    high: float
    over: str


@dataclass(frozen=True)
class Change:
    """An arm minus its baseline: the differences seed by seed, and the interval of their mean, if any."""

    differences: Summary
    interval: Interval | None

    @property
    def verdict(self) -> str:
        """By the interval alone: "undecided" where 0 lies in it, or where there is none."""
        if self.interval is None or self.interval.low <= 0 <= self.interval.high:
            return "undecided"
        return "better" if self.interval.low > 0 else "worse"


@dataclass(frozen=True)
class Row:
    """One arm on one target, at the learning rate chosen for it.

    Attributes:
        seeds: of the trials that have results.
        scores: what these measured.
        changes: to the baseline; empty for the baseline itself. Without a common seed a change is missing.
        note: why a single seed has no interval; else empty.
    """

    arm: str
    target: str
    baseline: str
    learning_rate: float
    seeds: tuple[int, ...]
    scores: dict[Quantity, Summary]
    changes: dict[Quantity, Change]
    note: str = ""

    @property
    def is_baseline(self) -> bool:
        return self.arm == self.baseline


def summarize(values: Sequence[float]) -> Summary:
    """Mean and sample standard deviation of at least one value."""
    mean, n = fmean(values), len(values)
    # statistics.stdev works with fractions: exact, and 50 times slower.
    sd = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1)) if n > 1 else None
    return Summary(n, mean, sd)


def t_interval(differences: Summary) -> Interval | None:
    """Student's interval of the mean of paired differences; None for one alone.

    It takes the differences for draws of one normal distribution: other seeds, the same test images.
    """
    if differences.sd is None:
        return None
    quantile = float(stdtrit(differences.n - 1, (1 + CONFIDENCE) / 2))
    half = quantile * differences.sd / math.sqrt(differences.n)
    return Interval(differences.mean - half, differences.mean + half, SEEDS)


def percentile_interval(resampled: np.ndarray) -> Interval | None:
    """The bootstrap's interval from differences on resampled images; None if there are none."""
    if not len(resampled):
        return None
    low, high = np.percentile(resampled, [50 * (1 - CONFIDENCE), 50 * (1 + CONFIDENCE)])
    return Interval(float(low), float(high), IMAGES)


def paired_differences(scores: Scores, baseline: Scores, quantity: Quantity) -> list[float]:
    """``scores`` minus ``baseline`` for each seed, ascending, that both have a value for."""
    return [
        scores[seed][quantity] - baseline[seed][quantity]
        for seed in sorted(scores.keys() & baseline.keys())
        if quantity in scores[seed] and quantity in baseline[seed]
    ]


def summaries(scores: Scores) -> dict[Quantity, Summary]:
    """Over the seeds, of everything that one of them has measured."""
    quantities = dict.fromkeys(quantity for measured in scores.values() for quantity in measured)
    return {
        quantity: summarize([measured[quantity] for measured in scores.values() if quantity in measured])
        for quantity in quantities
    }


def changes(scores: Scores, baseline: Scores) -> dict[Quantity, Change]:
    """Of everything that both have measured with the same seed."""
    quantities = dict.fromkeys(quantity for measured in scores.values() for quantity in measured)
    paired = {quantity: paired_differences(scores, baseline, quantity) for quantity in quantities}
    found = {quantity: summarize(numbers) for quantity, numbers in paired.items() if numbers}
    return {quantity: Change(summary, t_interval(summary)) for quantity, summary in found.items()}
