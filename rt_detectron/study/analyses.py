"""Analyses across the arms of a study: the best eps, and source accuracy against transfer.

They follow Salman et al. 2020 (https://arxiv.org/abs/2007.08489, sections 4.1 and 4.2), with intervals.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from scipy import stats

from rt_detectron.study.evaluations import Chapter
from rt_detectron.study.figures import Charts, Figure, svg_figure
from rt_detectron.study.intervals import CONFIDENCE, simultaneous
from rt_detectron.study.statistics import (
    CLEAN,
    TASKS,
    Comparison,
    Quantity,
    Sample,
    contrast_samples,
    differences,
    groups_of,
    lines_of,
    main_metric,
    select,
)
from rt_detectron.study.tables import Cell, Line, Table, format_interval, format_number, score_cell
from rt_detectron.visualization import plots


@dataclass(frozen=True)
class BestEps:
    """The arm with the highest mean score of those that share a baseline, on one target.

    Attributes:
        line: its line of the comparison's scores.
        candidates: eps of the arms that may be the best one, see :func:`may_be_best`. None without intervals.
    """

    line: Any
    eps: float
    candidates: tuple[float, ...] | None


@dataclass(frozen=True)
class Fit:
    """A least-squares line through (source accuracy, mean score) of arms, on one target.

    Attributes:
        group: which arms these are.
        points: arm -> (source accuracy, mean score), both in percent.
        interval: of the slope, from Student's t with len(points) - 2 degrees of freedom.
    """

    target: str
    group: str
    points: dict[str, tuple[float, float]]
    slope: float
    intercept: float
    interval: tuple[float, float]
    r2: float

    @property
    def ends(self) -> list[tuple[float, float]]:
        """The line at the smallest and at the largest source accuracy."""
        sources = [source for source, _ in self.points.values()]
        return [(x, self.intercept + self.slope * x) for x in (min(sources), max(sources))]


def best_eps(comparison: Comparison, task: str) -> list[BestEps]:
    """For each target, and for the arms of each baseline if at least two of them have different eps."""
    quantity = {"kind": CLEAN, "task": task, "metric": main_metric(task)}
    lines = select(comparison.scores, **quantity)
    lines = lines.assign(eps=lines["arm"].map({arm.name: arm.eps for arm in comparison.study.arms}))
    lines = lines[lines["eps"].notna()]
    found = []
    for (target, _), arms in groups_of(lines, ["target", "baseline"]):
        if arms["eps"].nunique() < 2:
            continue
        best = max(lines_of(arms), key=lambda line: line.mean)
        samples = comparison.samples.get((target, Quantity(CLEAN, task, main_metric(task))), {})
        names = may_be_best(samples, arms["arm"].tolist())
        candidates = None if names is None else tuple(sorted(set(arms["eps"][arms["arm"].isin(names)])))
        found.append(BestEps(best, best.eps, candidates))
    return found


def may_be_best(samples: Mapping[str, Sample], arms: Sequence[str]) -> list[str] | None:
    """The arms of which no other one is better for sure; None if there is no interval of a difference.

    The best arm is among them with a probability of at least 95 % (Hsu 1981, "Simultaneous confidence
    intervals for all distances from the best").
    """
    if not set(arms) <= set(samples):
        return None
    names = list(samples)
    known = all(samples[arm].draws is not None for arm in arms)
    found = []
    for arm in arms:
        weights = differences(names, [(arm, other) for other in arms if other != arm])
        to_others = contrast_samples(list(samples.values()), weights, known)
        if not (to_others.se > 0).all():
            return None
        critical = simultaneous(to_others.correlation, to_others.df, one_sided=True)
        if (to_others.estimate + critical * to_others.se >= 0).all():
            found.append(arm)
    return found


def fits(comparison: Comparison, task: str) -> list[Fit]:
    """Lines through three or more source accuracies, for the arms of one baseline and those of one eps."""
    study = comparison.study
    lines = select(comparison.scores, kind=CLEAN, task=task, metric=main_metric(task))
    means = dict(zip(zip(lines["target"], lines["arm"], strict=True), lines["mean"], strict=True))
    sources = {arm.name: arm.source_accuracy for arm in study.arms if arm.source_accuracy is not None}
    groups: dict[str, list[str]] = {}
    for arm in sources:
        groups.setdefault(f"across eps, {study.baseline_of(arm)}", []).append(arm)
    with_eps = [(arm.eps, arm.name) for arm in study.arms if arm.eps is not None and arm.name in sources]
    for eps, arm in sorted(with_eps, key=lambda pair: pair[0]):
        groups.setdefault(f"at eps {eps:g}", []).append(arm)
    found = []
    for target in study.targets:
        for group, members in groups.items():
            points = {
                arm: (sources[arm], means[target.name, arm]) for arm in members if (target.name, arm) in means
            }
            if len({source for source, _ in points.values()}) >= 3:
                found.append(_fit(target.name, group, points))
    return found


def _fit(target: str, group: str, points: dict[str, tuple[float, float]]) -> Fit:
    line = stats.linregress(*zip(*points.values(), strict=True))
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, len(points) - 2) * line.stderr)
    slope, intercept = float(line.slope), float(line.intercept)
    r2 = 0.0 if math.isnan(line.rvalue) else float(line.rvalue) ** 2  # a constant score has no correlation
    return Fit(target, group, points, slope, intercept, (slope - half, slope + half), r2)


def chapter(best: Sequence[BestEps], lines: Sequence[Fit], task: str, charts: Charts) -> Chapter:
    """The chapter on these analyses; without tables if there are none."""
    tables = [
        Table(
            "Best eps",
            ["eps", "not distinguishable from the best", TASKS[task]],
            [_best_line(entry) for entry in best],
        ),
        Table("Source accuracy against transfer", ["arms", "slope", "R²"], [_fit_line(fit) for fit in lines]),
    ]
    text = (
        "The best eps has the highest mean score. With 95 % probability the eps that is truly best is among "
        "those “not distinguishable from the best” (Hsu's comparison with the best). The best arm is chosen "
        "by the same scores that are shown, so it would probably score lower in new trials. A slope is in "
        "points of the score per point of source accuracy, by least squares through the means of the arms."
    )
    tables = [table for table in tables if table.lines]
    return Chapter("Across arms", text, tables, _plots(lines, task, charts))


def _best_line(best: BestEps) -> Line:
    line = best.line
    candidates = ", ".join(f"{eps:g}" for eps in best.candidates) if best.candidates else "no interval"
    cells = [Cell(f"{best.eps:g}"), Cell(candidates), score_cell(line)]
    return Line(line.target, line.arm, line.arm == line.baseline, line.n, cells)


def _fit_line(fit: Fit) -> Line:
    slope = format_number(fit.slope) + format_interval(*fit.interval)
    cells = [Cell(str(len(fit.points))), Cell(slope), Cell(f"{fit.r2:.2f}")]
    return Line(fit.target, fit.group, False, None, cells)


def _plots(fits: Sequence[Fit], task: str, charts: Charts) -> list[Figure]:
    """For each target, the score of each arm against its source accuracy, with the fitted lines."""
    figures = []
    for target in dict.fromkeys(fit.target for fit in fits):
        here = [fit for fit in fits if fit.target == target]
        points = {arm: point for fit in here for arm, point in fit.points.items()}
        dots = [(series, *points[series.name]) for series in charts.series if series.name in points]
        lines = {fit.group: fit.ends for fit in here}
        figures.append(
            svg_figure(
                f"source-{target}-{task}",
                f"{target}: {TASKS[task]} against the accuracy on the weights' own data set; a dot per arm, "
                "lines by least squares.",
                ", ".join(f"{arm} {source:.1f}: {score:.1f}" for arm, (source, score) in points.items()),
                plots.scatter_plot(dots, ("source accuracy (%)", f"{TASKS[task]} (%)"), lines),
            )
        )
    return figures
