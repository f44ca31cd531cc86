import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from rt_detectron.evaluation.coco import evaluate_detections, write_evaluations
from rt_detectron.study.answers import answers
from rt_detectron.study.evaluations import (
    Attack,
    Clean,
    Corruption,
    Natural,
    attack_name,
    compared,
    tidy_table,
)
from rt_detectron.study.figures import Charts
from rt_detectron.study.grid import Trial
from rt_detectron.study.record import Outcome
from rt_detectron.study.statistics import QUANTITY, Quantity, select
from rt_detectron.visualization.coco import load_coco, load_detections

TRIAL = Trial("a", "t", 0.01, 1, "final", "c.yaml", "", "w.pkl", None, (), ())


def attack(eps, ap, noise=None):
    return {
        "norm": "l2",
        "eps": eps,
        "loss": "all",
        "metrics": {"bbox": {"AP": ap}},
        "clean": {"bbox": {"AP": 40.0}},
        "noise": noise,
    }


def outcome(metrics, **robustness):
    return Outcome(TRIAL, Path("x"), {"metrics": metrics}, robustness)


def measurements(outcome):
    """Quantity -> value, of one trial's lines of the tidy table."""
    table = tidy_table([outcome])
    quantities = [Quantity(*line) for line in table[QUANTITY].itertuples(index=False)]
    return dict(zip(quantities, table["value"], strict=True))


def test_of_several_objectives_the_worst_case_is_the_answer():
    attacks = [
        {**attack(eps, ap), "loss": loss}
        for eps, left in ((1, (20.0, 16.0, 14.0)), (2, (10.0, 8.0, 4.0)))
        for loss, ap in zip(("A_cls", "A_reg", "worst"), left, strict=True)
    ]
    found = measurements(outcome({"bbox": {"AP": 40.0}}, attack=attacks))
    assert found[Quantity("attack: mean", "bbox", "AP")] == (14 + 4) / 2
    assert found[Quantity("attack", "bbox", "AP", "l2, A_cls", 2)] == 10


def test_natural_shifts():
    """As TEST.NATURAL leaves it in robustness.json."""
    results = [
        {"dataset": f"coco_o_{domain}", "requested": True, "metrics": {"bbox": {"AP": ap}}}
        for domain, ap in (("sketch", 10.0), ("tattoo", 20.0))
    ]
    results.append({**results[0], "dataset": "other", "requested": False})
    part = {"results": results, "mean": 15.0, "effective_robustness": None}
    found = measurements(outcome({"bbox": {"AP": 40.0}}, natural=part))
    assert found[Quantity("natural: mean", "bbox")] == 15
    assert found[Quantity("natural", "bbox", "AP", "coco_o_tattoo")] == 20
    assert not any(each.condition == "other" or each.kind == "effective robustness" for each in found)
    found = measurements(outcome({"bbox": {"AP": 40.0}}, natural={**part, "effective_robustness": -3.0}))
    assert found[Quantity("effective robustness", "bbox")] == -3
    assert not Natural().part(outcome({"bbox": {"AP": 40.0}}, natural=None))


def test_an_answer_counts_the_images_that_its_evaluation_saw():
    shifted = [{"dataset": name, "requested": True, "images": 30, "metrics": {}} for name in ("a", "b")]
    tried = Outcome(
        TRIAL,
        Path("x"),
        {"metrics": {"bbox": {"AP": 40.0}}, "datasets": [{"name": "val", "images": 210}]},
        {
            "attack": [{**attack(1.0, 9.0), "images": 50}, {**attack(2.0, 7.0), "images": 50}],
            "corruption": {"images": 100, "results": [{"name": "fog"}]},
            "natural": {"results": shifted},
        },
    )
    counts = [evaluation.images(tried) for evaluation in (Clean(), Attack(), Corruption(), Natural())]
    assert counts == [210, 50, 100, 60]
    assert Attack().images(outcome({"bbox": {"AP": 40.0}})) == 0


def test_a_published_protocol_is_named_and_answers_by_its_worst_case():
    """As TEST.ATTACK.PROTOCOL oddefense leaves it in robustness.json."""
    weak = {"check": "noise", "level": "error", "text": "AP 16.0, 12.0 under noise"}
    attacks = [
        {**attack(4.0, ap), "norm": "linf", "loss": loss, "protocol": "oddefense", "checks": checks}
        | {"steps": 10, "restarts": 1, "images": 80}
        for loss, ap, checks in (
            ("A_cls", 20.0, []), ("A_reg", 30.0, []), ("A_cwa", 18.0, []), ("worst", 16.0, [weak]),
        )
    ]  # fmt: skip
    one = outcome({"bbox": {"AP": 40.0}}, attack=attacks)
    found, evaluation = measurements(one), Attack()
    assert found[Quantity("attack: mean", "bbox")] == 16
    assert found[Quantity("attack", "bbox", "AP", "linf, A_cwa, oddefense", 4)] == 18
    assert evaluation.measure(tidy_table([one]), "bbox") == "box AP under the worst oddefense attack"
    assert evaluation.text([one]).endswith("All is as in the protocol of oddefense.")
    assert evaluation.notes(one) == {
        "a, t: the worst oddefense Linf attack on each image at eps 4 may be too weak (check: noise), so the "
        "detector may be less robust than this AP says": "AP 16.0, 12.0 under noise"
    }
    assert attack_name("l2, all, ares") == "ares L2 attack"
    assert attack_name("linf, A_cls") == "Linf attack on A_cls"


def test_beside_published_protocols_ours_answers():
    """As TEST.ATTACK.PROTOCOL ours,ares,oddefense leaves them in robustness.json."""
    attacks = [
        {**attack(eps, ap), "norm": "linf", "loss": loss, "protocol": protocol}
        | {"steps": steps, "restarts": 1, "images": 80, "adaptive": protocol == "ours"}
        for protocol, eps, loss, steps, ap in (
            ("ours", 4.0, "A_cls", 30, 12.0),
            ("ours", 4.0, "worst", 30, 11.0),
            ("ares", 2.0, "no_regression", 20, 19.0),
            ("oddefense", 4.0, "A_cls", 10, 15.0),
            ("oddefense", 4.0, "worst", 10, 14.0),
        )
    ]
    one, evaluation = outcome({"bbox": {"AP": 40.0}}, attack=attacks), Attack()
    found = measurements(one)
    assert found[Quantity("attack: mean", "bbox")] == 11
    assert found[Quantity("attack", "bbox", "AP", "linf, worst, oddefense", 4)] == 14
    assert evaluation.measure(tidy_table([one]), "bbox") == "box AP under the worst attack"
    text = evaluation.text([one])
    assert text.startswith("APGD, 30 steps, ares PGD, 20 steps, oddefense PGD, 10 steps, on 80 images.")
    assert "What bears their name is as in the protocol of ares and oddefense." in text
    without = measurements(outcome({"bbox": {"AP": 40.0}}, attack=attacks[2:]))
    assert without[Quantity("attack: mean", "bbox")] == (19 + 14) / 2


def test_the_images_of_the_checks_have_a_table(tmp_path, build_study):
    options = {"detectors": ("faster_rcnn",), "arms": ("standard", "robust"), "rates": (0.02,)}
    study, outcomes = build_study(tmp_path, **options)
    for one in outcomes:
        of_one = one.robustness["attack"][0]
        few = {"attack": 3.0, "transfer": 5.0 + one.trial.seed, "random search": 8.0}
        of_one["check_images"] = {"images": 10, "loss": "A_cls"} | {
            name: {"metrics": {"bbox": {"AP": ap}}, "matches": None} for name, ap in few.items()
        }
    comparison = compared(study, outcomes)
    (table,) = [
        table
        for table in Attack().tables(comparison.scores, "bbox")
        if table.title == "Box AP on the images of the checks, L2"
    ]
    assert table.columns == ["attack", "transferred attack", "random search"]
    assert [str(cell) for cell in table.lines[0].cells] == ["3.00 ± 0.00", "6.50 ± 0.71", "8.00 ± 0.00"]
    assert " made on 10 images: " in Attack().text(outcomes)


def test_the_verdict_and_the_scatter_under_attack_are_of_the_worst_case(tmp_path, build_study):
    options = {"detectors": ("faster_rcnn",), "arms": ("standard", "robust"), "rates": (0.02,)}
    study, outcomes = build_study(tmp_path, **options)
    for one in outcomes:  # by the first objective robust wins by far, by the other it loses
        losses = {"A_cls": 40.0, "A_reg": 4.0, "worst": 4.0} if one.trial.arm == "robust" else {
            "A_cls": 12.0, "A_reg": 10.0, "worst": 9.0,
        }  # fmt: skip
        one.robustness["attack"] = [
            {**one.robustness["attack"][0], "eps": 4.0, "loss": loss, "noise": None}
            | {"metrics": {"bbox": {"AP": ap + 0.1 * one.trial.seed}}, "protocol": "oddefense"}
            for loss, ap in losses.items()
        ]
    comparison = compared(study, outcomes)
    answer = answers(comparison, [])[1]
    assert answer.verdict == "worse"
    assert (
        "robust (eps 3) is worse than standard by 5.00 box AP under the worst oddefense"
        in answer.sentences[0]
    )
    charts = Charts(study, comparison.scores)
    (figure,) = charts.clean_against("x", "", select(comparison.scores, kind="attack: mean"), answer.measure)
    assert re.search(r"standard: clean \S+, 9\.[12], robust: clean \S+, 4\.[12]", figure.alt)


def test_every_number_has_its_name():
    found = measurements(
        outcome(
            {"bbox": {"AP": 40.0, "AP-person": 50}},
            attack=[attack(0.5, 20.0, {"bbox": {"AP": 39.0}}), attack(1.0, 10.0)],
            corruption={
                "clean": {"bbox": {"AP": 41.0}},
                "mPC": {"bbox": 12.0},
                "rPC": {"bbox": 30.0},
                "results": [
                    {"corruption": "fog", "severity": level, "metrics": {"bbox": {"AP": ap}}}
                    for level, ap in ((1, 16.0), (3, 8.0))
                ],
            },
        )
    )
    expected = {
        Quantity("clean", "bbox"): 40.0,
        Quantity("clean", "bbox", metric="AP-person"): 50.0,
        Quantity("attack: clean", "bbox", condition="l2, all", level=0.5): 40.0,
        Quantity("attack", "bbox", condition="l2, all", level=0.5): 20.0,
        Quantity("noise", "bbox", condition="l2, all", level=0.5): 39.0,
        Quantity("attack: clean", "bbox", condition="l2, all", level=1.0): 40.0,
        Quantity("attack", "bbox", condition="l2, all", level=1.0): 10.0,
        Quantity("attack: mean", "bbox"): 15.0,
        Quantity("corruption: clean", "bbox"): 41.0,
        Quantity("mPC", "bbox"): 12.0,
        Quantity("rPC", "bbox"): 30.0,
        Quantity("corruption", "bbox", condition="fog", level=1): 16.0,
        Quantity("corruption", "bbox", condition="fog", level=3): 8.0,
        Quantity("corruption", "bbox", condition="fog"): 12.0,
    }
    assert found == expected


def test_a_mean_with_an_undefined_part_is_undefined():
    found = measurements(outcome({}, attack=[attack(0.5, 20.0), attack(1.0, None)]))
    assert math.isnan(found[Quantity("attack: mean", "bbox")])


def test_unfinished_trials_measure_nothing():
    assert measurements(Outcome(TRIAL, Path("x"), None)) == {}


def test_of_several_test_sets_the_first_counts():
    found = measurements(outcome({"coco_val": {"bbox": {"AP": 3.0}}, "other": {"bbox": {"AP": 5.0}}}))
    assert found == {Quantity("clean", "bbox"): 3.0}


def test_accuracy_is_the_main_number_of_classification():
    found = measurements(outcome({"accuracy": {"accuracy": 80.0, "top1": 81.0, "accuracy-cat": 70.0}}))
    assert found[Quantity("clean", "accuracy", "accuracy")] == 80.0
    assert [quantity.metric for quantity in found] == ["accuracy", "top1", "accuracy-cat"]


def test_intervals_under_attack_and_corruption_cover_images(tmp_path, build_study):
    """From the matches that their evaluation kept; here nothing is changed, so they are the clean ones."""
    options = {"detectors": ("faster_rcnn",), "arms": ("standard", "robust"), "rates": (0.02,)}
    study, outcomes = build_study(tmp_path, **options)
    for outcome in outcomes:
        dataset, metrics = outcome.results["datasets"][0], outcome.results["metrics"]
        coco = load_coco(dataset["json_file"])
        found = evaluate_detections(coco, load_detections(dataset["predictions"]), "bbox", keep_matches=True)
        (outcome.folder / "a").mkdir()
        write_evaluations({"bbox": found}, outcome.folder / "a" / "matches.npz")
        known = {
            "metrics": metrics,
            "matches": "a/matches.npz",
            "clean": metrics,
            "clean_matches": "a/matches.npz",
        }
        for attack in outcome.robustness["attack"]:
            attack |= {**known, "noise": None}
        outcome.robustness["attack"].append({**attack, "requested": False, "eps": 9.0})
        corruption = outcome.robustness["corruption"]
        corruption |= {key: known[key] for key in ("clean", "clean_matches")}
        corruption["mPC"] = {"bbox": metrics["bbox"]["AP"]}
        for result in corruption["results"]:
            result |= {key: known[key] for key in ("metrics", "matches")}
        ap, results = metrics["bbox"]["AP"], []
        for name in ("coco_o_sketch", "coco_o_tattoo"):
            shutil.copytree(outcome.folder / "a", outcome.folder / name)
            result = {"dataset": name, "requested": True, "of_coco_o": True, "images": 6}
            results.append({**result, "metrics": metrics, "matches": f"{name}/matches.npz"})
        score = {"effective_robustness": ap - 0.45 * ap, "coco_kept": 0.45}
        outcome.robustness["natural"] = {"results": results, "mean": ap, **score}
    comparison = compared(study, outcomes)
    assert comparison.notes == []
    main = select(comparison.scores, arm="robust", main=True)
    assert main["kind"].tolist() == ["clean", "attack: mean", "mPC", "natural: mean"]
    natural = comparison.scores[comparison.scores["kind"].isin(["natural", "effective robustness"])]
    natural = select(natural, arm="robust", metric="AP")
    assert set(main["over"]) == set(natural["over"]) == {"seeds and images"}
    assert main["se"].tolist() == pytest.approx([main["se"].iloc[0]] * 4, rel=0.5)
    of_clean, *changed, shifted = (
        comparison.samples["faster_rcnn", Quantity(kind, "bbox", "AP")]["robust"].draws
        for kind in main["kind"]
    )
    assert all(np.allclose(each, of_clean, atol=1e-3, equal_nan=True) for each in changed)
    # Two sets of other images, which are drawn independently: their mean varies less.
    ratio = np.nanstd(shifted, axis=1) / np.nanstd(of_clean, axis=1)
    assert np.all((ratio > 0.55) & (ratio < 0.9))
    assert 9.0 not in comparison.table["level"].tolist()  # which only an earlier evaluation asked for

    kept = outcomes[0].folder / "a" / "matches.npz"
    kept.write_bytes(kept.read_bytes()[:-9])
    (note,) = compared(study, outcomes).notes
    assert "is damaged (BadZipFile)" in note


def test_types_of_error_are_of_the_predictions_that_made_the_results(tmp_path, build_study):
    options = {"detectors": ("faster_rcnn",), "arms": ("standard", "robust"), "seeds": (1,), "rates": (0.02,)}
    _, outcomes = build_study(tmp_path, **options)
    for outcome in outcomes:
        file = outcome.folder / "predictions.json"
        found = [{**d, "category_id": 15 - d["category_id"]} for d in json.loads(file.read_text())[::2]]
        file.write_text(json.dumps(found))  # every other object, as one of the other category
    outcomes[0].results["metrics"]["bbox"]["AP50"] = None  # nothing is found
    table = select(tidy_table(outcomes), kind="error")
    assert set(table["arm"]) == {"standard"}  # the other's results have another AP50
    gains = dict(zip(table["metric"], table["value"], strict=True))
    assert gains["class"] > 45
    assert gains["background"] == gains["duplicate"] == 0
    (outcomes[0].folder / "predictions.json").touch()
    (outcomes[0].folder / "errors.npz").write_text("no archive")  # made anew
    assert len(select(tidy_table(outcomes), kind="error")) == 6
