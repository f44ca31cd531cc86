"""Small plots: SVG whose text and axes follow the page's light or dark mode, and PNG for light pages."""

import io
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import fmean
from types import MappingProxyType

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from rt_detectron.visualization.colors import GAIN, LOSS, PLOT_PALETTE, css_color

_RC = {
    "svg.fonttype": "none",  # text stays text: smaller, sharp, readable aloud
    "svg.hashsalt": "rt_detectron",  # the same input gives the same file
    "font.size": 11,
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "sans-serif"],  # the whole list would stand at every text
    "axes.spines.top": False,
    "axes.spines.right": False,
}
_INK, _INK_ON_DARK = "#3a3f47", "#c9ced6"
_INK_BY_PAGE = (
    f"<style>svg{{color:{_INK}}}@media(prefers-color-scheme:dark){{svg{{color:{_INK_ON_DARK}}}}}</style>"
)
_LEGEND_LETTERS = 52  # that fit beside each other, with the handles counted as five
_NAMED_DOTS = 8  # names of more would cover each other
_UPRIGHT_TICKS = 7  # so many fit beside each other on a logarithmic axis
_LEVEL_GROUPS = 4  # with more groups side by side, their names are tilted
_VERDICTS = {
    "better": (css_color(GAIN), "^"),
    "worse": (css_color(LOSS), "v"),
    "equivalent": (_INK, "s"),
}
_MARKERS, _LINES = ("o", "s", "D", "^"), ("-", "--", "-.", (0, (5, 1, 1, 1)))


@dataclass(frozen=True)
class Series:
    """One arm of a plot; ``color_index`` chooses its colour of PLOT_PALETTE and its marker."""

    name: str
    color_index: int

    @property
    def style(self) -> dict[str, object]:
        """Colour, marker and line. Neighbours differ in each of them, and 28 arms in some."""
        marker, line = (self.color_index % len(known) for known in (_MARKERS, _LINES))
        return {"color": _hex(self.color_index), "marker": _MARKERS[marker], "linestyle": _LINES[line]}

    @property
    def dots(self) -> dict[str, object]:
        return {**self.style, "linestyle": "", "alpha": 0.7, "markersize": 6, "markeredgewidth": 0}


@dataclass(frozen=True)
class Difference:
    """One line of a :func:`difference_plot`: a value, and the ends of its interval if it has one.

    Attributes:
        verdict: "better" and "worse" have a colour and a triangle, "equivalent" a square; all others a dot.
    """

    name: str
    verdict: str
    value: float
    low: float | None = None
    high: float | None = None


def difference_plot(groups: Mapping[str, Sequence[Difference]], label: str) -> bytes:
    """SVG of differences with their intervals around a line at 0, by group, the first on top.

    Args:
        groups: heading -> lines; the heading of a single group is not written.
        label: of the axis.
    """
    lines: list[str | Difference] = []
    for heading, differences in groups.items():
        lines += [heading] * (len(groups) > 1) + list(differences)
    with _axes(0.75 + 0.3 * len(lines), label) as axes:
        axes.axvline(0, color=_INK, linewidth=1)
        for row, line in enumerate(lines):
            if isinstance(line, str):
                continue
            color, marker = _VERDICTS.get(line.verdict, (_INK, "o"))
            if line.low is not None:
                axes.plot([line.low, line.high], [row, row], color=color, linewidth=2.5)
            fill = "none" if line.low is None else "full"  # an open mark has no interval
            axes.plot(line.value, row, marker, color=color, markersize=8, fillstyle=fill)
        names = [line if isinstance(line, str) else line.name for line in lines]
        _rows_on(axes, names)
        for text, line in zip(axes.get_yticklabels(), lines, strict=True):
            text.set_fontweight("bold" if isinstance(line, str) else "normal")
        axes.margins(x=0.08)
        return _svg(axes.figure)


def heat_map(
    rows: Sequence[str],
    columns: Sequence[str],
    cells: Mapping[tuple[str, str], tuple[float, str]],
    label: str,
) -> bytes:
    """Differences as a table of coloured cells, for more of them than a plot has room. Gives an SVG.

    Args:
        cells: (row, column) -> (value, verdict); a triangle beside the number marks better and worse.
        label: what the numbers are.
    """
    values = [abs(value) for value, _ in cells.values()] or [1.0]
    limit = max(*values, 1e-9)
    marks = {"better": "\u25b2", "worse": "\u25bc", "equivalent": "="}
    with _axes(1.1 + 0.24 * len(rows), label) as axes:
        for y, row in enumerate(rows):
            for x, column in enumerate(columns):
                if (row, column) not in cells:
                    continue
                value, verdict = cells[row, column]
                color = css_color(GAIN if value > 0 else LOSS)
                shade = 0.45 * abs(value) / limit
                axes.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, facecolor=color, alpha=shade, linewidth=0))
                text = f"{value:+.1f}".replace("-", "\N{MINUS SIGN}") + f" {marks.get(verdict, '')}"
                axes.text(x, y, text.rstrip(), ha="center", va="center", fontsize=9, color=_INK)
        axes.set_xlim(-0.5, len(columns) - 0.5)
        _rows_on(axes, rows)
        axes.grid(visible=False)
        axes.set_xticks(range(len(columns)), columns, rotation=0 if len(columns) < 4 else 30, ha="center")
        axes.tick_params(length=0, labelsize=9, top=True, bottom=False, labeltop=True, labelbottom=False)
        axes.spines["bottom"].set_visible(False)
        return _svg(axes.figure)


def scatter_plot(
    dots: Sequence[tuple[Series, float, float]],
    labels: tuple[str, str],
    lines: Mapping[str, Sequence[tuple[float, float]]] = MappingProxyType({}),
) -> bytes:
    """A dot (x, y) per series, named beside it where there is room, else in a legend. Gives an SVG.

    Args:
        labels: of the axes.
        lines: straight lines: name -> its ends.
    """
    with _axes(3.2, *labels) as axes:
        for (name, ends), line in zip(lines.items(), itertools.cycle(_LINES), strict=False):
            axes.plot(*zip(*ends, strict=True), color=_INK, ls=line, lw=1.2, alpha=0.6, label=name)
        has_room = len(dots) <= _NAMED_DOTS
        for series, x, y in dots:
            style = {**series.dots, "alpha": 1, "markersize": 8, "label": None if has_room else series.name}
            axes.plot([x], [y], **style, zorder=3)
            if has_room:
                axes.annotate(series.name, (x, y), xytext=(6, 4), textcoords="offset points", fontsize=8)
        axes.grid(alpha=0.2)
        axes.margins(x=0.15, y=0.15)
        _legend(axes)
        return _svg(axes.figure)


def dot_plot(
    series: Sequence[Series],
    values: Sequence[Sequence[float]],
    label: str,
) -> bytes:
    """SVG with one row per series, the first on top: a dot for each value, a bar at their mean."""
    with _axes(0.75 + 0.36 * len(series), label) as axes:
        for row, (arm, numbers) in enumerate(zip(series, values, strict=True)):
            axes.plot(numbers, [row] * len(numbers), **arm.dots)
            if numbers:
                axes.plot([fmean(numbers)] * 2, [row - 0.28, row + 0.28], color=_hex(arm.color_index), lw=2.5)
        _rows_on(axes, [arm.name for arm in series])
        axes.set_xlim(*_limits([value for numbers in values for value in numbers]))
        return _svg(axes.figure)


def group_plot(
    series: Sequence[Series],
    groups: Sequence[str],
    values: Sequence[Sequence[Sequence[float]]],
    label: str,
) -> bytes:
    """SVG of groups side by side: in each, a column of dots per series with a bar at their mean.

    Args:
        values: by series, then group, the numbers to show; there may be none.
    """
    with _axes(2.7, y=label) as axes:
        width = 0.8 / len(series)
        for number, (arm, of_arm) in enumerate(zip(series, values, strict=True)):
            name: str | None = arm.name
            for group, numbers in enumerate(of_arm):
                x = group + (number - (len(series) - 1) / 2) * width
                axes.plot([x] * len(numbers), numbers, **arm.dots, label=name if numbers else None)
                if numbers:
                    name = None  # one legend entry is enough
                    ends = [x - 0.4 * width, x + 0.4 * width]
                    axes.plot(ends, [fmean(numbers)] * 2, color=_hex(arm.color_index), lw=2.5)
        tilt = {"rotation": 25, "ha": "right"} if len(groups) > _LEVEL_GROUPS else {}
        axes.set_xticks(range(len(groups)), groups, **tilt)
        axes.tick_params(axis="x", length=0)
        axes.grid(axis="y", alpha=0.2)
        axes.set_ylim(bottom=0)
        _legend(axes)
        return _svg(axes.figure)


def line_plot(
    series: Sequence[Series],
    points: Sequence[Mapping[float, Sequence[float]]],
    dotted: Sequence[Mapping[float, float]],
    labels: tuple[str, str],
) -> bytes:
    """SVG with a line per series through the means at each x, in a band from smallest to largest value.

    Args:
        points: by series, x -> the values there.
        dotted: by series, x -> one value: a second, thin line.
        labels: of the axes.
    """
    with _axes(2.7, *labels) as axes:
        for arm, at, thin in zip(series, points, dotted, strict=True):
            x = sorted(at)
            axes.plot(x, [fmean(at[v]) for v in x], **arm.style, markersize=5, label=arm.name if x else None)
            ends = [min(at[v]) for v in x], [max(at[v]) for v in x]
            axes.fill_between(x, *ends, color=_hex(arm.color_index), alpha=0.18, linewidth=0)
            axes.plot(sorted(thin), [thin[v] for v in sorted(thin)], ":", color=_hex(arm.color_index), lw=1.2)
        axes.grid(alpha=0.2)
        axes.set_ylim(bottom=0)
        ticks = sorted({x for at in points for x in at})
        axes.set_xticks(ticks, [f"{x:g}" for x in ticks])
        _legend(axes)
        return _svg(axes.figure)


def radius_plot(
    families: Mapping[str, Sequence[tuple[Series, float, Sequence[float]]]],
    labels: tuple[str, str],
) -> bytes:
    """SVG of values against the eps that a series was trained with, joined by a line per family.

    The eps axis is logarithmic above 0. With several families, a line has the colour of its first series.

    Args:
        families: name -> (series, eps, values); the name of a single family is not written.
        labels: of the axes.
    """
    with _axes(2.7, *labels) as axes:
        every = sorted({eps for members in families.values() for _, eps, _ in members})
        for (name, members), line in zip(families.items(), itertools.cycle(_LINES), strict=False):
            means = sorted((eps, fmean(values)) for _, eps, values in members if values)
            color = _INK if len(families) == 1 else members[0][0].style["color"]
            axes.plot(*zip(*means, strict=True), color=color, ls=line, lw=1.2, alpha=0.6, label=name)
            for series, eps, values in members:
                axes.plot([eps] * len(values), values, **series.dots, zorder=3)
        if positive := [eps for eps in every if eps > 0]:
            axes.set_xscale("symlog", base=2, linthresh=min(positive))
            rotation = 0 if len(every) <= _UPRIGHT_TICKS else 90
            axes.set_xticks(every, [f"{eps:g}" for eps in every], rotation=rotation)
            axes.minorticks_off()
        axes.grid(alpha=0.2)
        axes.margins(x=0.06, y=0.12)
        if len(families) > 1:
            _legend(axes)
        return _svg(axes.figure)


def curve_plot(
    series: Sequence[Series],
    curves: Sequence[Sequence[tuple[Sequence[float], Sequence[float]]]],
    labels: tuple[str, str] = ("iteration", "total loss"),
) -> bytes:
    """One line per run (x values, y values) of a series, by default its training loss. Gives an SVG."""
    with _axes(2.7, *labels) as axes:
        for arm, runs in zip(series, curves, strict=True):
            for number, (x, y) in enumerate(runs):
                style = {**arm.style, "marker": "", "label": arm.name if number == 0 else None}
                axes.plot(x, y, **style, linewidth=1.2, alpha=0.8)
        axes.grid(alpha=0.2)
        axes.set_ylim(bottom=0)
        _legend(axes)
        return _svg(axes.figure)


def accuracy_plot(eps: Sequence[float], accuracy: Sequence[float], trained_eps: float, label: str) -> bytes:
    """PNG of accuracy in percent against ``eps``, on a logarithmic axis with 0; ``trained_eps`` is marked."""
    with _axes(3.4, label, "accuracy, %", width=5.2) as axes:
        axes.plot(eps, accuracy, "o-", color=_hex(0), linewidth=1.8, markersize=5)
        axes.axvline(trained_eps, color=_INK, linewidth=1, linestyle=":")
        axes.annotate(f" eps {trained_eps:g}", (trained_eps, 97))
        axes.set_xscale("symlog", base=2, linthresh=min(e for e in eps if e))
        axes.set_xticks(eps, [f"{e:.3g}" for e in eps])
        axes.set_xlim(left=0)
        axes.set_ylim(0, 103)
        axes.grid(alpha=0.2)
        stream = io.BytesIO()
        axes.figure.savefig(stream, format="png", dpi=150, metadata={"Software": None})
        return stream.getvalue()


@contextmanager
def _axes(height: float, x: str = "", y: str = "", width: float = 4.6) -> Iterator[Axes]:
    """Labelled axes of a figure, by default as wide as a phone shows it readably; sizes in inches."""
    keys = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color", "grid.color")
    with matplotlib.rc_context({**_RC, **dict.fromkeys(keys, _INK)}):
        axes = Figure(figsize=(width, height), layout="constrained").subplots()
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        yield axes


def _rows_on(axes: Axes, names: Sequence[str]) -> None:
    """Make the y axis a list of names, the first on top."""
    axes.set_yticks(range(len(names)), names)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.grid(axis="x", alpha=0.2)


def _limits(values: Sequence[float]) -> tuple[float, float]:
    """Limits of an axis: all values with some margin, at least two points of AP."""
    low, high = min(values), max(values)
    margin = max(0.12 * (high - low), 1.0)
    return max(low - margin, 0.0) - 0.02 * margin, high + margin


def _legend(axes: Axes) -> None:
    """A legend above the axes; the figure is made taller for it."""
    figure = axes.figure
    handles, names = axes.get_legend_handles_labels()
    if not handles:
        return
    columns = min(max(1, _LEGEND_LETTERS // (max(map(len, names)) + 5)), 4, len(names))
    figure.set_figheight(figure.get_figheight() + 0.21 * math.ceil(len(names) / columns))
    figure.legend(handles, names, loc="outside upper center", ncols=columns, frameon=False, handlelength=1.4)


def _hex(index: int) -> str:
    return css_color(PLOT_PALETTE[index % len(PLOT_PALETTE)])


def _svg(figure: Figure) -> bytes:
    stream = io.BytesIO()
    for axes in figure.axes:
        axes.set_facecolor("none")
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(stream, format="svg", transparent=True, metadata=nothing)
    svg = stream.getvalue().replace(_INK.encode(), b"currentColor")
    return svg.replace(b"<defs>", b"<defs>\n  " + _INK_BY_PAGE.encode(), 1)
