import json

import numpy as np
import pytest

from rt_detectron.utils.numbers import finite, is_number


@pytest.mark.parametrize("value", [None, float("nan"), float("inf"), True, "3", {}])
def test_undefined_ap_is_no_number(value):
    assert not is_number(value)


@pytest.mark.parametrize("value", [0, -1.5, np.float32(2.5), np.int64(3)])
def test_numbers_may_be_numpys(value):
    assert is_number(value)


def test_undefined_becomes_null():
    metrics = {"bbox": {"AP": np.float64(1.5), "APl": float("nan")}, "counts": [1, float("inf")], "name": "x"}
    expected = '{"bbox": {"AP": 1.5, "APl": null}, "counts": [1, null], "name": "x"}'
    assert json.dumps(finite(metrics), allow_nan=False) == expected
