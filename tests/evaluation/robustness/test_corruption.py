import math

import pytest

from rt_detectron.evaluation.robustness.corruption import performance_under_corruption


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
