"""How many runs of each arm tell a given difference from 0."""

import math
from collections.abc import Sequence

import numpy as np
from scipy import stats

from rt_detectron.study.evaluations import compared
from rt_detectron.study.grid import Study
from rt_detectron.study.intervals import CONFIDENCE
from rt_detectron.study.record import Outcome
from rt_detectron.study.statistics import (
    CHECKPOINTS,
    CLEAN,
    TASKS,
    Quantity,
    Sample,
    covariance_over_images,
    main_metric,
    main_task,
)

POWER = 0.8  # the probability to find a difference that is there
_MOST = 1000  # runs that are tried


def runs_needed(
    difference: float, sd: float, image_variance: float = 0.0, image_df: float = math.inf
) -> int | None:
    """Runs of each arm that find a true difference with a probability of POWER; None if no number does.

    Args:
        sd: of one run, in points.
        image_variance: of the difference of two arms over the choice of test images.
    """
    for n in range(2, _MOST + 1):
        of_runs = 2 * sd**2 / n
        variance = of_runs + image_variance
        squares = of_runs**2 / (2 * (n - 1)) + image_variance**2 / image_df
        df = variance**2 / squares if squares else math.inf
        needed = (stats.t.ppf((1 + CONFIDENCE) / 2, df) + stats.t.ppf(POWER, df)) * math.sqrt(variance)
        if needed <= difference:
            return n
    return None


def describe_power(
    study: Study, outcomes: Sequence[Outcome], difference: float, sd: float | None
) -> list[str]:
    """A line for each target on the runs that resolve a difference between two arms of it.

    Args:
        sd: of one run; None takes that of the finished trials.
    """
    comparison = compared(study, outcomes)
    task = main_task(comparison.table)
    quantity = Quantity(CLEAN, task, main_metric(task))
    lines = []
    for target in study.targets:
        samples = list(comparison.samples.get((target.name, quantity), {}).values())
        lines.append(f"{target.name}: {_describe(samples, difference, sd, TASKS[task])}")
    return lines


def _describe(samples: Sequence[Sample], difference: float, sd: float | None, measure: str) -> str:
    spread, source = sd, "as given"
    if spread is None:
        several = [list(sample.values.values()) for sample in samples if len(sample.values) > 1]
        if not several:
            return "unknown until an arm has two finished trials; or state the sd of a run by --sd"
        freedom = [len(values) - 1 for values in several]
        squares = [np.var(values, ddof=1) * df for values, df in zip(several, freedom, strict=True)]
        spread = math.sqrt(sum(squares) / sum(freedom))
        source = f"of the finished trials, with {sum(freedom)} degrees of freedom"
    images, df = _image_variance(samples)
    runs = runs_needed(difference, spread, images or 0.0, df)
    noun = "checkpoints" if any(sample.kind == CHECKPOINTS for sample in samples) else "seeds"
    about = "unknown" if images is None else f"{math.sqrt(images):.2g}"
    about = f"sd of a run {spread:.2g}, {source}; sd by the test images {about}"
    if runs is not None:
        return (
            f"{runs} {noun} of each arm resolve {difference:g} {measure} in {POWER:.0%} of studies; {about}"
        )
    alone = runs_needed(difference, 0.0, images or 0.0, df) is None
    why = "the choice of test images alone says too much" if alone else f"it takes more than {_MOST}"
    return f"no number of {noun} resolves {difference:g} {measure}, {why}; {about}"


def _image_variance(samples: Sequence[Sample]) -> tuple[float | None, float]:
    """Of a difference of two arms, the median over pairs, and its degrees of freedom; None if unknown."""
    known = [sample.draws for sample in samples if sample.draws is not None]
    if len(known) < 2:
        return None, math.inf
    covariance, df = covariance_over_images(known)
    variances = np.diag(covariance)
    pairs = variances[:, None] + variances - 2 * covariance
    return float(np.median(pairs[~np.eye(len(known), dtype=bool)]).clip(0)), df
