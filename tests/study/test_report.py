import csv
import html.parser
import json
import re
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from statistics import fmean

import numpy as np
import pytest

from rt_detectron.study.answers import answers
from rt_detectron.study.error_types import ERROR_TYPES
from rt_detectron.study.evaluations import compared
from rt_detectron.study.figures import Charts
from rt_detectron.study.load import load_study
from rt_detectron.study.report import write_report
from rt_detectron.study.statistics import Quantity, compare

COMMAND = "python tools/compare.py --study <x>"
SMALL = {"detectors": ("faster_rcnn",), "arms": ("standard", "robust"), "rates": (0.02,)}


def plain(text):
    return text.replace("\N{MINUS SIGN}", "-").replace("\N{NO-BREAK SPACE}", " ")


class Page(html.parser.HTMLParser):
    """Collects the tags and the text of a page, and the figures with what is in each."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text, self.figures = [], "", []
        self.feed(plain(text))

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "figure":
            self.figures.append({"text": "", "images": []})
        if tag == "img":
            self.figures[-1]["images"].append(dict(attrs))

    def handle_data(self, data):
        self.text += data
        if self.figures:
            self.figures[-1]["text"] += data


@pytest.fixture
def report(tmp_path, build_study):
    """``report(change, seeds=...)``: the page of a small study whose outcomes ``change`` has gone over."""

    def report(change=list, **options):
        study, outcomes = build_study(tmp_path, **SMALL | options)
        outcomes = change(outcomes)
        page = write_report(compared(study, outcomes), tmp_path / "out", COMMAND)
        return Page(page.read_text())

    return report


@pytest.fixture(scope="module")
def page(whole_report):
    return Page(whole_report.page.read_text())


def test_page_is_self_contained(page):
    assert "A <script>alert(1)</script> study" in page.text  # as text,
    assert not {tag for tag, _ in page.tags} & {"script", "link", "iframe", "object"}  # not as tags
    links = [attrs[key] for _, attrs in page.tags for key in ("src", "srcset", "href") if key in attrs]
    assert all(link.startswith(("data:image/", "#")) for link in links)
    anchors = {attrs["id"] for _, attrs in page.tags if "id" in attrs}
    assert {link[1:] for link in links if link.startswith("#")} <= anchors
    assert "#target-2" in links


def test_answers_come_first_with_their_verdicts(page):
    top = page.text[: page.text.index("Clean images")]
    first = page.text[: page.text.index("Contents")]
    for question in ("On clean images", "Under attack", "Under corruption"):
        assert re.search(question + r"\s+(Better|Worse|Undecided|Mixed)\s", top), question
    subject = "the checkpoint that is best on held-out images (robust_small)"
    assert f"Mean of 2 targets on 1 data set: {subject}" in first
    assert "Every arm is one checkpoint: the answers are about these checkpoints" in first
    assert re.search(r"4 comparisons of an arm with its baseline on a target: \d (better|worse)", top)
    assert "Those of all arms against one baseline hold together (Dunnett)." in top
    assert "the choice of test images (under attack, under corruption)" in top
    assert "With 2 runs an interval is wide" in top


def test_every_figure_has_words_and_its_command_and_is_a_file(page, whole_report):
    kinds = (
        "answer",
        "clean",
        "clean-attack",
        "sizes",
        "categories",
        "errors",
        "attack",
        "attacked",
        "loses",
        "training",
    )
    files = {path.name for path in (whole_report.folder / "figures").iterdir()}
    for kind in kinds:
        assert any(name.startswith(f"{kind}-") for name in files), kind
    assert len(page.figures) == len(files)
    for figure in page.figures:
        (image,) = figure["images"]
        assert image["alt"]
        assert COMMAND in figure["text"]
        assert re.search(r"figures/(\S+)", figure["text"])[1] in files


def test_numbers_are_the_same_in_all_files(page, whole_report):
    outcomes = [o for o in whole_report.outcomes if o.trial.stage == "final"]
    values = {
        (arm, seed): outcome.results["metrics"]["segm"]["AP"]
        for arm in ("standard", "robust")
        for seed in (1, 2)
        for outcome in outcomes
        if (outcome.trial.arm, outcome.trial.target, outcome.trial.seed) == (arm, "mask_rcnn", seed)
    }
    mean = fmean(values["robust", seed] for seed in (1, 2))
    change = fmean(values["robust", seed] - values["standard", seed] for seed in (1, 2))
    shown = f"{change:+.2f} ["
    markdown, latex = (plain((whole_report.folder / f"tables.{kind}").read_text()) for kind in ("md", "tex"))
    for text in (page.text, markdown):
        assert f"{mean:.2f} ± " in text
        assert shown in text
    assert f"{mean:.2f} $\\pm$ " in latex
    assert r"mask\_rcnn" in latex
    assert latex.count(r"\begin{tabular}") == sum(
        markdown.count(f"**{x}") for x in ("Box", "Mask", "Best eps")
    )

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    json.loads((whole_report.folder / "results.json").read_text(), parse_constant=refuse)
    with (whole_report.folder / "scores.csv").open(newline="") as stream:
        (line,) = [
            line
            for line in csv.DictReader(stream)
            if (line["arm"], line["kind"], line["task"], line["metric"]) == ("robust", "clean", "segm", "AP")
        ]
    assert float(line["mean"]) == pytest.approx(mean)
    assert float(line["change"]) == pytest.approx(change)
    assert line["over"] == "seeds and images"
    assert line["main"] == "False"  # box AP is the main one
    assert line["learning_rate"] == "0.01"


def test_every_run_and_what_it_cost_are_shown(page, whole_report):
    outcome = next(o for o in whole_report.outcomes if o.trial.name == "robust/faster_rcnn/lr0.01/seed2")
    assert f"{outcome.results['metrics']['bbox']['AP']:.2f}" in page.text[page.text.index("Every run") :]
    # Twelve trials of the selection, which say no time, and four of 12.5 s.
    assert re.search(
        r"robust160\.01robust_small", page.text[page.text.index("finished trials, one at a time") :]
    )


def test_what_is_about_one_target_is_folded(page, whole_report):
    text = whole_report.page.read_text()
    for number in (1, 2):
        assert f'<details class="target" id="target-{number}">' in text
    first = text[: text.index('<details class="target"')]
    assert first.count("<img") == 3 + 4  # an answer's picture each, and clean against changed images


def test_many_arms_are_a_heat_map(make_table, write_study):
    names = ["standard", *(f"l2_{number}" for number in range(20))]
    arms = {name: {"weights": "std.pkl"} for name in names}
    detectors = {name: {"config": "mask.yaml"} for name in ("mask", "retina")}
    study = load_study(write_study(arms=arms, detectors=detectors, learning_rates=[0.02]))
    draw = np.random.default_rng(0)
    ap = Quantity("clean", "bbox")
    values = {
        (target, arm): {ap: dict(enumerate(draw.normal(30 + 9 * (arm == "l2_7"), 1, 3)))}
        for target in detectors
        for arm in names
    }
    comparison = compare(study, [], make_table(values))
    (answer,) = answers(comparison, [])
    figure = Charts(study, comparison.scores).differences("x", "", "box AP", answer.lines, answer.pooled)
    text = "".join(ElementTree.fromstring(figure.content).itertext())
    assert text.count("\u25b2") == 3  # on both targets and over all
    assert {"l2_7", "all targets", "retina"} <= set(re.split(r"\s{2,}|\n", text))


def test_csv_has_a_line_per_trial_and_number(whole_report):
    with (whole_report.folder / "results.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert {row["stage"] for row in rows} == {"selection", "final"}
    outcome = next(o for o in whole_report.outcomes if o.trial.name == "robust/faster_rcnn/lr0.01/seed2")
    attack = outcome.robustness["attack"][1]
    (row,) = [
        row
        for row in rows
        if (row["arm"], row["target"], row["seed"]) == ("robust", "faster_rcnn", "2")
        and (row["kind"], row["metric"], row["condition"], row["level"])
        == ("attack", "AP50", "l2, all", "1.0")
    ]
    assert float(row["value"]) == attack["metrics"]["bbox"]["AP50"]
    assert (row["stage"], row["task"], row["learning_rate"]) == ("final", "bbox", "0.01")


def test_types_of_error_are_in_the_table_and_on_the_page(page, whole_report):
    with (whole_report.folder / "results.csv").open(newline="") as stream:
        rows = [row for row in csv.DictReader(stream) if row["kind"] == "error"]
    assert {row["metric"] for row in rows} == set(ERROR_TYPES)
    assert len(rows) == len(ERROR_TYPES) * sum(o.trial.stage == "final" for o in whole_report.outcomes)
    assert "Box AP50 that mending each type of error would gain" in page.text


def test_chosen_learning_rates_and_borders_are_shown(page):
    assert "The best learning rate is at the border of the grid" in page.text
    assert "for robust (mask_rcnn), robust (faster_rcnn):" in page.text
    assert re.search(r"robust\s*mask_rcnn\s*20.00\s*15.00\s*15.00\s*0.01\s*border of the grid", page.text)


def test_single_seed_takes_its_interval_from_the_images(report):
    page = report(seeds=[3])
    assert re.search(
        r"this checkpoint of robust \(eps 3\) is worse than standard by \d+\.\d\d box AP \[", page.text
    )
    assert "intervals only cover the choice of test images: another seed may change" in page.text


def test_single_seed_without_predictions_is_undecided(report):
    def lose(outcomes):
        (outcomes[1].folder / "predictions.json").unlink()
        return outcomes

    page = report(lose, seeds=[3])
    assert re.search(r"differs from standard by -\d+\.\d\d box AP, perhaps by chance: there is no", page.text)
    assert "could not be resampled for robust, faster_rcnn (FileNotFoundError" in page.text
    assert "A difference without an interval may be due to chance" in page.text
    assert "robust, faster_rcnn: no pictures (FileNotFoundError" in page.text


def test_predictions_of_another_evaluation_are_noticed(report):
    def swap(outcomes):
        (outcomes[1].folder / "predictions.json").write_text("[]")
        return outcomes

    assert re.search(r"has a box AP of 0.00, not \d+\.\d\d", report(swap, seeds=[3]).text)


def test_missing_trials_are_named(report):
    def crash(outcomes):
        lost = replace(outcomes[1], results=None, robustness=None, error="RuntimeError: CUDA out of memory")
        return [outcomes[0], lost, *outcomes[2:]]

    page = report(crash)
    assert "Missing trials: 1 of 4" in page.text
    assert "robust/faster_rcnn/lr0.02/seed1" in page.text
    assert "RuntimeError: CUDA out of memory" in page.text
    assert "With 1 run an interval is wide" in page.text


def test_a_failed_evaluation_leaves_the_clean_numbers(report):
    def crash(outcomes):
        return [replace(outcome, robustness=None, error="no attack today") for outcome in outcomes]

    page = report(crash)
    assert "Missing trials: 4 of 4" in page.text
    assert "On clean images" in page.text
    assert "Under attack" not in page.text


def test_nothing_finished_still_gives_a_report(report):
    page = report(lambda outcomes: [replace(o, results=None, robustness=None, error="x") for o in outcomes])
    assert "Missing trials: 4 of 4" in page.text
    assert "No arm can be compared with its baseline yet" in page.text


def test_final_trials_may_wait_for_the_selection(report):
    page = report(lambda outcomes: [o for o in outcomes if o.trial.stage == "selection"], rates=(0.01, 0.02))
    assert "Missing trials: 4 of 12" in page.text
    assert "Not run yet: 4 trials; final trials wait for the learning rates" in page.text
    assert "Learning rates" in page.text


def test_a_detector_that_finds_nothing_has_an_ap_of_zero(report, tmp_path):
    def undefine(outcomes):
        outcomes[1].results["metrics"]["bbox"]["AP"] = None
        return outcomes

    page = report(undefine)
    assert "undefined" not in page.text
    rows = list(csv.DictReader((tmp_path / "out" / "results.csv").open()))
    (row,) = [
        r for r in rows if (r["arm"], r["seed"], r["kind"], r["metric"]) == ("robust", "1", "clean", "AP")
    ]
    assert row["value"] == "0.0"


def test_a_selection_trial_enters_no_mean_and_no_warning(report):
    def undefine(outcomes):
        for outcome in outcomes:
            if outcome.trial.stage == "selection" and outcome.trial.learning_rate == 0.02:
                outcome.results["metrics"]["bbox"]["AP"] = None
        return outcomes

    assert "undefined" not in report(undefine, rates=(0.01, 0.02)).text


def test_loss_curve_is_plotted_from_whole_lines_only(report):
    def shorten(outcomes):
        for outcome in outcomes:
            (outcome.folder / "metrics.json").write_text(
                '{"iteration": 1, "lr": 2}\n{"iteration": 2, "total_l'
            )
        return outcomes

    assert "total training loss" not in report(shorten).text
