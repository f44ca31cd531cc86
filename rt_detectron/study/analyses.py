"""What the arms of a study say together: the best eps, and source accuracy against what is transferred.

The analyses of Salman et al. 2020 (https://arxiv.org/abs/2007.08489, sections 4.1 and 4.2), with intervals.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import stdtrit

from rt_detectron.study.grid import FINAL, Arm, Study
from rt_detectron.study.measurements import CLEAN, TASKS, Quantity, measurements, reported
from rt_detectron.study.record import Outcome
from rt_detectron.study.statistics import CONFIDENCE, Row, Scores, paired_differences, summarize, t_interval
from rt_detectron.study.tables import Cell, Line, Table, format_change, format_number, format_summary

ANALYSIS = "analysis"  # the kind of these tables


@dataclass(frozen=True)
class BestEps:
    """The best of the arms that share a baseline, on one target.

    Attributes:
        row: of the arm with the highest mean.
        eps: its own.
        candidates: eps of the arms that cannot be told from it: the interval of the difference, paired by
            seed, holds 0. None where a single seed gives no interval.
    """

    row: Row
    eps: float
    candidates: tuple[float, ...] | None


@dataclass(frozen=True)
class Fit:
    """A straight line through (source accuracy, mean score) of arms, on one target, by least squares.

    Attributes:
        group: which arms.
        points: arm -> (source accuracy, mean score), both in percent.
        interval: of the slope, Student's with len(points) - 2 degrees of freedom.
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
        """The line at the least and the greatest source accuracy."""
        sources = [source for source, _ in self.points.values()]
        return [(x, self.intercept + self.slope * x) for x in (min(sources), max(sources))]


def scores_by_seed(outcomes: Sequence[Outcome]) -> dict[tuple[str, str], Scores]:
    """(target, arm) -> seed -> what the final trial measured."""
    found: dict[tuple[str, str], dict] = {}
    for outcome in outcomes:
        trial = outcome.trial
        if trial.stage == FINAL and outcome.results:
            found.setdefault((trial.target, trial.arm), {})[trial.seed] = reported(measurements(outcome))
    return found


def best_eps(
    study: Study, rows: Sequence[Row], scores: Mapping[tuple[str, str], Scores], task: str
) -> list[BestEps]:
    """For each target, and each baseline's arms among which at least two have an eps."""
    quantity = Quantity(CLEAN, task)
    eps = {arm.name: arm.eps for arm in study.arms if arm.eps is not None}
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if row.arm in eps and quantity in row.scores:
            groups.setdefault((row.target, row.baseline), []).append(row)
    found = []
    for (target, _), members in groups.items():
        if len({eps[row.arm] for row in members}) < 2:
            continue
        best = max(members, key=lambda row: row.scores[quantity].mean)
        candidates: set[float] | None = {eps[best.arm]}
        for row in members:
            pair = scores[target, row.arm], scores[target, best.arm]
            differences = paired_differences(*pair, quantity)
            interval = t_interval(summarize(differences)) if differences else None
            if interval is None:
                candidates = None
                break
            if interval.low <= 0 <= interval.high:
                candidates.add(eps[row.arm])
        found.append(BestEps(best, eps[best.arm], candidates and tuple(sorted(candidates))))
    return found


def fits(study: Study, rows: Sequence[Row], task: str) -> list[Fit]:
    """Lines through three source accuracies or more: of one baseline's arms (across eps), and of one eps."""
    quantity = Quantity(CLEAN, task)
    arms = [arm for arm in study.arms if arm.source_accuracy is not None]
    means = {(row.target, row.arm): row.scores[quantity].mean for row in rows if quantity in row.scores}
    groups: dict[str, list[Arm]] = {}
    for arm in arms:
        groups.setdefault(f"across eps, {study.baseline_of(arm.name)}", []).append(arm)
    for arm in sorted((arm for arm in arms if arm.eps is not None), key=lambda arm: arm.eps):
        groups.setdefault(f"at eps {arm.eps:g}", []).append(arm)
    found = []
    for target in study.targets:
        for group, members in groups.items():
            points = {
                arm.name: (arm.source_accuracy, means[target.name, arm.name])
                for arm in members
                if (target.name, arm.name) in means
            }
            if len({source for source, _ in points.values()}) >= 3:
                found.append(_fit(target.name, group, points))
    return found


def _fit(target: str, group: str, points: dict[str, tuple[float, float]]) -> Fit:
    x, y = np.array(list(points.values())).T
    freedom, spread = len(points) - 2, ((x - x.mean()) ** 2).sum()
    slope = float(((x - x.mean()) * y).sum() / spread)
    intercept = float(y.mean() - slope * x.mean())
    left, total = ((y - intercept - slope * x) ** 2).sum(), ((y - y.mean()) ** 2).sum()
    half = float(stdtrit(freedom, (1 + CONFIDENCE) / 2) * np.sqrt(left / freedom / spread))
    r2 = float(1 - left / total) if total > 0 else 0.0  # a constant score explains nothing
    return Fit(target, group, points, slope, intercept, (slope - half, slope + half), r2)


def make_tables(best: Sequence[BestEps], lines: Sequence[Fit], task: str) -> list[Table]:
    """The tables that have a line in them."""
    quantity = Quantity(CLEAN, task)
    tables = [
        Table(
            ANALYSIS,
            "Best eps",
            ["eps", "not told apart", TASKS[task]],
            [_best_line(entry, quantity) for entry in best],
        ),
        Table(
            ANALYSIS,
            "Source accuracy against transfer",
            ["arms", "slope", "R²"],
            [_fit_line(fit) for fit in lines],
        ),
    ]
    return [table for table in tables if table.lines]


def _best_line(best: BestEps, quantity: Quantity) -> Line:
    row = best.row
    change = row.changes.get(quantity)
    told = ", ".join(f"{eps:g}" for eps in best.candidates) if best.candidates else "no interval"
    score = Cell(
        format_summary(row.scores[quantity]),
        format_change(change) if change else "",
        change.verdict if change else "",
    )
    return Line(
        row.target, row.arm, row.is_baseline, len(row.seeds), [Cell(f"{best.eps:g}"), Cell(told), score]
    )


def _fit_line(fit: Fit) -> Line:
    low, high = fit.interval
    slope = f"{format_number(fit.slope)} [{format_number(low)}, {format_number(high)}]"
    return Line(
        fit.target, fit.group, False, None, [Cell(str(len(fit.points))), Cell(slope), Cell(f"{fit.r2:.2f}")]
    )
