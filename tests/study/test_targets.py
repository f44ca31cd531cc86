"""One answer over all targets: what it weighs, and how often it finds a difference where there is none."""

import math

import numpy as np
import pytest
from scipy import stats

from rt_detectron.study.load import load_study
from rt_detectron.study.selection import Choice
from rt_detectron.study.statistics import Comparison, Quantity, Sample
from rt_detectron.study.targets import pooled

AP = Quantity("clean", "bbox")
WITHIN = (0.035, 0.065)  # 5 % +- 1.5 %


@pytest.fixture
def make(write_study):
    """``make(samples, sets)``: a comparison of samples by target and arm; ``sets`` names the test images."""

    def make(samples, sets=None, **changes):
        targets = dict.fromkeys(target for target, _ in samples)
        arms = {arm: {"weights": "std.pkl"} for arm in dict.fromkeys(arm for _, arm in samples)}
        keys = {"detectors": {target: {"config": "mask.yaml"} for target in targets}, "arms": arms, **changes}
        study = load_study(write_study(**keys))
        return lambda samples: Comparison(
            study, [], None, None,
            {(t, AP): {arm: s for (target, arm), s in samples.items() if target == t} for t in targets},
            {}, sets or {}, [],
        )  # fmt: skip

    return make


def seeds(values, draws=None):
    return Sample("seeds", dict(enumerate(values)), draws)


def checkpoints(values, draws=None):
    return Sample("checkpoints", {str(n): value for n, value in enumerate(values)}, draws)


def test_a_single_target_is_its_own_answer(make):
    ours, theirs = [3.0, 4.0, 6.0], [1.0, 2.0, 4.0]
    samples = {("a", "robust"): seeds(ours), ("a", "standard"): seeds(theirs)}
    (one,) = pooled(make(samples)(samples), AP, [])
    expected = stats.ttest_ind(ours, theirs, equal_var=False).confidence_interval()
    assert (one.arm, one.change, one.random) == ("robust", pytest.approx(2), None)
    assert (one.low, one.high) == pytest.approx((expected.low, expected.high))


def test_data_sets_weigh_the_same_and_detectors_on_one_share_its_weight(make):
    samples = {(t, "standard"): seeds([0.0, 0.1, 0.2]) for t in "abc"}
    samples |= {(t, "robust"): seeds([x, x + 0.1, x + 0.2]) for t, x in zip("abc", (1, 3, 6), strict=True)}
    (one,) = pooled(make(samples, {"a": "coco", "b": "coco", "c": "voc"})(samples), AP, [])
    assert (one.change, one.data_sets) == (pytest.approx((2 + 6) / 2), 2)
    half = stats.t.ppf(0.975, 1) * np.std([2, 6], ddof=1) / math.sqrt(2)
    assert one.random == pytest.approx((4 - half, 4 + half))
    (one,) = pooled(make(samples, {"a": "coco", "b": "coco", "c": "coco"})(samples), AP, [])
    assert (one.change, one.data_sets, one.random) == (pytest.approx(10 / 3), 1, None)


def simulate(make, draw, sample, interval, studies=1200, sets=None, targets="ab"):
    """The share of studies of two equal arms whose pooled interval excludes 0."""
    cells = [(target, arm) for target in targets for arm in ("standard", "robust")]
    comparison = make(dict.fromkeys(cells), sets)
    wrong = 0
    for _ in range(studies):
        (one,) = pooled(comparison(sample(draw, cells)), AP, [])
        low, high = interval(one)
        wrong += low > 0 or high < 0
    return wrong / studies


def fixed(one):
    return one.low, one.high


def test_two_detectors_on_the_same_images_share_their_luck(make):
    def sample(draw, cells):
        luck = {arm: draw.normal() for arm in ("standard", "robust")}  # of the images, with an arm
        return {cell: seeds(draw.normal(luck[cell[1]], 0.5, 3), luck_of(cell[1])) for cell in cells}

    resampled = stats.norm.ppf((np.arange(300) + 0.5) / 300)[None]
    shared = {"standard": resampled, "robust": np.random.default_rng(1).permuted(resampled, axis=1)}

    def luck_of(arm):
        return np.repeat(shared[arm], 3, axis=0)

    draw = np.random.default_rng(0)
    assert WITHIN[0] < simulate(make, draw, sample, fixed, sets={"a": "coco", "b": "coco"}) < WITHIN[1]
    # As if they were two data sets:
    assert simulate(make, draw, sample, fixed, 200) > 0.1


def test_checkpoints_that_targets_share_are_no_new_ones(make):
    def sample(draw, cells):
        luck = {arm: draw.normal(0, 1, 4) for arm in ("standard", "robust")}
        return {cell: checkpoints(luck[cell[1]] + draw.normal(0, 0.3, 4)) for cell in cells}

    draw = np.random.default_rng(0)
    assert WITHIN[0] < simulate(make, draw, sample, fixed, targets="abcd") < WITHIN[1]

    def as_seeds(draw, cells):
        return {cell: seeds(one.values.values()) for cell, one in sample(draw, cells).items()}

    assert simulate(make, draw, as_seeds, fixed, 200, targets="abcd") > 0.15


def test_on_targets_like_these(make):
    """What differs from target to target is chance, too."""

    def sample(draw, cells):
        effect = dict(zip("abcd", draw.normal(0, 1, 4), strict=True))
        return {
            (target, arm): seeds(draw.normal(effect[target] * (arm == "robust"), 0.2, 3))
            for target, arm in cells
        }

    draw = np.random.default_rng(0)
    wrong = simulate(make, draw, sample, lambda one: one.random, targets="abcd")
    assert WITHIN[0] < wrong < WITHIN[1]
    assert simulate(make, draw, sample, fixed, 200, targets="abcd") > 0.5  # on these targets arms do differ


def test_the_best_arm_is_chosen_on_held_out_data(make):
    """Of equal arms the best by the reported scores looks better; the best by held-out scores does not."""
    cells = [(target, arm) for target in "ab" for arm in ("standard", "r1", "r2", "r3", "r4", "r5")]
    comparison = make(dict.fromkeys(cells))
    draw = np.random.default_rng(0)
    changes, largest = [], []
    for _ in range(150):
        samples = {cell: seeds(draw.normal(0, 1, 3)) for cell in cells}
        choices = [Choice(arm, t, 0.1, {0.1: draw.normal()}, False) for t, arm in cells]
        *arms, best = pooled(comparison(samples), AP, choices)
        assert (best.arm, set(best.plan), len(arms)) == (None, {"a", "b"}, 5)
        scores = {(choice.target, choice.arm): choice.scores[0.1] for choice in choices}
        for target, (arm, _) in best.plan.items():
            assert scores[target, arm] == max(scores[target, one.arm] for one in arms)
        changes.append(best.change)
        largest.append(max(one.change for one in arms))
    assert abs(np.mean(changes)) < 0.15
    assert np.mean(largest) > 0.4
    assert len(pooled(comparison(samples), AP, choices[1:3])) == 5  # without all held-out scores no best arm
