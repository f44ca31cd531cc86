"""An evaluation is added in one place, and then is in the table, the files, the answers and the report."""

import csv
import re
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from rt_detectron.study import report as report_module
from rt_detectron.study.evaluations import EVALUATIONS, Evaluation, compared
from rt_detectron.study.report import terminal_table, write_report
from rt_detectron.study.statistics import TASKS, Quantity, select
from rt_detectron.study.tables import score_table


class Rotation(Evaluation):
    """AP on rotated images. Its part of robustness.json: angle in degrees -> task -> AP."""

    name, title, question, main_kind = "rotation", "Rotated images", "On rotated images", "rotation: mean"

    def numbers(self, part):
        found = {}
        for angle, by_task in part.items():
            found |= {Quantity("rotation", task, "AP", "", int(angle)): ap for task, ap in by_task.items()}
        for task in part["90"]:
            means = [by_task[task] for by_task in part.values()]
            found[Quantity("rotation: mean", task)] = sum(means) / len(means)
        return found

    def tables(self, scores, task):
        lines = select(scores, kind="rotation", task=task)
        columns = {f"{angle}°": select(lines, level=angle) for angle in (90, 180)}
        return score_table(f"{TASKS[task]} on rotated images", columns)

    def text(self, outcomes):
        return "Images are rotated clockwise."


@pytest.fixture
def report(tmp_path, build_study):
    """A report's comparison and folder, of a study whose trials were also evaluated on rotated images."""
    options = {"detectors": ("faster_rcnn",), "arms": ("standard", "robust"), "rates": (0.02,)}
    study, outcomes = build_study(tmp_path, **options)
    for outcome in outcomes:
        base = (50.0 if outcome.trial.arm == "robust" else 40.0) + outcome.trial.seed
        outcome.robustness["rotation"] = {"90": {"bbox": base}, "180": {"bbox": base - 20}}
    EVALUATIONS.append(Rotation())
    try:
        comparison = compared(study, outcomes)
        write_report(comparison, tmp_path / "out", "command")
        yield comparison, tmp_path / "out"
    finally:
        EVALUATIONS.pop()


def test_a_new_evaluation_is_everywhere(report):
    comparison, folder = report
    rows = list(csv.DictReader((folder / "results.csv").open()))
    values = {
        (row["arm"], row["seed"], row["level"]): row["value"] for row in rows if row["kind"] == "rotation"
    }
    assert values["robust", "2", "180"] == "32.0"
    assert len(values) == 2 * 2 * 2
    scores = list(csv.DictReader((folder / "scores.csv").open()))
    (mean,) = [row for row in scores if (row["kind"], row["arm"]) == ("rotation: mean", "robust")]
    assert (mean["mean"], mean["change"]) == ("41.5", "10.0")
    for name in ("tables.md", "tables.tex"):
        assert "box AP on rotated images" in (folder / name).read_text()
    page = (folder / "report.html").read_text()
    assert "<h3>Rotated images</h3>" in page
    assert "Images are rotated clockwise." in page
    assert "this checkpoint of robust (eps 3) is better than standard by 10.00 box AP [6.96, 13.04]" in page
    assert (folder / "figures" / "answer-rotation-mean.svg").is_file()
    assert "+10.00 [+6.96, +13.04]   better" in terminal_table(comparison.scores)


def test_the_pages_template_names_no_evaluation():
    template = Path(report_module.__file__).with_name("report.html.j2").read_text().lower()
    for evaluation in EVALUATIONS[1:]:
        assert evaluation.name not in template
        assert evaluation.title.lower() not in template


def test_no_module_of_the_study_imports_itself_by_way_of_others():
    room = Path(report_module.__file__).parent
    imports = {
        path.stem: set(
            re.findall(r"^from rt_detectron\.study(?:\.(\w+))? import (\w+)", path.read_text(), re.MULTILINE)
        )
        for path in room.glob("*.py")
    }
    graph = {path: {module or name for module, name in names} for path, names in imports.items()}
    order = list(TopologicalSorter(graph).static_order())  # raises CycleError
    assert order.index("grid") < order.index("tasks") < order.index("load")
