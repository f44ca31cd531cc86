import csv
import html.parser
import importlib.util
import json
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import pytest

from rt_detectron.study.measurements import ATTACK, CLEAN, Quantity
from rt_detectron.study.report import study_table, terminal_table, write_report
from rt_detectron.study.run import run_study

COMMAND = "python tools/compare.py --study <x>"


@pytest.fixture(scope="module")
def fake_study():
    path = Path(__file__).with_name("fake_study.py")
    spec = importlib.util.spec_from_file_location("fake_study_for_tests", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def build(fake_study, tiny_datasets, tmp_path, monkeypatch):
    """``build(...)``: a study of three arms and its outcomes, made from the demo set's annotations."""
    monkeypatch.chdir(tmp_path)
    root = tiny_datasets / "demo" / "detection"

    def make(**kwargs):
        return fake_study.build(tmp_path, root / "annotations" / "instances_val.json", root / "val", **kwargs)

    return make


class Page(html.parser.HTMLParser):
    """Collects the tags and the text of a page."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(path.read_text())

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data


def refuse(constant):
    raise AssertionError(f"{constant} is no JSON")


def test_report_is_complete_and_self_contained(build, tmp_path):
    study, outcomes = build()
    study = replace(study, name="A <script>alert(1)</script> study")
    page = Page(write_report(study, outcomes, tmp_path, COMMAND))
    assert study.name in page.text  # as text,
    assert not [
        tag for tag, _ in page.tags if tag in ("script", "link", "iframe", "object", "x")
    ]  # not as tags
    links = [attrs[key] for _, attrs in page.tags for key in ("src", "srcset", "href") if key in attrs]
    assert len(links) > 10
    assert all(link.startswith("data:image/") for link in links)
    assert all(attrs.get("alt") for tag, attrs in page.tags if tag == "img")
    for words in (
        "On clean images",
        "Under attack",
        "Under corruption",
        "learning rate",
        "Student's t",
        COMMAND,
    ):
        assert words in page.text
    assert "missing" not in page.text.lower()

    row = next(r for r in study_table(study, outcomes) if (r.arm, r.detector) == ("robust", "mask_rcnn"))
    ours = [
        o.results["metrics"]["bbox"]["AP"]
        for o in outcomes
        if (o.trial.arm, o.trial.detector, o.trial.stage) == ("robust", "mask_rcnn", "final")
    ]
    assert row.scores[Quantity(CLEAN)].mean == pytest.approx(fmean(ours))
    assert f"{fmean(ours):.2f}" in page.text
    assert f"{fmean(ours):.2f}" in (tmp_path / "tables.md").read_text()
    assert f"{fmean(ours):.2f}" in (tmp_path / "tables.tex").read_text()
    assert row.learning_rate == 0.01  # chosen by the selection
    assert Quantity(ATTACK, condition="l2, all", level=0.5) in row.changes


def test_json_is_strict_and_csv_has_every_number(build, tmp_path):
    study, outcomes = build(seeds=[1, 2], detectors=["mask_rcnn"])
    outcomes[-1].results["metrics"]["bbox"]["AP"] = float("nan")
    write_report(study, outcomes, tmp_path, COMMAND)
    content = json.loads((tmp_path / "results.json").read_text(), parse_constant=refuse)
    assert content["study"]["baseline"] == "standard"
    assert {entry["arm"] for entry in content["table"]} == {"standard", "robust", "robust_small"}
    with (tmp_path / "results.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    final = [
        row for row in rows if row["stage"] == "final" and row["kind"] == "clean" and row["metric"] == "AP"
    ]
    found = {(row["arm"], row["seed"], row["task"]): row["value"] for row in final}
    first = next(outcome for outcome in outcomes if outcome.trial.stage == "final")
    assert float(found[first.trial.arm, str(first.trial.seed), "bbox"]) == pytest.approx(
        first.results["metrics"]["bbox"]["AP"]
    )
    last = outcomes[-1].trial
    assert found[last.arm, str(last.seed), "bbox"] == ""
    assert {row["kind"] for row in rows} >= {"clean", "attack", "noise", "corruption", "mPC", "rPC"}


def test_one_seed_is_judged_by_its_images(build, tmp_path):
    study, outcomes = build(seeds=[1], detectors=["faster_rcnn"])
    page = Page(write_report(study, outcomes, tmp_path, COMMAND))
    assert "resampling the test images" in page.text
    row = next(row for row in study_table(study, outcomes) if row.arm == "robust")
    change = row.changes[Quantity(CLEAN)]
    assert change.interval.low <= change.differences.mean <= change.interval.high
    assert "robust" in terminal_table(study_table(study, outcomes))


def test_one_seed_without_predictions_has_no_interval(build, tmp_path):
    study, outcomes = build(seeds=[1], detectors=["faster_rcnn"])
    for outcome in outcomes:
        for dataset in outcome.results["datasets"]:
            dataset["predictions"] = None
    page = Page(write_report(study, outcomes, tmp_path, COMMAND))
    assert "no interval over the test images" in page.text
    assert "cannot be told from chance" in page.text


def test_unfinished_trials_are_named(build, tmp_path):
    study, outcomes = build(detectors=["faster_rcnn"])
    failed = replace(outcomes[-1], results=None, robustness=None, error="exit status 1: CUDA out of memory")
    bare = [replace(outcome, robustness=None) for outcome in outcomes[:-1]]
    page = Page(write_report(study, [*bare, failed], tmp_path, COMMAND))
    assert failed.trial.name in page.text
    assert "CUDA out of memory" in page.text
    assert COMMAND in page.text


def test_nothing_finished_still_gives_a_report(make_study, tmp_path):
    study = make_study()
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "train_net.py").write_text("raise SystemExit(9)")
    outcomes = run_study(study, Path("out"), broken)
    page = Page(write_report(study, outcomes, Path("out"), COMMAND))
    assert "No arm can be compared with its baseline yet" in page.text
    assert "exit status 9" in page.text
