import math
from types import SimpleNamespace

import pytest

from rt_detectron.evaluation.robustness.corruption import CorruptionEvaluation, performance_under_corruption
from rt_detectron.utils.errors import InputError


def test_mpc_and_rpc_by_hand():
    clean = {"bbox": {"AP": 40.0, "AP50": 60.0}, "segm": {"AP": 20.0}}
    results = [{"bbox": {"AP": ap}, "segm": {"AP": ap / 4}} for ap in (30.0, 20.0, 10.0, 0.0)]
    mean, relative = performance_under_corruption(clean, results)
    assert mean == {"bbox": 15.0, "segm": 3.75}
    assert relative == {"bbox": 37.5, "segm": 18.75}


@pytest.mark.parametrize("ap", [0.0, math.nan, None])
def test_rpc_is_undefined_where_the_clean_ap_is_nothing(ap):
    mean, relative = performance_under_corruption({"bbox": {"AP": ap}}, [{"bbox": {"AP": 0.0}}])
    assert relative == {"bbox": None}
    assert mean == {"bbox": 0.0 if ap == 0 else None}


def test_small_images_are_named_before_anything_is_measured():
    images = [{"file_name": f"{width}.jpg", "width": width, "height": 480} for width in (640, 31, 32, 20)] + [
        {"file_name": "of unknown size.jpg"}
    ]
    session = SimpleNamespace(images=lambda count: SimpleNamespace(dicts=images))
    CorruptionEvaluation(()).check(session)
    with pytest.raises(InputError, match=r"^31\.jpg: 31 x 480 pixels are too few .* in 2 of 5 images: leave"):
        CorruptionEvaluation((("fog", 1),)).check(session)
    del images[1::2]
    CorruptionEvaluation((("fog", 1),)).check(session)


def test_what_is_not_asked_for_any_more_is_kept_beside_what_is():
    def results(*names, seed=0, of="six", images=6):
        found = [{"corruption": name, "severity": 1, "requested": True, "metrics": {}} for name in names]
        return {"images": images, "clean_matches": of, "seed": seed, "results": found, "mPC": {"bbox": 3.0}}

    def kept(part):
        return [(each["corruption"], each["requested"]) for each in part["results"]]

    merge = CorruptionEvaluation.merged
    assert merge(None, results("fog")) == results("fog")
    both = merge(results("fog", "snow"), results("fog"))
    assert kept(both) == [("fog", True), ("snow", False)]
    assert kept(merge(both, None)) == [("fog", False), ("snow", False)]
    for other in (
        results("fog", seed=1),
        results("fog", of="three"),
        results("fog", images=3),
    ):  # no mean over both has a meaning
        assert merge(both, other) == other
