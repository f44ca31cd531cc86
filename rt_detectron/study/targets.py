"""One answer over all targets of a study, for each arm and for the best arm.

On these targets ("fixed"): the mean difference, with the chance in runs and test images. On targets like
these ("random"): the data sets themselves are a sample, and their spread is part of the interval, with one
degree of freedom less than there are data sets. Targets with the same test images count as one data set.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from rt_detectron.study.intervals import CONFIDENCE, contrasts
from rt_detectron.study.selection import Choice
from rt_detectron.study.statistics import (
    CHECKPOINTS,
    Comparison,
    Quantity,
    Sample,
    covariance_over_images,
    covered,
    padded,
    simultaneous_where_known,
    verdict,
)

Plan = dict[str, tuple[str, str]]  # target -> (arm, its baseline)


@dataclass(frozen=True)
class Pooled:
    """The mean difference to a baseline over targets.

    Attributes:
        arm: its name; None for the best arm, chosen for each target on held-out data.
        plan: target -> (arm, baseline).
        data_sets: number of sets of test images.
        low, high: the interval on these targets; NaN if there is none. Those of all arms of a baseline hold
            together.
        over: what the interval covers.
        random: the interval on targets like these, for the arm alone; None for a single data set.
    """

    arm: str | None
    baseline: str
    plan: Plan
    data_sets: int
    change: float
    low: float
    high: float
    over: str
    verdict: str
    random: tuple[float, float] | None
    random_verdict: str


def pooled(comparison: Comparison, quantity: Quantity, choices: Sequence[Choice]) -> list[Pooled]:
    """The answers over all targets on which an arm and its baseline were measured.

    Args:
        choices: of learning rates; the best arm of a target has the highest score on the held-out images.
    """
    study = comparison.study
    cells = {
        (target.name, arm): sample
        for target in study.targets
        for arm, sample in comparison.samples.get((target.name, quantity), {}).items()
    }
    found = []
    for baseline in dict.fromkeys(study.baseline_of(arm.name) for arm in study.arms):
        arms = [arm.name for arm in study.arms if study.baseline_of(arm.name) == baseline != arm.name]
        targets = [target.name for target in study.targets if (target.name, baseline) in cells]
        plans = {
            arm: {target: (arm, baseline) for target in targets if (target, arm) in cells} for arm in arms
        }
        for same in dict.fromkeys(tuple(plan) for plan in plans.values() if plan):
            # Arms on the same targets are compared together: their weights are the same.
            found += _pooled(comparison, cells, {arm: p for arm, p in plans.items() if tuple(p) == same})
        best = _best(choices, arms, targets)
        if len(arms) > 1 and best:
            plan = {target: (arm, baseline) for target, arm in best.items() if (target, arm) in cells}
            if len(plan) == len(targets):
                found += _pooled(comparison, cells, {None: plan})
    return found


def _best(choices: Sequence[Choice], arms: Sequence[str], targets: Sequence[str]) -> dict[str, str]:
    """Target -> the arm with the highest score on held-out images; {} if a choice is missing."""
    scores = {
        (choice.target, choice.arm): choice.scores[choice.learning_rate]
        for choice in choices
        if choice.learning_rate is not None
    }
    if any((target, arm) not in scores for target in targets for arm in arms):
        return {}
    return {target: max(arms, key=lambda arm: scores[target, arm] or 0.0) for target in targets}


def _pooled(
    comparison: Comparison, cells: Mapping[tuple[str, str], Sample], plans: Mapping[str | None, Plan]
) -> list[Pooled]:
    if not plans:
        return []
    sets = comparison.test_sets
    weights = [_weights(plan, sets) for plan in plans.values()]
    columns = _columns(cells, weights)
    used = {cell for chosen in weights for cell in chosen}
    known = all(cells[cell].draws is not None for cell in used)
    covariance, df = _covariance(columns, sets) if known else (None, math.inf)
    matrix = np.array([[column.weight_in(chosen) for column in columns] for chosen in weights])
    pools = np.unique([column.pool for column in columns], return_inverse=True)[1]
    found = contrasts(padded([column.values for column in columns]), matrix, covariance, df, pools)
    low, high = found.interval(simultaneous_where_known(found))
    result = []
    for row, (arm, plan) in enumerate(plans.items()):
        kinds = {cells[target, name].kind for target, names in plan.items() for name in names}
        decided = bool(found.se[row] > 0)
        ends = (float(low[row]), float(high[row])) if decided else (math.nan, math.nan)
        random = _random(cells, plan, sets)
        margin = comparison.study.margin
        result.append(
            Pooled(
                arm,
                next(iter(plan.values()))[1],
                plan,
                len({sets.get(target, target) for target in plan}),
                float(found.estimate[row]),
                *ends,
                covered(kinds, found.covers_runs[row], known) if decided else "",
                verdict(*ends, margin),
                random,
                verdict(*random, margin) if random else "",
            )
        )
    return result


def _weights(plan: Plan, sets: Mapping[str, str]) -> dict[tuple[str, str], float]:
    """(target, arm) -> its weight in the mean difference. Each data set has the same weight."""
    of_set = [sets.get(target, target) for target in plan]
    weights: dict[tuple[str, str], float] = {}
    for (target, (arm, baseline)), name in zip(plan.items(), of_set, strict=True):
        weight = 1 / len(set(of_set)) / of_set.count(name)
        weights[target, arm], weights[target, baseline] = weight, -weight
    return weights


@dataclass(frozen=True)
class _Column:
    """What a contrast weighs: a cell (target, arm), or the mean of an arm's cells if they share checkpoints.

    A checkpoint's luck is the same on all targets, so that of a mean over targets is seen in the checkpoints'
    means over targets, and nowhere else. Fine-tunings on different targets are independent.
    """

    cells: dict[tuple[str, str], float]  # cell -> its share, all positive
    values: list[float]
    draws: dict[tuple[str, str], np.ndarray | None]
    pool: str

    def weight_in(self, weights: Mapping[tuple[str, str], float]) -> float:
        first, share = next(iter(self.cells.items()))
        return weights.get(first, 0.0) / share


def _columns(
    cells: Mapping[tuple[str, str], Sample], weights: Sequence[Mapping[tuple[str, str], float]]
) -> list[_Column]:
    """Columns for all cells, also for those without a weight: their spread is part of a pooled variance."""
    columns: list[_Column] = []
    done: set[tuple[str, str]] = set()
    for chosen in weights:
        for arm in dict.fromkeys(arm for _, arm in cells):
            own = {cell: abs(weight) for cell, weight in chosen.items() if cell[1] == arm}
            if not own:  # an arm that takes no part, with the targets' own weights
                own = {(target, arm): abs(weight) for (target, _), weight in chosen.items()}
            shared = [cells[cell] for cell in own if cell in cells]
            together = (
                len(shared) == len(own)
                and all(sample.kind == CHECKPOINTS for sample in shared)
                and len({tuple(sample.values) for sample in shared}) == 1
            )
            if not together or done & set(own):
                continue
            done |= set(own)
            means = [
                sum(share * cells[cell].values[run] for cell, share in own.items())
                for run in shared[0].values
            ]
            columns.append(_Column(own, means, {cell: cells[cell].draws for cell in own}, "checkpoints"))
    for cell, sample in cells.items():
        if cell not in done:
            pool = f"{sample.kind} on {cell[0]}"
            columns.append(_Column({cell: 1.0}, list(sample.values.values()), {cell: sample.draws}, pool))
    return columns


def _covariance(columns: Sequence[_Column], sets: Mapping[str, str]) -> tuple[np.ndarray, float]:
    """Covariance of the columns over the choice of test images, which is independent between data sets."""
    total, df = np.zeros((len(columns), len(columns))), math.inf
    for name in dict.fromkeys(sets.get(target, target) for column in columns for target, _ in column.cells):
        draws = []
        for column in columns:
            parts = [
                share * drawn
                for cell, share in column.cells.items()
                if sets.get(cell[0], cell[0]) == name and (drawn := column.draws[cell]) is not None
            ]
            same = len({len(part) for part in parts}) == 1
            draws.append(np.sum(parts, axis=0) if same else None)
        covariance, of_set = covariance_over_images(draws)
        total, df = total + covariance, min(df, of_set)
    return total, df


def _random(
    cells: Mapping[tuple[str, str], Sample], plan: Plan, sets: Mapping[str, str]
) -> tuple[float, float] | None:
    """The interval with data sets as a sample; None for a single one.

    The luck of checkpoints that all data sets share cannot be seen in their spread, so it is added.
    """
    by_set: dict[str, list[str]] = {}
    for target in plan:
        by_set.setdefault(sets.get(target, target), []).append(target)
    k = len(by_set)
    if k < 2:
        return None
    changes = [
        np.mean([cells[t, plan[t][0]].mean - cells[t, plan[t][1]].mean for t in targets])
        for targets in by_set.values()
    ]
    parts = [(float(np.var(changes, ddof=1)) / k, k - 1)]
    for role in (0, 1):
        of_sets = [[cells[target, plan[target][role]] for target in targets] for targets in by_set.values()]
        samples = [sample for targets in of_sets for sample in targets]
        n = len(samples[0].values)
        same_arm = len({names[role] for names in plan.values()}) == 1
        same_runs = len({tuple(sample.values) for sample in samples}) == 1
        if same_arm and same_runs and samples[0].kind == CHECKPOINTS and n > 1:
            means = [np.mean([list(s.values.values()) for s in targets], axis=0) for targets in of_sets]
            covariance = np.cov(means)
            shared = (covariance.sum() - np.trace(covariance)) / (k * (k - 1))
            parts.append((max(0.0, float(shared)) / n, n - 1))
    variance = sum(part for part, _ in parts)
    if variance == 0:
        return None
    df = variance**2 / sum(part**2 / freedom for part, freedom in parts)
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, df)) * math.sqrt(variance)
    mean = float(np.mean(changes))
    return mean - half, mean + half
