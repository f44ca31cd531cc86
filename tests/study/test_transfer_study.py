"""A study of classification transfer, run by stand-ins: the same machinery as for detectors."""

import csv
import re

import pytest

from rt_detectron.study.evaluations import compared
from rt_detectron.study.report import terminal_table, write_report
from rt_detectron.study.run import run_study
from rt_detectron.study.statistics import select


@pytest.fixture
def finished(make_transfer_study, tools):
    """``finished(...)``: the comparison, and the folder of its report, with the report's text."""

    def run(**options):
        study = make_transfer_study(**options)
        outcomes = run_study(study, tools / "out", tools)
        comparison = compared(study, outcomes)
        page = write_report(comparison, tools / "out", "python tools/compare.py ...").read_text()
        return comparison, tools / "out", page

    return run


def test_accuracies_are_compared_by_seed(finished):
    comparison, folder, page = finished(rates=(0.1, 0.01))
    outcomes = comparison.outcomes
    assert not any(outcome.error for outcome in outcomes)
    assert len(outcomes) == 12  # the selection's eight, and two arms with two seeds each
    rates = {outcome.trial.learning_rate for outcome in outcomes if outcome.trial.stage == "final"}
    assert rates == {0.01}  # the stand-in loses accuracy with the rate
    table = terminal_table(comparison.scores)
    assert re.search(r"\+2.50 \[.[\d.]+, \+[\d.]+\]  undecided", table)
    (line,) = [
        line
        for line in csv.DictReader((folder / "scores.csv").open())
        if (line["arm"], line["metric"]) == ("robust", "accuracy")
    ]
    assert float(line["mean"]) == pytest.approx((63 + 64.5) / 2)
    assert "robust (eps 3) is not significantly different from standard: +2.50 accuracy [" in page
    assert "Accuracy in percent, mean" in page
    assert "<th>arm</th><th>transfer</th>" in page
    assert "chosen by accuracy on" in page
    assert " AP " not in page
    assert "mean per class" in (folder / "tables.md").read_text()
    rows = list(csv.DictReader((folder / "results.csv").open()))
    assert {row["metric"] for row in rows} == {
        "accuracy",
        "top1",
        "mean_per_class",
        "accuracy-cat",
        "accuracy-dog",
    }


def test_a_single_seed_has_its_interval_from_the_images(finished):
    comparison, _, page = finished(seeds=(1,))
    (line,) = select(comparison.scores, arm="robust", metric="accuracy").itertuples()
    assert line.over == "images"
    # 63 against 60.5 of 100 images: two or three of them differ, all to the better.
    assert -0.5 <= line.low < 2.5 < line.high < 8
    assert "With a single run of each arm, intervals only cover the choice of test images" in page


def test_predictions_that_cannot_be_read_are_named(finished, tools):
    comparison, folder, _ = finished(seeds=(1,))
    study, outcomes = comparison.study, comparison.outcomes
    path = next((folder / "trials").rglob("standard/**/predictions.json"))
    path.write_text("{")
    again = compared(study, outcomes)
    (note,) = again.notes
    assert note.startswith("Test images could not be resampled for standard, cifar10 (JSONDecodeError: ")
    (line,) = select(again.scores, arm="robust", metric="accuracy").itertuples()
    assert (line.over, line.verdict) == ("", "undecided")
