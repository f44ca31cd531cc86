"""Small plots: SVG, drawn for a light or a dark page, and PNG for a light one."""

import io
from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib
from matplotlib.figure import Figure

from rt_detectron.visualization.colors import color_of

_RC = {
    "svg.fonttype": "none",  # text stays text: smaller, sharp, readable aloud
    "svg.hashsalt": "rt_detectron",  # the same input gives the same file
    "font.size": 11,
    "font.family": "sans-serif",
    "axes.spines.top": False,
    "axes.spines.right": False,
}
_INK = {False: "#3a3f47", True: "#c9ced6"}


@dataclass(frozen=True)
class Series:
    """One arm of a plot; ``color_index`` as in :func:`colors.color_of`."""

    name: str
    color_index: int


def dot_plot(
    series: Sequence[Series],
    values: Sequence[Sequence[float]],
    label: str,
    limits: tuple[float, float],
    dark: bool,
) -> bytes:
    """One line per series, the first on top: a dot for each value, a bar at their mean. Gives an SVG."""
    with matplotlib.rc_context(_style(dark)):
        figure = Figure(figsize=(4.6, 0.9 + 0.42 * len(series)), layout="constrained")
        axes = figure.subplots()
        for row, (arm, numbers) in enumerate(zip(series, values, strict=True)):
            color = _hex(arm.color_index)
            axes.plot(
                numbers, [row] * len(numbers), "o", color=color, alpha=0.75, markersize=7, markeredgewidth=0
            )
            if numbers:
                mean = sum(numbers) / len(numbers)
                axes.plot([mean, mean], [row - 0.28, row + 0.28], color=color, linewidth=2.5)
        axes.set_yticks(range(len(series)), [arm.name for arm in series])
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        axes.set_ylim(len(series) - 0.5, -0.5)
        axes.set_xlim(*limits)
        axes.grid(axis="x", alpha=0.2)
        axes.set_xlabel(label)
        return _svg(figure)


def curve_plot(
    series: Sequence[Series], curves: Sequence[Sequence[tuple[Sequence[float], Sequence[float]]]], dark: bool
) -> bytes:
    """Training loss against iterations, one line per run (x values, y values) of a series. Gives an SVG."""
    with matplotlib.rc_context(_style(dark)):
        figure = Figure(figsize=(4.6, 2.8), layout="constrained")
        axes = figure.subplots()
        for arm, runs in zip(series, curves, strict=True):
            for number, (x, y) in enumerate(runs):
                name = arm.name if number == 0 else None
                axes.plot(x, y, color=_hex(arm.color_index), linewidth=1.3, alpha=0.85, label=name)
        axes.grid(alpha=0.2)
        axes.set_xlabel("iteration")
        axes.set_ylabel("total loss")
        axes.set_ylim(bottom=0)
        axes.legend(frameon=False)
        return _svg(figure)


def accuracy_plot(eps: Sequence[float], accuracy: Sequence[float], trained_eps: float, label: str) -> bytes:
    """Accuracy in percent over ``eps`` on a logarithmic axis with 0, ``trained_eps`` marked. Gives a PNG."""
    with matplotlib.rc_context(_style(dark=False)):
        figure = Figure(figsize=(5.2, 3.4), layout="constrained")
        axes = figure.subplots()
        axes.plot(eps, accuracy, "o-", color=_hex(0), linewidth=1.8, markersize=5)
        axes.axvline(trained_eps, color=_INK[False], linewidth=1, linestyle=":")
        axes.annotate(f" eps {trained_eps:g}", (trained_eps, 97))
        axes.set_xscale("symlog", base=2, linthresh=min(e for e in eps if e))
        axes.set_xticks(eps, [f"{e:.3g}" for e in eps])
        axes.set_xlim(left=0)
        axes.set_ylim(0, 103)
        axes.grid(alpha=0.2)
        axes.set_xlabel(label)
        axes.set_ylabel("accuracy, %")
        stream = io.BytesIO()
        figure.savefig(stream, format="png", dpi=150, metadata={"Software": None})
        return stream.getvalue()


def _style(dark: bool) -> dict[str, object]:
    ink = _INK[dark]
    keys = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color", "grid.color")
    return {**_RC, **dict.fromkeys(keys, ink)}


def _hex(index: int) -> str:
    return "#{:02x}{:02x}{:02x}".format(*color_of(index))


def _svg(figure: Figure) -> bytes:
    stream = io.BytesIO()
    for axes in figure.axes:
        axes.set_facecolor("none")
    figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None})
    return stream.getvalue()
