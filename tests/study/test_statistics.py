import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from rt_detectron.study.load import load_study
from rt_detectron.study.statistics import (
    QUANTITY,
    TRIAL,
    Quantity,
    compare,
    of_categories,
    select,
    summarize,
    verdict,
)

BOX, MASK = Quantity("clean", "bbox"), Quantity("clean", "segm")


@pytest.fixture
def scores(make_study, make_table):
    """``scores(robust, standard)``: those of two arms, each given as quantity -> seed -> value."""

    def scores(robust, standard, draws=None, more=""):
        table = make_table({("mask_rcnn", "robust"): robust, ("mask_rcnn", "standard"): standard})
        return compare(make_study(more=more), [], table, draws).scores

    return scores


def test_summarize_by_hand():
    # deviations from 4: -2, 0, 2; squares sum to 8; 8 / (3 - 1) = 4
    assert summarize([2.0, 4.0, 6.0]) == (3, 4.0, 2.0)


def draws_of(values, drawn):
    """Draws for :func:`compare`: arm -> seed -> (B,) values of BOX on resampled images."""
    return {
        ("final", arm, "mask_rcnn", 0.01, seed, ""): {BOX: drawn[arm]} for arm in drawn for seed in values
    }


@pytest.mark.parametrize(
    ("ends", "margin", "expected"),
    [
        ((0.1, 2), None, "better"),
        ((-2, -0.1), None, "worse"),
        ((-1, 1), None, "undecided"),
        ((0, 0), None, "undecided"),
        ((-0.004, -0.001), None, "undecided"),  # shown as [0.00, 0.00]
        ((0.004, 0.5), None, "undecided"),
        ((math.nan, math.nan), None, "undecided"),
        ((-0.2, 0.29), 0.3, "equivalent"),
        ((0.1, 0.29), 0.3, "equivalent"),
        ((0.1, 0.31), 0.3, "better"),
        ((-0.2, 0.31), 0.3, "undecided"),
        ((math.nan, math.nan), 0.3, "undecided"),
    ],
)
def test_verdict_is_the_intervals_as_it_is_shown(ends, margin, expected):
    assert verdict(*ends, margin) == expected


def test_seeds_of_two_arms_are_not_paired(scores):
    """The same seed of two arms has nothing in common: Welch's interval, whatever the order."""
    ours, theirs = [30.0, 11.0, 19.0], [10.0, 27.0, 15.0, 16.0]
    found = scores({BOX: dict(enumerate(ours))}, {BOX: dict(enumerate(theirs, 7))})
    (robust,) = select(found, arm="robust").itertuples()
    expected = stats.ttest_ind(ours, theirs, equal_var=False).confidence_interval()
    assert robust.change == pytest.approx(20 - 17)
    assert (robust.low, robust.high) == pytest.approx((expected.low, expected.high))
    assert (robust.n, robust.over, robust.verdict) == (3, "seeds", "undecided")


def test_seeds_that_change_nothing_leave_the_choice_of_images(scores):
    """An exact linear head: three equal accuracies once were "better +0.91 [+0.91, +0.91]"."""
    ours, theirs = (dict.fromkeys((1, 2, 3), value) for value in (80.91, 80.0))
    (alone,) = select(scores({BOX: ours}, {BOX: theirs}), arm="robust").itertuples()
    assert (alone.over, alone.verdict) == ("", "undecided")
    generator = np.random.default_rng(0)
    drawn = {"robust": generator.normal(80.91, 0.45, 500), "standard": generator.normal(80.0, 0.45, 500)}
    (line,) = select(scores({BOX: ours}, {BOX: theirs}, draws_of(ours, drawn)), arm="robust").itertuples()
    assert line.change == pytest.approx(0.91)
    assert line.high - line.change == pytest.approx(1.96 * np.hypot(0.45, 0.45), rel=0.1)
    assert (line.over, line.verdict) == ("seeds and images", "undecided")


def test_less_may_be_better(write_study, make_table):
    lost, kept = Quantity("error", "bbox", "missed"), Quantity("kept", "bbox", "missed")
    table = {
        ("mask", arm): {
            quantity: {seed: value + 0.1 * seed for seed in (1, 2, 3)} for quantity in (lost, kept)
        }
        for arm, value in (("standard", 9.0), ("l2", 4.0))
    }
    found = compare(load_study(write_study()), [], make_table(table), lower_is_better=["error"]).scores
    verdicts = dict(zip(found["kind"], found["verdict"], strict=True))  # those of l2, the second arm
    assert verdicts == {"error": "better", "kept": "worse"}


def test_a_single_run_has_an_interval_over_images_only(scores):
    drawn = {"robust": np.linspace(21, 23, 101), "standard": np.linspace(20, 22, 101)}  # they go together
    (line,) = select(
        scores({BOX: {1: 22.0}}, {BOX: {1: 21.0}}, draws_of([1], drawn)), arm="robust"
    ).itertuples()
    assert (line.over, line.low) == ("", pytest.approx(math.nan, nan_ok=True))  # no spread at all
    drawn["robust"] = drawn["robust"] + np.tile([-0.1, 0.1], 51)[:101]
    (line,) = select(
        scores({BOX: {1: 22.0}}, {BOX: {1: 21.0}}, draws_of([1], drawn)), arm="robust"
    ).itertuples()
    assert (line.over, line.verdict) == ("images", "better")
    assert line.low == pytest.approx(1 - 1.984 * 0.1, abs=0.01)


def test_checkpoints_are_the_runs_of_an_arm_that_has_several(write_study, make_table, tmp_path):
    for seed in (1, 2, 3):
        (tmp_path / f"l2_{seed}.pkl").write_text(str(seed))
    arms = {
        "standard": {"weights": ["std.pkl", "l2.pkl", "l2_1.pkl"]},
        "robust": {"weights": "l2_{seed}.pkl"},
    }
    study = load_study(write_study(arms=arms))
    trials = {
        "robust": {("1", 1): 1.0, ("1", 2): 3.0, ("2", 1): 4.0, ("3", 1): 6.0},  # means 2, 4, 6
        "standard": {("1", 1): 1.0, ("2", 1): 2.0, ("3", 1): 3.0},
    }
    lines = [
        ["final", arm, "mask", 0.01, seed, checkpoint, *BOX, value]
        for arm, values in trials.items()
        for (checkpoint, seed), value in values.items()
    ]
    table = pd.DataFrame(lines, columns=[*TRIAL, *QUANTITY, "value"], dtype=object).astype({"value": float})
    (robust,) = select(compare(study, [], table).scores, arm="robust").itertuples()
    assert (robust.runs, robust.n, robust.mean, robust.sd) == ("checkpoints", 3, 4.0, 2.0)
    assert robust.values == [1.0, 3.0, 4.0, 6.0]
    expected = stats.ttest_ind([2, 4, 6], [1, 2, 3], equal_var=False).confidence_interval()
    assert (robust.low, robust.high) == pytest.approx((expected.low, expected.high))
    assert robust.over == "checkpoints"


def test_arms_against_one_baseline_have_dunnetts_intervals(write_study, make_table):
    names = ["standard", "a", "b", "c"]
    study = load_study(write_study(arms={name: {"weights": "std.pkl"} for name in names}))
    values = np.random.default_rng(3).normal(0, 1, (4, 2))
    others = Quantity("clean", "bbox", "AP50")
    table = make_table(
        {
            ("mask", arm): {q: dict(enumerate(runs)) for q in (BOX, others)}
            for arm, runs in zip(names, values, strict=True)
        }
    )
    found = compare(study, [], table).scores
    expected = stats.dunnett(*values[1:], control=values[0], rng=0).confidence_interval()
    main = select(found, metric="AP").iloc[1:]
    assert main["main"].all()
    # Two runs: the variance is pooled over the arms, as Dunnett's.
    assert main["low"].tolist() == pytest.approx(expected.low.tolist(), rel=0.02, abs=0.05)
    alone = select(found, metric="AP50").iloc[1:]
    assert (alone["high"] - alone["low"]).max() < (main["high"] - main["low"]).min()


def test_exploratory_lines_are_decided_only_as_discoveries(scores):
    """One of 40 categories differs at 5 % by chance: it is no verdict, unless it stands out of all 40."""
    generator = np.random.default_rng(1)
    categories = [Quantity("clean", "bbox", f"AP-{number}") for number in range(40)]
    ours = {q: dict(enumerate(generator.normal(0, 1, 4))) for q in categories}
    theirs = {q: dict(enumerate(generator.normal(0, 1, 4))) for q in categories}
    found = select(scores(ours, theirs), arm="robust")
    assert ((found["low"] > 0) | (found["high"] < 0)).any()  # each for itself
    assert set(found["verdict"]) == {"undecided"}
    ours[categories[3]] = {seed: 50.0 + seed / 10 for seed in range(4)}
    found = select(scores(ours, theirs), arm="robust")
    assert select(found, verdict="better")["metric"].tolist() == ["AP-3"]


def test_finding_nothing_is_an_ap_of_zero(scores):
    """Detectron2 leaves AP undefined when there is no detection at all."""
    found = scores({BOX: {1: 4.0, 2: math.nan}}, {BOX: {1: 3.0, 2: 3.5}, MASK: {1: math.nan}})
    (robust,) = select(found, arm="robust").itertuples()
    assert (robust.values, robust.n, robust.mean) == ([4.0, 0.0], 2, 2.0)
    assert select(found, task="segm").empty  # undefined everywhere: nothing can be said


def test_summaries_and_changes_of_what_was_measured(scores):
    found = scores({BOX: {1: 21.0, 2: 28.0}, MASK: {1: 17.0}}, {BOX: {1: 20.0, 2: 24.0}})
    assert found["arm"].tolist() == ["standard", "robust", "robust"]  # in the study's order
    box, mask = select(found, arm="robust").itertuples()
    assert (mask.n, mask.mean, math.isnan(mask.sd), mask.verdict) == (1, 17.0, True, "")
    assert (box.main, mask.main) == (True, False)
    assert (box.mean, box.change) == (24.5, 2.5)
    (baseline,) = select(found, arm="standard").itertuples()
    assert (baseline.verdict, baseline.over, math.isnan(baseline.change)) == ("", "", True)


def test_nothing_measured_is_an_empty_table(scores):
    assert scores({}, {}).empty


def test_levels_and_their_mean_are_compared_apart(scores):
    fog = [Quantity("corruption", "bbox", "AP", "fog", level) for level in (1, 3, None)]
    found = scores(
        {quantity: {1: 10.0 + i} for i, quantity in enumerate(fog)},
        {quantity: {1: 10.0 - i} for i, quantity in enumerate(fog)},
    )
    assert select(found, arm="robust")["change"].tolist() == [0.0, 2.0, 4.0]
    assert select(found, arm="robust", level=None)["change"].tolist() == [4.0]


def test_attacked_categories_are_left_out(scores):
    category = Quantity("clean", "bbox", "AP-cat")
    attacked = [Quantity("attack", "bbox", metric, "l2, all", 1.0) for metric in ("AP50", "AP-cat")]
    found = scores({BOX: {2: 3.0}, category: {1: 1.0}} | {quantity: {1: 2.0} for quantity in attacked}, {})
    assert found["metric"].tolist() == ["AP", "AP-cat", "AP50"]
    assert of_categories(found).tolist() == [False, True, False]
