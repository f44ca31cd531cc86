import math

import numpy as np
import pytest
from scipy import stats

from rt_detectron.study.measurements import CLEAN, Quantity
from rt_detectron.study.statistics import (
    IMAGES,
    SEEDS,
    Change,
    Interval,
    changes,
    paired_differences,
    percentile_interval,
    summaries,
    summarize,
    t_interval,
)

AP = Quantity(CLEAN)


def scores(**by_seed):
    return {int(seed[1:]): {AP: value} for seed, value in by_seed.items()}


def test_summary():
    summary = summarize([1.0, 2.0, 6.0])
    assert (summary.n, summary.mean) == (3, 3.0)
    assert summary.sd == pytest.approx(math.sqrt(7))
    assert summarize([4.0]).sd is None


def test_differences_are_paired_by_seed():
    assert paired_differences(scores(s3=9, s1=5, s2=7), scores(s1=4, s3=5, s4=0), AP) == [1, 4]


def test_interval_is_that_of_a_paired_t_test():
    ours, theirs = [31.0, 33.5, 30.2, 32.2], [30.1, 31.0, 30.5, 30.9]
    interval = t_interval(summarize([a - b for a, b in zip(ours, theirs, strict=True)]))
    expected = stats.ttest_rel(ours, theirs).confidence_interval(0.95)
    assert (interval.low, interval.high) == pytest.approx((expected.low, expected.high), rel=1e-9)
    assert interval.over == SEEDS


def test_no_interval_from_one_seed():
    assert t_interval(summarize([2.0])) is None
    (change,) = changes(scores(s1=5), scores(s1=3)).values()
    assert change.interval is None
    assert change.verdict == "undecided"


def test_percentile_interval():
    interval = percentile_interval(np.arange(1001.0))
    assert (interval.low, interval.high) == pytest.approx((25, 975))
    assert interval.over == IMAGES
    assert percentile_interval(np.zeros(0)) is None


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [
        (0.1, 2, "better"),
        (-2, -0.1, "worse"),
        (-1, 1, "undecided"),
        (0, 1, "undecided"),
        (-1, 0, "undecided"),
    ],
)
def test_verdict_is_the_intervals(low, high, verdict):
    assert Change(summarize([low, high]), Interval(low, high, SEEDS)).verdict == verdict


def test_summaries_leave_out_what_a_seed_lacks():
    other = Quantity(CLEAN, "segm")
    found = summaries({1: {AP: 2.0, other: 1.0}, 2: {AP: 4.0}})
    assert (found[AP].n, found[AP].mean, found[other].n) == (2, 3.0, 1)
