"""What the trials of a study say together: means and spreads over seeds, differences paired by seed."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

# (task, metric) as Detectron2's COCO evaluator names them, and the column they fill.
METRICS: dict[tuple[str, str], str] = {
    ("bbox", "AP"): "box AP",
    ("bbox", "AP50"): "box AP50",
    ("bbox", "AP75"): "box AP75",
    ("segm", "AP"): "mask AP",
    ("segm", "AP50"): "mask AP50",
}

Setting = tuple[str, float]  # detector, learning rate: what arms are compared at
Scores = Mapping[int, Mapping[str, float]]  # seed -> column of METRICS -> AP in percent


@dataclass(frozen=True)
class Summary:
    """``sd`` is the sample standard deviation (n - 1 in the denominator); None for a single value."""

    n: int
    mean: float
    sd: float | None


@dataclass(frozen=True)
class Row:
    """One arm at one setting, per column of METRICS that it has.

    Attributes:
        differences: arm minus baseline at the same setting, one per seed that both have.
        change: the summary of ``differences``; missing for the baseline itself and without a common seed.
    """

    arm: str
    detector: str
    learning_rate: float
    seeds: tuple[int, ...]
    score: dict[str, Summary]
    differences: dict[str, list[float]]
    change: dict[str, Summary]


def is_number(value: Any) -> bool:
    """Whether ``value`` is a finite number. Detectron2 gives NaN where AP is undefined: that is none."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def scores_of(metrics: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """A trial's defined METRICS by column, from task -> metric -> value."""
    values = {column: metrics.get(task, {}).get(metric) for (task, metric), column in METRICS.items()}
    return {column: float(value) for column, value in values.items() if is_number(value)}


def summarize(values: Sequence[float]) -> Summary:
    """Mean and sample standard deviation of at least one value."""
    return Summary(len(values), fmean(values), stdev(values) if len(values) > 1 else None)


def paired_differences(scores: Scores, baseline: Scores, column: str) -> list[float]:
    """``scores`` minus ``baseline`` for each seed, ascending, that both have a value for."""
    return [
        scores[seed][column] - baseline[seed][column]
        for seed in sorted(scores.keys() & baseline.keys())
        if column in scores[seed] and column in baseline[seed]
    ]


def aggregate(scores: Mapping[Setting, Mapping[str, Scores]], baseline: str) -> list[Row]:
    """One row per setting and arm, in the order given; ``scores`` is setting -> arm -> seed -> column."""
    return [
        _row(setting, arm, arm_scores, {} if arm == baseline else arms.get(baseline, {}))
        for setting, arms in scores.items()
        for arm, arm_scores in arms.items()
    ]


def _row(setting: Setting, arm: str, scores: Scores, baseline: Scores) -> Row:
    values = {
        column: [seed[column] for seed in scores.values() if column in seed] for column in METRICS.values()
    }
    differences = {column: paired_differences(scores, baseline, column) for column in METRICS.values()}
    return Row(
        arm=arm,
        detector=setting[0],
        learning_rate=setting[1],
        seeds=tuple(scores),
        score={column: summarize(numbers) for column, numbers in values.items() if numbers},
        differences={column: numbers for column, numbers in differences.items() if numbers},
        change={column: summarize(numbers) for column, numbers in differences.items() if numbers},
    )
