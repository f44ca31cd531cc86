"""The plots of a report."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from rt_detectron.study.analyses import Fit
from rt_detectron.study.answers import Answer
from rt_detectron.study.grid import FINAL, Study
from rt_detectron.study.measurements import (
    ATTACK,
    CLEAN,
    NOISE,
    TASKS,
    UNATTACKED,
    Quantity,
    measurements,
    reported,
)
from rt_detectron.study.record import Outcome, is_number
from rt_detectron.study.statistics import Change, Row
from rt_detectron.study.tables import SIZES, attack_conditions, condition_name
from rt_detectron.visualization import plots

CATEGORIES = 8  # that gain and lose most


@dataclass(frozen=True)
class Figure:
    """A picture of the page.

    Attributes:
        name: of its file, without ending.
        kind: of the content, such as "image/svg+xml".
    """

    name: str
    caption: str
    alt: str
    kind: str
    content: bytes


class Figures:
    """Makes the plots of one study. Arms keep their colour, by their place in the study, in all of them."""

    def __init__(self, study: Study, outcomes: Sequence[Outcome], rows: Sequence[Row]):
        self.study = study
        self.rows = rows
        self.series = [plots.Series(arm.name, index) for index, arm in enumerate(study.arms)]
        self.color = {series.name: series.color_index for series in self.series}
        self.families = {
            baseline: [one for one in self.series if study.baseline_of(one.name) == baseline]
            for baseline in dict.fromkeys(study.baseline_of(arm.name) for arm in study.arms)
        }
        self.finals = [o for o in outcomes if o.trial.stage == FINAL]
        self.scores = [(o.trial, reported(measurements(o))) for o in self.finals if o.results]
        self.targets = [d.name for d in study.targets if any(row.target == d.name for row in rows)]

    def answer(self, answer: Answer) -> Figure:
        """Every arm's difference to its baseline, with its interval."""
        groups = {
            target: [
                self._difference(row.arm, row.arm, row.changes[answer.quantity])
                for row in self.rows
                if row.target == target and answer.quantity in row.changes
            ]
            for target in self.targets
        }
        groups = {target: lines for target, lines in groups.items() if lines}
        label = f"difference in {TASKS[answer.quantity.task]}"
        return _plot(
            f"answer-{answer.quantity.kind.replace(': ', '-')}",
            f"{answer.question}: difference to the baseline and its 95 % interval.",
            "; ".join(f"{line.name} {line.value:+.1f}" for lines in groups.values() for line in lines),
            plots.difference_plot(groups, label),
        )

    def clean(self) -> list[Figure]:
        """The main number per arm; against the arms' eps, where all have one."""
        by_eps = all(arm.eps is not None for arm in self.study.arms)
        draw = self._radii if by_eps else self._dots
        return [draw(target, task) for target, task in self._measured()]

    def details(self) -> list[Figure]:
        """AP by object size, and the categories that differ most."""
        measured = self._measured()
        return [
            *(figure for target, task in measured for figure in self._sizes(target, task)),
            *(figure for target, task in measured for figure in self._categories(target, task)),
        ]

    def _measured(self) -> list[tuple[str, str]]:
        """The pairs of target and task that were measured."""
        return [
            (target, task)
            for target in self.targets
            for task in TASKS
            if any(Quantity(CLEAN, task) in row.scores for row in self.rows if row.target == target)
        ]

    def _dots(self, target: str, task: str) -> Figure:
        quantity = Quantity(CLEAN, task)
        values = [self._values(target, arm.name, quantity) for arm in self.study.arms]
        return _plot(
            f"clean-{target}-{task}",
            f"{target}: {TASKS[task]} of each arm; a dot per seed, a bar at the mean.",
            _spoken(self.series, values),
            plots.dot_plot(self.series, values, f"{TASKS[task]} (%)"),
        )

    def _radii(self, target: str, task: str) -> Figure:
        eps = {arm.name: arm.eps for arm in self.study.arms}
        families = {
            f"compared with {baseline}": [
                (
                    # With two families the colour tells these apart; the arms are told apart by their eps.
                    series if len(self.families) == 1 else plots.Series(series.name, number),
                    eps[series.name],
                    self._values(target, series.name, Quantity(CLEAN, task)),
                )
                for series in members
            ]
            for number, (baseline, members) in enumerate(self.families.items())
        }
        families = {
            name: members for name, members in families.items() if any(values for _, _, values in members)
        }
        every = [member for members in families.values() for member in members]
        labels = ("eps that the backbone was trained with", f"{TASKS[task]} (%)")
        return _plot(
            f"clean-{target}-{task}",
            f"{target}: {TASKS[task]} against the backbone's training eps; a dot per seed, the line "
            "joins the means.",
            _spoken([series for series, _, _ in every], [values for _, _, values in every]),
            plots.radius_plot(families, labels),
        )

    def _sizes(self, target: str, task: str) -> list[Figure]:
        found = []
        for baseline, series in self.families.items():
            values = [
                [self._values(target, arm.name, Quantity(CLEAN, task, metric)) for metric in SIZES.values()]
                for arm in series
            ]
            if any(numbers for of_arm in values for numbers in of_arm):
                spoken = [_spoken(series, column) for column in zip(*values, strict=True)]
                found.append(
                    _plot(
                        f"sizes-{target}-{task}{self._suffix(baseline)}",
                        f"{target}: {TASKS[task]} by object size; a dot per seed, a bar at the mean.",
                        "; ".join(f"{size}: {text}" for size, text in zip(SIZES, spoken, strict=True)),
                        plots.group_plot(series, list(SIZES), values, f"{TASKS[task]} (%)"),
                    )
                )
        return found

    def _categories(self, target: str, task: str) -> list[Figure]:
        """Per arm the categories that gain and lose most against the baseline."""
        found = []
        for row in self.rows:
            changes = {
                quantity.category: change
                for quantity, change in row.changes.items()
                if (quantity.kind, quantity.task) == (CLEAN, task) and quantity.category is not None
            }
            if row.target != target or len(changes) < 2:
                continue
            ordered = sorted(changes, key=lambda name: -changes[name].differences.mean)
            shown, which = ordered, "all categories"
            if len(ordered) > 2 * CATEGORIES:
                shown = ordered[:CATEGORIES] + ordered[-CATEGORIES:]
                which = f"the {CATEGORIES} categories of {len(ordered)} that gain and that lose most"
            lines = [self._difference(name, row.arm, changes[name]) for name in shown]
            found.append(
                _plot(
                    f"categories-{target}-{task}-{row.arm}",
                    f"{target}: {TASKS[task]} of {row.arm} minus {row.baseline}, {which}.",
                    ", ".join(f"{line.name} {line.value:+.1f}" for line in lines),
                    plots.difference_plot({"": lines}, f"difference in {TASKS[task]}"),
                )
            )
        return found

    def attack(self) -> list[Figure]:
        """AP against the attack's eps, with random noise of the same size."""
        return [
            self._attack(target, task, condition, levels, baseline)
            for target in self.targets
            for task in TASKS
            for condition, levels in attack_conditions(
                [row for row in self.rows if row.target == target], task
            ).items()
            for baseline in self.families
        ]

    def _attack(
        self, target: str, task: str, condition: str, levels: Sequence[float], baseline: str
    ) -> Figure:
        series = self.families[baseline]
        points, noises = [], []
        for arm in series:
            unattacked = self._values(
                target, arm.name, Quantity(UNATTACKED, task, "AP", condition, levels[0])
            )
            attacked, noise = (
                {0.0: unattacked}
                | {
                    eps: self._values(target, arm.name, Quantity(kind, task, "AP", condition, eps))
                    for eps in levels
                }
                for kind in (ATTACK, NOISE)
            )
            points.append({eps: values for eps, values in attacked.items() if values})
            means = {eps: fmean(values) for eps, values in noise.items() if values}
            noises.append(means if len(means) > 1 else {})
        norm, _, loss = condition.partition(", ")
        unit = ", in 1/255" if norm == "linf" else ""
        labels = (f"eps of the attack{unit}", f"{TASKS[task]} (%)")
        dotted = " Dotted: random noise of the same size." if any(noises) else ""
        return _plot(
            f"attack-{target}-{task}-{norm}-{loss}{self._suffix(baseline)}",
            f"{target}: {TASKS[task]} under {condition_name(condition)}; lines at the mean over seeds, "
            f"bands from the least to the greatest.{dotted}",
            "; ".join(
                f"eps {eps:g}: {_spoken(series, [at.get(eps, []) for at in points])}" for eps in [0, *levels]
            ),
            plots.line_plot(series, points, noises, labels),
        )

    def fits(self, fits: Sequence[Fit], task: str) -> list[Figure]:
        """Each arm's score against its source accuracy, with the fitted lines."""
        found = []
        for target in self.targets:
            here = [fit for fit in fits if fit.target == target]
            if not here:
                continue
            points = {arm: point for fit in here for arm, point in fit.points.items()}
            dots = [(series, *points[series.name]) for series in self.series if series.name in points]
            lines = {fit.group: fit.ends for fit in here}
            found.append(
                _plot(
                    f"source-{target}-{task}",
                    f"{target}: {TASKS[task]} against the accuracy on the weights' own data set; a dot per "
                    "arm, lines by least squares.",
                    ", ".join(f"{arm} {source:.1f}: {score:.1f}" for arm, (source, score) in points.items()),
                    plots.fit_plot(dots, lines, ("source accuracy (%)", f"{TASKS[task]} (%)")),
                )
            )
        return found

    def curves(self) -> list[Figure]:
        """The training loss of every final trial, also of unfinished ones."""
        found = []
        for target in self.study.targets:
            here = [o for o in self.finals if o.trial.target == target.name]
            for baseline, series in self.families.items():
                curves = [
                    [curve for o in here if o.trial.arm == arm.name and (curve := _loss_curve(o.folder))[0]]
                    for arm in series
                ]
                if any(curves):
                    found.append(
                        _plot(
                            f"training-{target.name}{self._suffix(baseline)}",
                            f"{target.name}: total training loss; a line per seed.",
                            f"total training loss of {target.name} against the iteration",
                            plots.curve_plot(series, curves),
                        )
                    )
        return found

    def _difference(self, name: str, arm: str, change: Change) -> plots.Difference:
        ends = (change.interval.low, change.interval.high) if change.interval else (None, None)
        return plots.Difference(name, self.color[arm], change.differences.mean, *ends)

    def _values(self, target: str, arm: str, quantity: Quantity) -> list[float]:
        """Of the quantity, one per seed that has it."""
        return [
            measured[quantity]
            for trial, measured in self.scores
            if (trial.target, trial.arm) == (target, arm) and quantity in measured
        ]

    def _suffix(self, baseline: str) -> str:
        return f"-{baseline}" if len(self.families) > 1 else ""


def _spoken(series: Sequence[plots.Series], values: Sequence[Sequence[float]]) -> str:
    """The mean of each arm, for those who do not see the plot."""
    pairs = zip(series, values, strict=True)
    return ", ".join(f"{arm.name} {fmean(numbers):.1f}" for arm, numbers in pairs if numbers)


def _loss_curve(folder: Path) -> tuple[list[int], list[float]]:
    """Iterations and total losses from Detectron2's metrics.json; of a repeated iteration the last counts."""
    losses: dict[int, float] = {}
    try:
        lines = (folder / "metrics.json").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return [], []
    for line in lines:
        try:
            record = json.loads(line)
            if is_number(record["total_loss"]):
                losses[int(record["iteration"])] = record["total_loss"]
        except (ValueError, KeyError, TypeError):
            continue  # evaluation records have no loss; a killed trial leaves half a line
    return sorted(losses), [losses[iteration] for iteration in sorted(losses)]


def _plot(name: str, caption: str, alt: str, svg: bytes) -> Figure:
    return Figure(name, caption, alt, "image/svg+xml", svg)
