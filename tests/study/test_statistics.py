import numpy as np
import pytest
from scipy.stats import ttest_1samp

from rt_detectron.study.measurements import Quantity
from rt_detectron.study.statistics import (
    Change,
    Interval,
    Summary,
    changes,
    paired_differences,
    percentile_interval,
    summaries,
    summarize,
    t_interval,
)

BOX, MASK = Quantity("clean", "bbox"), Quantity("clean", "segm")


def test_summarize_by_hand():
    # deviations from 4: -2, 0, 2; squares sum to 8; 8 / (3 - 1) = 4
    assert summarize([2.0, 4.0, 6.0]) == Summary(n=3, mean=4.0, sd=2.0)


def test_single_value_has_no_spread_and_no_interval():
    assert summarize([7.5]) == Summary(n=1, mean=7.5, sd=None)
    assert t_interval(summarize([7.5])) is None


@pytest.mark.parametrize("values", [[1.0, 2.5], [0.3, -0.2, 0.4], [3.0, 2.0, 2.5, 4.0, 1.0]])
def test_t_interval_is_scipys(values):
    expected = ttest_1samp(values, 0).confidence_interval(0.95)
    interval = t_interval(summarize(values))
    assert (interval.low, interval.high) == pytest.approx((expected.low, expected.high))
    assert interval.over == "seeds"


def test_percentile_interval_leaves_out_a_fortieth_on_each_side():
    interval = percentile_interval(np.arange(1001.0))
    assert (interval.low, interval.high) == pytest.approx((25, 975))
    assert interval.over == "images"
    assert percentile_interval(np.zeros(0)) is None


@pytest.mark.parametrize(
    ("ends", "verdict"),
    [((0.1, 2), "better"), ((-2, -0.1), "worse"), ((-1, 1), "undecided"), ((0, 0), "undecided")],
)
def test_verdict_is_the_intervals(ends, verdict):
    assert Change(Summary(2, 0.5, 1.0), Interval(*ends, "seeds")).verdict == verdict


def test_without_interval_it_is_undecided():
    assert Change(Summary(1, 30.0, None), None).verdict == "undecided"


def test_differences_are_paired_by_seed_not_by_position():
    arm = {2: {BOX: 30.0}, 1: {BOX: 11.0}, 5: {BOX: 99.0}}
    baseline = {1: {BOX: 10.0}, 2: {BOX: 27.0}, 3: {BOX: 0.0}, 5: {MASK: 1.0}}
    assert paired_differences(arm, baseline, BOX) == [1.0, 3.0]


def test_summaries_and_changes_of_what_was_measured():
    arm = {1: {BOX: 21.0, MASK: 17.0}, 2: {BOX: 28.0}}
    baseline = {1: {BOX: 20.0}, 2: {BOX: 24.0}}
    assert summaries(arm)[MASK] == Summary(1, 17.0, None)
    assert summaries(arm)[BOX].mean == 24.5
    assert list(changes(arm, baseline)) == [BOX]
    assert changes(arm, baseline)[BOX].differences == summarize([1.0, 4.0])
    assert changes(arm, {}) == {}
