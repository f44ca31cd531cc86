import io
import re
import xml.etree.ElementTree as ElementTree

import pytest

from rt_detectron.visualization import plots
from rt_detectron.visualization.colors import GAIN, LOSS, PLOT_PALETTE, contrast
from rt_detectron.visualization.plots import Difference, Series

A, B = Series("standard", 0), Series("robust", 1)
LABELS = ("eps", "box AP (%)")


def svg_text(svg):
    return "".join(ElementTree.parse(io.BytesIO(svg)).getroot().itertext())


def dots(svg, color):
    return len(re.findall(rb"<use [^>]*fill: " + color.encode(), svg))


def lines_of(svg, color):
    """The x coordinates of each drawn path of a colour."""
    paths = re.findall(rb'<path d="([^"]*)"[^>]*style="[^"]*stroke: ' + color.encode(), svg)
    return [[float(x) for x in re.findall(rb"[ML] ([\d.]+)", path)] for path in paths]


PLOTS = {
    "difference": lambda: plots.difference_plot(
        {"mask": [Difference("robust", "better", 1.0, 0.0, 2.0)]}, "AP"
    ),
    "heat": lambda: plots.heat_map(["a", "b"], ["x"], {("a", "x"): (1.0, "better")}, "AP"),
    "scatter": lambda: plots.scatter_plot([(A, 20.0, 3.0), (B, 19.0, 8.0)], LABELS),
    "dot": lambda: plots.dot_plot([A, B], [[20.0], [21.0]], "box AP"),
    "group": lambda: plots.group_plot([A, B], ["small", "large"], [[[1.0], [2.0]], [[3.0], []]], "AP"),
    "line": lambda: plots.line_plot([A], [{0: [3.0], 1: [1.0, 2.0]}], [{0: 3.0, 1: 2.5}], LABELS),
    "radius": lambda: plots.radius_plot({"family": [(A, 0, [3.0]), (B, 3, [1.0])]}, LABELS),
    "fit": lambda: plots.scatter_plot(
        [(A, 70.0, 50.0), (B, 60.0, 55.0)], LABELS, {"at eps 0": [(60, 1), (70, 2)]}
    ),
    "curve": lambda: plots.curve_plot([A, B], [[([1, 2], [3.0, 2.0])], []]),
}


@pytest.mark.parametrize("name", PLOTS)
def test_plots_are_reproducible_and_follow_the_page_to_dark(name):
    svg = PLOTS[name]()
    assert svg == PLOTS[name]()
    assert svg_text(svg)
    assert svg.count(b"#3a3f47") == svg.count(b"#c9ced6") == 1  # the style alone says what the ink is
    assert svg.count(b"currentColor") >= 5
    assert svg.index(b"prefers-color-scheme:dark") < svg.index(b"currentColor")


def test_dot_plot_has_a_dot_per_value():
    series = [A, B, Series("not_run", 2)]
    one = plots.dot_plot(series, [[20.0], [21.0], []], "box AP")
    three = plots.dot_plot(series, [[20.0, 22.0], [21.0, 23.0], []], "box AP")
    assert [dots(one, color) for color in ("#0072b2", "#b07600", "#009e73")] == [1, 1, 0]
    assert [dots(three, color) for color in ("#0072b2", "#b07600", "#009e73")] == [2, 2, 0]
    for text in ("standard", "robust", "not_run", "box AP"):
        assert text in svg_text(one)


def test_difference_plot_draws_the_interval_and_zero():
    svg = plots.difference_plot({"": [Difference("robust", "worse", 1.0, -1.0, 2.0)]}, "AP")
    (low, high), *_ = lines_of(svg, "#d55e00")
    ((zero, _),) = lines_of(svg, "currentColor; stroke-linecap")  # no line of the grid, which is transparent
    assert (zero - low) / (high - low) == pytest.approx(1 / 3, abs=1e-3)  # from -1 to 2


def test_headings_are_written_where_there_are_several():
    groups = {"mask": [Difference("a", "", 1.0)], "retina": [Difference("a", "", 1.0)]}
    assert "retina" in svg_text(plots.difference_plot(groups, "AP"))
    assert "mask" not in svg_text(plots.difference_plot({"mask": groups["mask"]}, "AP"))


def test_radius_plot_joins_means_within_a_family_only():
    families = {
        "narrow": [(A, 0, [10.0, 12.0]), (B, 3, [8.0])],
        "wide": [(Series("c", 2), 0, [20.0]), (Series("d", 3), 0.5, [19.0]), (Series("e", 4), 3, [17.0])],
    }
    svg = plots.radius_plot(families, LABELS)
    narrow, wide = (lines_of(svg, color)[0] for color in ("#0072b2", "#009e73"))  # the legend comes after
    assert (len(narrow), len(wide)) == (2, 3)
    assert (narrow[0], narrow[-1]) == (wide[0], wide[-1])  # eps 0 and 3
    assert {"narrow", "wide"} <= set(svg_text(svg).split())
    assert "0.5" in svg_text(svg)


def test_arms_beyond_the_palette_look_different():
    first, again = Series("a", 0), Series("b", len(PLOT_PALETTE))
    assert first.style["color"] == again.style["color"]
    assert first.style["marker"] != again.style["marker"]
    assert first.style["linestyle"] != again.style["linestyle"]
    assert len({tuple(map(str, Series("", index).style.values())) for index in range(28)}) == 28


@pytest.mark.parametrize("color", [*PLOT_PALETTE, GAIN, LOSS])
def test_colors_are_seen_on_a_white_and_on_a_dark_page(color):
    assert contrast(color, (255, 255, 255)) >= 3
    assert contrast(color, (20, 23, 27)) >= 3


def test_verdicts_are_not_told_by_colour_alone():
    shapes = {
        verdict: re.findall(rb'<path id="m[^"]*" d="([^"]*)"', plots.difference_plot(
            {"": [Difference("a", verdict, 1.0, 0.5, 1.5)]}, "AP"))[-1]
        for verdict in ("better", "worse", "equivalent", "undecided")
    }  # fmt: skip
    assert len(set(shapes.values())) == 4


def test_a_long_legend_makes_the_figure_higher():
    def height(count):
        series = [Series(f"wide_resnet50_2_l2_eps{index}", index) for index in range(count)]
        svg = plots.curve_plot(series, [[([1, 2], [3.0, 2.0])]] * count)
        return float(re.search(rb'height="([\d.]+)pt"', svg)[1])

    assert height(10) > height(2) + 50
