import math

import numpy as np
import pandas as pd
import pytest
from scipy.stats import ttest_1samp

from rt_detectron.study.statistics import (
    Quantity,
    compare,
    of_categories,
    percentile_interval,
    select,
    summarize,
    t_interval,
    verdicts,
)

BOX, MASK = Quantity("clean", "bbox"), Quantity("clean", "segm")


@pytest.fixture
def scores(make_study, make_table):
    """``scores(robust, standard)``: those of two arms, each given as quantity -> seed -> value."""

    def scores(robust, standard):
        table = make_table({("mask_rcnn", "robust"): robust, ("mask_rcnn", "standard"): standard})
        return compare(make_study(), [], table).scores

    return scores


def test_summarize_by_hand():
    # deviations from 4: -2, 0, 2; squares sum to 8; 8 / (3 - 1) = 4
    assert summarize([2.0, 4.0, 6.0]) == (3, 4.0, 2.0)


def test_single_value_has_no_spread_and_no_interval():
    n, mean, sd = summarize([7.5])
    assert (n, mean, math.isnan(sd)) == (1, 7.5, True)
    assert np.isnan(t_interval(n, mean, sd)).all()


@pytest.mark.parametrize("values", [[1.0, 2.5], [0.3, -0.2, 0.4], [3.0, 2.0, 2.5, 4.0, 1.0]])
def test_t_interval_is_scipys(values):
    expected = ttest_1samp(values, 0).confidence_interval(0.95)
    assert t_interval(*summarize(values)) == pytest.approx((expected.low, expected.high))


def test_percentile_interval_leaves_out_a_fortieth_on_each_side():
    assert percentile_interval(np.arange(1001.0)) == pytest.approx((25, 975))
    assert np.isnan(percentile_interval(np.zeros(0))).all()


@pytest.mark.parametrize(
    ("ends", "verdict"),
    [
        ((0.1, 2), "better"),
        ((-2, -0.1), "worse"),
        ((-1, 1), "undecided"),
        ((0, 0), "undecided"),
        ((math.nan, math.nan), "undecided"),
    ],
)
def test_verdict_is_the_intervals(ends, verdict):
    assert verdicts(pd.DataFrame([[0.5, *ends]], columns=["change", "low", "high"])) == [verdict]


def test_without_a_change_there_is_no_verdict():
    assert verdicts(pd.DataFrame([[math.nan] * 3], columns=["change", "low", "high"])) == [""]


def test_differences_are_paired_by_seed_not_by_position(scores):
    found = scores({BOX: {2: 30.0, 1: 11.0, 5: 99.0}}, {BOX: {1: 10.0, 2: 27.0, 3: 0.0}, MASK: {5: 1.0}})
    (robust,) = select(found, arm="robust").itertuples()
    assert (robust.n, robust.seeds) == (3, (1, 2, 5))
    assert (robust.change_n, robust.change, robust.change_sd) == summarize([1.0, 3.0])
    assert (robust.low, robust.high) == t_interval(*summarize([1.0, 3.0]))
    assert (robust.over, robust.verdict) == ("seeds", "undecided")


def test_summaries_and_changes_of_what_was_measured(scores):
    found = scores({BOX: {1: 21.0, 2: 28.0}, MASK: {1: 17.0}}, {BOX: {1: 20.0, 2: 24.0}})
    assert found["arm"].tolist() == ["standard", "robust", "robust"]  # in the study's order
    box, mask = select(found, arm="robust").itertuples()
    assert (mask.n, mask.mean, math.isnan(mask.sd), mask.verdict) == (1, 17.0, True, "")
    assert (box.mean, box.change) == (24.5, 2.5)
    (baseline,) = select(found, arm="standard").itertuples()
    assert (baseline.verdict, baseline.over, math.isnan(baseline.change)) == ("", "", True)


def test_nothing_measured_is_an_empty_table(scores):
    assert scores({}, {}).empty


def test_levels_and_their_mean_are_paired_apart(scores):
    fog = [Quantity("corruption", "bbox", "AP", "fog", level) for level in (1, 3, None)]
    found = scores(
        {quantity: {1: 10.0 + i} for i, quantity in enumerate(fog)},
        {quantity: {1: 10.0 - i} for i, quantity in enumerate(fog)},
    )
    assert select(found, arm="robust")["change"].tolist() == [0.0, 2.0, 4.0]
    assert select(found, arm="robust", level=None)["change"].tolist() == [4.0]


def test_undefined_values_and_attacked_categories_are_left_out(scores):
    category = Quantity("clean", "bbox", "AP-cat")
    attacked = [Quantity("attack", "bbox", metric, "l2, all", 1.0) for metric in ("AP50", "AP-cat")]
    found = scores(
        {BOX: {1: math.nan, 2: 3.0}, category: {1: 1.0}} | {quantity: {1: 2.0} for quantity in attacked}, {}
    )
    assert found["metric"].tolist() == ["AP", "AP-cat", "AP50"]
    assert of_categories(found).tolist() == [False, True, False]
    assert (found["n"][0], found["seeds"][0]) == (1, (1, 2))
