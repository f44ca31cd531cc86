"""Simulations: how often intervals of arms that do not differ exclude 0. It must be about 5 %."""

import math

import numpy as np
import pytest
from scipy import stats

from rt_detectron.study.intervals import (
    contrasts,
    discoveries,
    image_covariance,
    simultaneous,
)

PAIR = np.array([[-1.0, 1.0]])
WITHIN = (0.035, 0.065)  # 5 % +- 1.5 %
STUDIES = 3000


@pytest.fixture
def draw():
    return np.random.default_rng(7)


def called_different(found, critical=None):
    """The share of studies in which any interval excludes 0."""
    low, high = found.interval(critical)
    return ((low > 0) | (high < 0)).any(axis=-1).mean()


def to_baseline(arms):
    return np.column_stack([-np.ones(arms - 1), np.eye(arms - 1)])


def test_a_difference_is_scipys_welch(draw):
    runs = draw.normal(0, [[1], [3]], (2, 6))
    (low,), (high,) = contrasts(runs, PAIR).interval()
    expected = stats.ttest_ind(runs[1], runs[0], equal_var=False).confidence_interval()
    assert (low, high) == pytest.approx((expected.low, expected.high))
    assert contrasts(runs, PAIR).p == pytest.approx(stats.ttest_ind(runs[1], runs[0], equal_var=False).pvalue)


def test_an_arm_may_have_fewer_runs(draw):
    runs = draw.normal(0, 1, (2, 6))
    runs[1, 4:] = math.nan
    (low,), _ = contrasts(runs, PAIR).interval()
    expected = stats.ttest_ind(runs[1, :4], runs[0], equal_var=False).confidence_interval()
    assert low == pytest.approx(expected.low)


@pytest.mark.parametrize("images", [False, True])
def test_equal_arms_of_two_runs(draw, images):
    """Two runs of four arms: a variance pooled over them, and half-widths of 2.8 instead of 12.7 sd."""
    runs = draw.normal(0, 1, (STUDIES, 4, 2))
    covariance = None
    if images:
        shared = draw.normal(0, 1, (STUDIES, 4, 1))
        runs = runs + shared
        covariance = np.broadcast_to(np.eye(4), (STUDIES, 4, 4))
    found = contrasts(runs, np.array([[-1.0, 1, 0, 0]]), covariance, 499)
    assert WITHIN[0] < called_different(found) < WITHIN[1]
    if not images:
        low, high = found.interval()
        assert np.sqrt(np.mean((high - low) ** 2)) / 2 == pytest.approx(2.8, abs=0.1)
        assert (found.df == 4).all()


def test_equal_arms_whose_checkpoints_differ(draw):
    """A checkpoint's offset is shared by its five fine-tunings: fine-tunings are no independent runs."""
    checkpoints = draw.normal(0, 1, (STUDIES, 2, 4, 1))
    trials = checkpoints + draw.normal(0, 1, (STUDIES, 2, 4, 5))
    found = contrasts(trials.mean(axis=-1), PAIR)
    assert WITHIN[0] < called_different(found) < WITHIN[1]
    # One checkpoint of each arm, and its fine-tunings as runs: right about the checkpoints only.
    one = trials[:, :, 0]
    assert called_different(contrasts(one, PAIR)) > 0.25
    about_these = contrasts(one - checkpoints[:, :, 0], PAIR)
    assert WITHIN[0] < called_different(about_these) < WITHIN[1]


def of_two_classifiers(draw, images=400, seeds=3, luck=0.0):
    """Answers of two equally good classifiers on the same images: (studies, arm, seed, image).

    ``luck`` is what a seed changes: the chance that it answers an image anew.
    """
    hard = draw.uniform(0.4, 0.95, (1000, 1, 1, images))
    answers = np.broadcast_to(draw.random((1000, 2, 1, images)) < hard, (1000, 2, seeds, images))
    again = draw.random((1000, 2, seeds, images)) < luck
    return np.where(again, draw.random((1000, 2, seeds, images)) < hard, answers).astype(float)


@pytest.mark.parametrize(("seeds", "luck"), [(3, 0.0), (2, 0.0), (4, 0.3), (1, 0.0)])
def test_equal_arms_on_other_images(draw, seeds, luck):
    """Seeds that change nothing, as of an exact linear head: what is left is the choice of images."""
    right = of_two_classifiers(draw, seeds=seeds, luck=luck)
    runs = 100 * right.mean(axis=-1)
    # A mean's covariance over resamples, exactly: over images, divided by their number.
    covariance = np.stack([_exact_covariance(list(one)) for one in 100 * right])
    found = contrasts(runs, PAIR, covariance, right.shape[-1] - 1)
    assert WITHIN[0] < called_different(found) < WITHIN[1]
    if seeds > 1:
        (low, high) = contrasts(runs, PAIR).interval()
        assert ((low > 0) | (high < 0)).mean() > 0.1  # without the images


def _exact_covariance(arms):
    """As :func:`image_covariance` with endless resamples."""
    images = arms[0].shape[-1]
    draws = [arm - arm.mean(axis=-1, keepdims=True) for arm in arms]
    return image_covariance(draws) * (images - 1) / images**2


def test_images_covariance_is_the_bootstraps(draw):
    right = (draw.random((2, 3, 500)) < 0.7).astype(float)
    counts = draw.poisson(1.0, (500, 4000))
    drawn = [one @ counts / counts.sum(axis=0) for one in right]
    found, exact = image_covariance(drawn), _exact_covariance(list(right))
    np.testing.assert_allclose(found, exact, atol=0.1 * exact.max())


@pytest.mark.parametrize("runs", [2, 5])
def test_ten_equal_arms(draw, runs):
    """Any of nine arms is called different in 5 % of studies; with intervals for each alone, in far more."""
    found = contrasts(draw.normal(0, 1, (700, 10, runs)), to_baseline(10))
    each = [
        simultaneous(correlation, df) for correlation, df in zip(found.correlation, found.df, strict=True)
    ]
    assert WITHIN[0] < called_different(found, np.array(each)) < WITHIN[1]
    assert called_different(found) > 0.2


def test_simultaneous_intervals_are_scipys_dunnett(draw):
    arms = draw.normal(0, 1, (4, 8))
    expected = stats.dunnett(*arms[1:], control=arms[0], rng=0).confidence_interval()
    scale = np.sqrt(arms.var(axis=1, ddof=1).mean() * 2 / 8)
    critical = simultaneous(np.full((3, 3), 0.5) + 0.5 * np.eye(3), np.full(3, 4 * 7.0))
    assert critical * scale == pytest.approx((expected.high - expected.low) / 2, rel=0.01)


def test_the_best_of_equal_arms_is_among_those_that_may_be_best(draw):
    """Hsu's comparison: the arm that is truly best stays a candidate in at least 95 % of studies."""
    runs = draw.normal(0, 1, (700, 4, 4)) + np.array([0, 0, 0, 0.01])[:, None]
    weights = -np.eye(4)[:3]
    weights[:, 3] = 1
    found = contrasts(runs, weights)
    critical = [
        simultaneous(correlation, df, one_sided=True)
        for correlation, df in zip(found.correlation, found.df, strict=True)
    ]
    kept = (found.estimate + np.array(critical) * found.se >= 0).all(axis=-1)
    assert 0.935 < kept.mean() < 0.98


def test_without_runs_and_images_there_is_no_interval():
    found = contrasts(np.array([[1.0], [2.0]]), PAIR)
    assert not found.covers_runs.any()
    assert np.isnan(found.interval()).all()
    over_images = contrasts(np.array([[1.0], [2.0]]), PAIR, np.eye(2), 99)
    assert over_images.se == pytest.approx(math.sqrt(2))
    assert not over_images.covers_runs.any()


def test_images_that_move_all_arms_together_may_be_no_part_of_a_difference():
    """Their estimated part may even be negative: then it is 0, and intervals are those of the runs."""
    runs = np.array([[1.0, 2, 3], [4, 5, 6], [2, 4, 6]])
    images = np.full((3, 3), 5.0)
    np.fill_diagonal(images, [0.1, 0.2, 0.3])
    weights = to_baseline(3)
    found, alone = contrasts(runs, weights, images, 99), contrasts(runs, weights)
    np.testing.assert_allclose(found.se, alone.se)
    np.testing.assert_allclose(found.correlation, alone.correlation)


def test_an_arm_of_one_run_takes_the_spread_of_the_others(draw):
    runs = draw.normal(0, 1, (STUDIES, 3, 3))
    runs[:, 1, 1:] = math.nan
    assert WITHIN[0] < called_different(contrasts(runs, np.array([[-1.0, 1, 0]]))) < WITHIN[1]


def test_discoveries_are_benjamini_and_hochbergs():
    # 0.05 * i / 5 for the i-th smallest: 0.01, 0.02, 0.03, ...
    p = np.array([0.5, 0.009, 0.029, math.nan, 0.019, 0.04])
    assert discoveries(p).tolist() == [False, True, True, False, True, True]
    assert discoveries(np.array([0.5, 0.011, 0.031, 0.021, 0.049])).tolist() == [False] * 5
    assert discoveries(np.array([])).tolist() == []
