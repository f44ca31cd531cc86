from pathlib import Path

import pytest

from rt_detectron.study.measurements import Quantity, measurements, reported
from rt_detectron.study.record import Outcome, is_number


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
    return Outcome(None, Path("x"), {"metrics": metrics}, robustness)


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
        Quantity("clean"): 40.0,
        Quantity("clean", metric="AP-person"): 50.0,
        Quantity("attack: clean", condition="l2, all", level=0.5): 40.0,
        Quantity("attack", condition="l2, all", level=0.5): 20.0,
        Quantity("noise", condition="l2, all", level=0.5): 39.0,
        Quantity("attack: clean", condition="l2, all", level=1.0): 40.0,
        Quantity("attack", condition="l2, all", level=1.0): 10.0,
        Quantity("attack: mean"): 15.0,
        Quantity("corruption: clean"): 41.0,
        Quantity("mPC"): 12.0,
        Quantity("rPC"): 30.0,
        Quantity("corruption", condition="fog", level=1): 16.0,
        Quantity("corruption", condition="fog", level=3): 8.0,
        Quantity("corruption", condition="fog"): 12.0,
    }
    assert found == expected


def test_a_mean_with_an_undefined_part_is_undefined():
    found = measurements(outcome({}, attack=[attack(0.5, 20.0), attack(1.0, None)]))
    assert found[Quantity("attack: mean")] is None
    assert Quantity("attack: mean") not in reported(found)


def test_reported_are_the_defined_ones_and_categories_of_clean_images():
    values = {
        Quantity("clean"): None,
        Quantity("clean", metric="AP-cat"): 1.0,
        Quantity("attack", metric="AP-cat"): 2.0,
        Quantity("attack", metric="AP50"): 3.0,
    }
    assert list(reported(values).values()) == [1.0, 3.0]


def test_unfinished_trials_measure_nothing():
    assert measurements(Outcome(None, Path("x"), None)) == {}


def test_of_several_test_sets_the_first_counts():
    found = measurements(outcome({"coco_val": {"bbox": {"AP": 3.0}}, "other": {"bbox": {"AP": 5.0}}}))
    assert found == {Quantity("clean"): 3.0}


def test_accuracy_is_the_main_number_of_classification():
    found = measurements(outcome({"accuracy": {"accuracy": 80.0, "top1": 81.0, "accuracy-cat": 70.0}}))
    assert found[Quantity("clean", "accuracy")] == 80.0
    assert [quantity.category for quantity in found] == [None, None, "cat"]


@pytest.mark.parametrize("value", [None, float("nan"), float("inf"), True, "3", {}])
def test_undefined_ap_is_no_number(value):
    assert not is_number(value)
