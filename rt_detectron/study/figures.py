"""The plots of a report."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pandas as pd

from rt_detectron.study.bootstrap import RECALL_THRESHOLDS
from rt_detectron.study.grid import FINAL, Study
from rt_detectron.study.record import Outcome
from rt_detectron.study.statistics import (
    CLEAN,
    TASKS,
    groups_of,
    lines_of,
    main_metric,
    of_categories,
    select,
)
from rt_detectron.study.targets import Pooled
from rt_detectron.utils.files import json_lines
from rt_detectron.utils.numbers import is_number
from rt_detectron.visualization import plots

MANY_ARMS = 6  # with more, only the one that differs most has its categories, sizes and errors shown
CATEGORIES = 8  # number of categories shown that gain most, and that lose most
MANY_ROWS = 30  # from which on differences are a heat map
ALL_TARGETS = "all targets"
SIZES = {"small": "APs", "medium": "APm", "large": "APl"}  # of objects, by area


@dataclass(frozen=True)
class Figure:
    """A picture of the report.

    Attributes:
        name: of its file, without suffix.
        target: that it is about; "" for several.
        alt: the content in words.
        media_type: such as "image/svg+xml".
    """

    name: str
    caption: str
    alt: str
    media_type: str
    content: bytes
    target: str = ""


class Charts:
    """Draws the plots of one study. Each arm keeps its colour, by its place in the study, in all of them.

    Args:
        scores: of a :class:`~rt_detectron.study.statistics.Comparison`. ``lines`` below are lines of it.
    """

    def __init__(self, study: Study, scores: pd.DataFrame):
        self.study = study
        self.scores = scores
        self.series = [plots.Series(arm.name, index) for index, arm in enumerate(study.arms)]
        self.color = {series.name: series.color_index for series in self.series}
        self.families = {
            baseline: [one for one in self.series if study.baseline_of(one.name) == baseline]
            for baseline in dict.fromkeys(study.baseline_of(arm.name) for arm in study.arms)
        }

    def groups(self, kind: str) -> Iterator[tuple[tuple[str, str, str], pd.DataFrame]]:
        """(target, task, condition) and the lines of its main metric, for each that was measured."""
        lines = select(self.scores, kind=kind)
        for target in self.study.targets:
            for task in TASKS:
                chosen = select(lines, target=target.name, task=task, metric=main_metric(task))
                for condition, group in groups_of(chosen, "condition"):
                    yield (target.name, task, condition), group

    def differences(
        self, name: str, caption: str, measure: str, lines: pd.DataFrame, pooled: Sequence[Pooled]
    ) -> Figure:
        """The difference of every arm to its baseline, with its interval; a heat map if there are many.

        Args:
            pooled: those over all targets, which come first if there are several targets.
        """
        several = lines["target"].nunique() > 1
        over_all = [_difference(one.arm or "best on held-out", one) for one in pooled] if several else []
        words = "; ".join(f"{line.target} {line.arm} {line.change:+.2f}" for line in lines_of(lines))
        if len(lines) + len(over_all) > MANY_ROWS:
            cells = {(line.arm, line.target): (line.change, line.verdict) for line in lines_of(lines)}
            cells |= {(one.name, ALL_TARGETS): (one.value, one.verdict) for one in over_all}
            names = [arm.name for arm in self.study.arms if arm.name in set(lines["arm"])]
            names += [one.name for one in over_all if one.name not in names]
            columns = [ALL_TARGETS] * bool(over_all) + list(dict.fromkeys(lines["target"]))
            plot = plots.heat_map(names, columns, cells, f"difference in {measure}")
            return svg_figure(name, caption, words, plot)
        groups = {ALL_TARGETS: over_all} if over_all else {}
        groups |= {
            target: [_difference(line.arm, line) for line in lines_of(group)]
            for target, group in groups_of(lines, "target")
        }
        return svg_figure(name, caption, words, plots.difference_plot(groups, f"difference in {measure}"))

    def clean_against(self, name: str, caption: str, other: pd.DataFrame, measure: str) -> Iterator[Figure]:
        """For each target, the clean scores of the arms against those in ``other``, such as attacked ones."""
        for (target, task, _), lines in self.groups(CLEAN):
            theirs = select(other, target=target, task=task)
            if theirs.empty:
                continue
            means = dict(zip(theirs["arm"], theirs["mean"], strict=True))
            clean = dict(zip(lines["arm"], lines["mean"], strict=True))
            dots = [
                (s, clean[s.name], means[s.name])
                for s in self.series
                if s.name in clean.keys() & means.keys()
            ]
            if dots:
                yield svg_figure(
                    f"{name}-{target}-{task}",
                    f"{target}: {caption}",
                    ", ".join(f"{series.name}: clean {x:.1f}, {y:.1f}" for series, x, y in dots),
                    plots.scatter_plot(dots, (f"clean {TASKS[task]} (%)", f"{measure} (%)")),
                    target,
                )

    def clean(self) -> Iterator[Figure]:
        """The main metric of each arm; against the arms' eps, if all have one."""
        by_eps = all(arm.eps is not None for arm in self.study.arms)
        draw = self._against_training_eps if by_eps else self._dots
        for (target, task, _), lines in self.groups(CLEAN):
            yield draw(target, task, lines)

    def _dots(self, target: str, task: str, lines: pd.DataFrame) -> Figure:
        values = _by_arm(self.series, lines)
        return svg_figure(
            f"clean-{target}-{task}",
            f"{target}: {TASKS[task]} of each arm; a dot per trial, a bar at the mean.",
            _in_words(self.series, values),
            plots.dot_plot(self.series, values, f"{TASKS[task]} (%)"),
            target,
        )

    def _against_training_eps(self, target: str, task: str, lines: pd.DataFrame) -> Figure:
        eps = {arm.name: arm.eps for arm in self.study.arms if arm.eps is not None}
        values = dict(zip(self.series, _by_arm(self.series, lines), strict=True))
        families = {
            f"compared with {baseline}": [
                (
                    # Colours tell arms apart; with several families they tell these apart instead.
                    series if len(self.families) == 1 else plots.Series(series.name, number),
                    eps[series.name],
                    values[series],
                )
                for series in members
            ]
            for number, (baseline, members) in enumerate(self.families.items())
        }
        families = {
            name: members for name, members in families.items() if any(numbers for _, _, numbers in members)
        }
        labels = ("eps that the backbone was trained with", f"{TASKS[task]} (%)")
        return svg_figure(
            f"clean-{target}-{task}",
            f"{target}: {TASKS[task]} against the backbone's training eps; a dot per trial, the line joins "
            "the means.",
            _in_words(list(values), list(values.values())),
            plots.radius_plot(families, labels),
            target,
        )

    def sizes(self) -> Iterator[Figure]:
        """AP by object size."""
        return self._side_by_side("sizes", CLEAN, SIZES, "AP", "by object size")

    def errors(self, kind: str, types: Sequence[str]) -> Iterator[Figure]:
        """The AP50 that mending each type of error would gain."""
        what = "that mending each type of error would gain"
        return self._side_by_side("errors", kind, dict(zip(types, types, strict=True)), "AP50", what)

    def _side_by_side(
        self, name: str, kind: str, metrics: Mapping[str, str], measure: str, what: str
    ) -> Iterator[Figure]:
        """Several metrics side by side, a figure for each baseline. ``metrics``: label -> metric."""
        for (target, task, _), _ in self.groups(CLEAN):
            lines = select(self.scores, target=target, task=task, kind=kind)
            columns = {label: select(lines, metric=metric) for label, metric in metrics.items()}
            measured = TASKS[task].replace("AP", measure)
            which = ""
            for baseline, series in self.families.items():
                if len(series) > MANY_ARMS:  # as many dots side by side cannot be told apart
                    shown = {baseline, self._farthest(target, task, baseline)}
                    series = [one for one in series if one.name in shown]
                    which = ", baseline and the arm that differs most"
                values = {label: _by_arm(series, column) for label, column in columns.items()}
                if any(numbers for column in values.values() for numbers in column):
                    by_arm = list(zip(*values.values(), strict=True))
                    yield svg_figure(
                        f"{name}-{target}-{task}{self._suffix(baseline)}",
                        f"{target}: {measured} {what}{which}; a dot per trial, a bar at the mean.",
                        "; ".join(f"{key}: {_in_words(series, column)}" for key, column in values.items()),
                        plots.group_plot(series, list(metrics), by_arm, f"{measured} (%)"),
                        target,
                    )

    def categories(self) -> Iterator[Figure]:
        """For each arm, the categories that gain and lose most against the baseline."""
        changes = select(self.scores, kind=CLEAN)
        changes = changes[changes["change"].notna() & of_categories(changes)]
        for (target, task, _), _ in self.groups(CLEAN):
            for arm, lines in groups_of(select(changes, target=target, task=task), "arm"):
                if len(lines) < 2 or (len(self.series) > MANY_ARMS and arm != self._farthest(target, task)):
                    continue
                which = "all categories"
                lines = lines.sort_values("change", ascending=False, kind="stable")
                if len(lines) > 2 * CATEGORIES:
                    which = f"the {CATEGORIES} of {len(lines)} categories that gain and that lose most"
                    lines = pd.concat([lines.head(CATEGORIES), lines.tail(CATEGORIES)])
                names = lines["metric"].str.removeprefix(f"{main_metric(task)}-")
                shown = [_difference(*pair) for pair in zip(names, lines_of(lines), strict=True)]
                yield svg_figure(
                    f"categories-{target}-{task}-{arm}",
                    f"{target}: {TASKS[task]} of {arm} minus {lines['baseline'].iloc[0]}, {which}; "
                    "exploratory.",
                    ", ".join(f"{line.name} {line.value:+.1f}" for line in shown),
                    plots.difference_plot({"": shown}, f"difference in {TASKS[task]}"),
                    target,
                )

    def _farthest(self, target: str, task: str, baseline: str | None = None) -> str:
        """The arm whose main metric differs most from its baseline, of all or of those of one baseline."""
        lines = select(self.scores, kind=CLEAN, target=target, task=task, metric=main_metric(task))
        lines = lines if baseline is None else select(lines, baseline=baseline)
        lines = lines[lines["change"].notna()]
        return max(lines_of(lines), key=lambda line: abs(line.change)).arm if len(lines) else ""

    def against_level(
        self,
        name: str,
        caption: str,
        label: str,
        lines: pd.DataFrame,
        unchanged: pd.DataFrame,
        noise: pd.DataFrame,
    ) -> Iterator[Figure]:
        """The scores of each arm against the level of an attack, one figure for each baseline.

        Args:
            label: of the axis of levels.
            lines: of one target, task and condition, at all levels.
            unchanged: the same without attack, drawn at level 0.
            noise: the same under random noise, for dotted lines.
        """
        task = lines["task"].iloc[0]
        unchanged = unchanged.assign(level=0.0)
        at_level = {0.0: unchanged, **dict(groups_of(lines.sort_values("level"), "level"))}
        noise = pd.concat([unchanged, noise])
        for baseline, series in self.families.items():
            values = {level: _by_arm(series, group) for level, group in at_level.items()}
            points = [
                {level: by_arm[position] for level, by_arm in values.items() if by_arm[position]}
                for position in range(len(series))
            ]
            of_arms = [select(noise, arm=one.name) for one in series]
            noises = [dict(zip(n["level"], n["mean"], strict=True)) if len(n) > 1 else {} for n in of_arms]
            dotted = " Dotted: random noise of the same size." if any(noises) else ""
            yield svg_figure(
                f"{name}{self._suffix(baseline)}",
                f"{caption} Lines are means over trials, bands show the range of the values.{dotted}",
                "; ".join(f"eps {level:g}: {_in_words(series, by_arm)}" for level, by_arm in values.items()),
                plots.line_plot(series, points, noises, (label, f"{TASKS[task]} (%)")),
                lines["target"].iloc[0],
            )

    def curves(self, outcomes: Sequence[Outcome]) -> Iterator[Figure]:
        """The training loss of every final trial, also of unfinished ones."""
        finals = [outcome for outcome in outcomes if outcome.trial.stage == FINAL]
        for target in self.study.targets:
            here = [outcome for outcome in finals if outcome.trial.target == target.name]
            for baseline, series in self.families.items():
                curves = [
                    [curve for o in here if o.trial.arm == arm.name and (curve := _loss_curve(o.folder))[0]]
                    for arm in series
                ]
                if any(curves):
                    yield svg_figure(
                        f"training-{target.name}{self._suffix(baseline)}",
                        f"{target.name}: total training loss; a line per trial.",
                        f"total training loss of {target.name} against the iteration",
                        plots.curve_plot(series, curves),
                        target.name,
                    )

    def precision(self, target: str, curves: Mapping[str, np.ndarray]) -> Figure:
        """Precision against recall, in percent, a line for each arm. ``curves``: arm -> (101,) precision."""
        series = [one for one in self.series if one.name in curves]
        recall = (100 * RECALL_THRESHOLDS).tolist()
        return svg_figure(
            f"precision-{target}",
            f"{target}: precision against recall at IoU 0.5, mean over categories; first run of each arm.",
            ", ".join(f"{one.name} AP50 {curves[one.name].mean():.1f}" for one in series),
            plots.curve_plot(
                series,
                [[(recall, curves[one.name].tolist())] for one in series],
                ("recall (%)", "precision (%)"),
            ),
            target,
        )

    def _suffix(self, baseline: str) -> str:
        return f"-{baseline}" if len(self.families) > 1 else ""


def svg_figure(name: str, caption: str, alt: str, svg: bytes, target: str = "") -> Figure:
    return Figure(name, caption, alt, "image/svg+xml", svg, target)


def _difference(name: str, line: Any) -> plots.Difference:
    """Of a line of the scores, or of :class:`Pooled`."""
    ends = (line.low, line.high) if line.over else (None, None)
    return plots.Difference(name, line.verdict, line.change, *ends)


def _by_arm(series: Sequence[plots.Series], lines: pd.DataFrame) -> list[list[float]]:
    """The value of each trial, for each arm."""
    values = dict(zip(lines["arm"], lines["values"], strict=True))
    return [values.get(one.name, []) for one in series]


def _in_words(series: Sequence[plots.Series], values: Sequence[Sequence[float]]) -> str:
    """The mean of each arm, for readers who do not see the plot."""
    pairs = zip(series, values, strict=True)
    return ", ".join(f"{arm.name} {fmean(numbers):.1f}" for arm, numbers in pairs if numbers)


def _loss_curve(folder: Path) -> tuple[list[int], list[float]]:
    """Iterations and total losses in Detectron2's metrics.json. The last of a repeated iteration counts."""
    losses: dict[int, float] = {}
    with suppress(OSError):
        for record in json_lines(folder / "metrics.json"):
            if is_number(record.get("total_loss")) and is_number(record.get("iteration")):
                losses[int(record["iteration"])] = record["total_loss"]
    return sorted(losses), [losses[iteration] for iteration in sorted(losses)]
