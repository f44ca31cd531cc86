import numpy as np
import pytest

from rt_detectron.study.answers import answers, cautions, common_rate_changes
from rt_detectron.study.load import load_study
from rt_detectron.study.record import Outcome
from rt_detectron.study.report import terminal_table
from rt_detectron.study.selection import Choice
from rt_detectron.study.statistics import Quantity, compare

BOX = Quantity("clean", "bbox")


@pytest.fixture
def compared(write_study, make_table):
    """``compared({(target, arm): [a score of each seed]})``: the comparison; ``changes``: of study.yaml."""

    def compared(values, **changes):
        arms = {arm: {"weights": "std.pkl"} for arm in dict.fromkeys(arm for _, arm in values)}
        targets = {
            target: {"config": "mask.yaml"} for target in dict.fromkeys(target for target, _ in values)
        }
        study = load_study(
            write_study(**{"arms": arms, "detectors": targets, "learning_rates": [0.02], **changes})
        )
        table = make_table({cell: {BOX: dict(enumerate(scores, 1))} for cell, scores in values.items()})
        outcomes = [
            Outcome(trial, None, {"datasets": [{"name": trial.target, "images": 600}]})
            for trial in study.final_trials()
        ]
        return compare(study, outcomes, table)

    return compared


def plain(text):
    return text.replace("\N{MINUS SIGN}", "-")


PAIR = {("mask", "standard"): [20.0, 20.2, 20.4], ("mask", "robust"): [21.5, 21.6, 21.7]}


def test_the_answer_is_one_sentence_with_its_size(compared):
    (answer,) = answers(compared(PAIR), [])
    assert answer.sentences == [
        "mask: this checkpoint of robust is better than standard by 1.40 box AP [0.98, 1.82]; "
        "3 seeds of each arm, 600 test images."
    ]
    assert answer.verdict == "better"
    assert answer.counts == "1 comparison of an arm with its baseline on a target: 1 better."


def test_an_undecided_answer_bounds_the_difference(compared):
    pair = {**PAIR, ("mask", "robust"): [20.0, 21.0, 19.9]}
    (answer,) = answers(compared(pair), [])
    (sentence,) = map(plain, answer.sentences)
    assert sentence.startswith(
        "mask: this checkpoint of robust is not significantly different from standard: +0.10 box AP [-1."
    )
    low, high = (float(end) for end in sentence[sentence.index("[") + 1 : sentence.index("]")].split(","))
    assert f"any difference is below {max(-low, high):.2f}; 3 seeds of each arm" in sentence


def test_a_margin_makes_no_difference_an_answer(compared):
    pair = {**PAIR, ("mask", "robust"): [20.1, 20.2, 20.3]}
    (answer,) = answers(compared(pair, margin=0.5), [])
    assert answer.verdict == "equivalent"
    assert "differs from standard by no more than 0.5 box AP: 0.00 [" in answer.sentences[0]
    assert answer.counts.endswith(": 1 no difference beyond 0.5.")


def test_several_checkpoints_speak_for_their_recipe(compared, tmp_path):
    for seed in (1, 2, 3):
        (tmp_path / f"l2_{seed}.pkl").write_text(str(seed))
    arms = {
        "standard": {"weights": "l2_{seed}.pkl", "eps": 0},
        "robust": {"weights": "l2_{seed}.pkl", "eps": 0.5},
    }
    comparison = compared(PAIR, arms=arms)
    (answer,) = answers(comparison, [])
    assert "this checkpoint" not in answer.sentences[0]
    assert "robust (eps 0.5)" in answer.sentences[0]
    assert not any("One checkpoint" in text for text in cautions(comparison, [], [answer]))


def test_targets_are_pooled_and_the_arm_is_chosen_on_held_out_data(compared):
    values = {
        (target, arm): [base + shift, base + shift + 0.1, base + shift + 0.2]
        for target, base in (("a", 10), ("b", 30))
        for arm, shift in (("standard", 0), ("r1", 1), ("r2", 2))
    }
    comparison = compared(values)
    (answer,) = answers(comparison, [])
    assert answer.sentences[0].startswith(
        "Mean of 2 data sets: this checkpoint of r2 is better than standard by 2.00"
    )
    assert ", 1,200 test images" in answer.sentences[0]
    choices = [Choice(arm, t, 0.1, {0.1: 9.0 if arm == "r1" else 3.0}, False) for t, arm in values]
    (answer,) = answers(comparison, choices)
    assert answer.sentences[0].startswith(
        "Mean of 2 data sets: the checkpoint that is best on held-out images (r1) is better than standard by "
    )


def test_cautions_say_what_the_intervals_leave_out(compared):
    comparison = compared({**PAIR, ("mask", "robust"): [21.5]}, seeds=[1, 2, 3])
    found = answers(comparison, [])
    text = " ".join(cautions(comparison, [], found))
    assert text.startswith("One checkpoint each: every arm.")
    assert (
        "Not covered, since there is nothing to resample: the choice of test images (on clean images)" in text
    )
    assert "take the spread that is pooled over the arms" in text
    assert "With 1 run an interval is wide" in text
    single = compared({cell: values[:1] for cell, values in PAIR.items()})
    (answer,) = answers(single, [])
    assert answer.sentences[0].endswith(
        "differs from standard by +1.50 box AP, perhaps by chance: there is no interval; 1 seed of each arm, "
        "600 test images."
    )
    assert "A difference without an interval may be due to chance." in cautions(single, [], [answer])
    (nothing,) = cautions(compared({("mask", "standard"): [1.0], ("mask", "robust"): [np.nan]}), [], [])
    assert nothing.startswith("No arm can be compared")


def test_cautions_name_learning_rates_at_the_border(compared):
    comparison = compared(PAIR)
    choices = [Choice(arm, "mask", 0.1, {0.1: 3.0}, arm == "robust") for arm in ("robust", "standard")]
    assert cautions(comparison, choices, answers(comparison, choices))[-1] == (
        "The best learning rate is at the border of the grid for robust (mask): a better one may lie outside."
    )


def test_what_the_choice_of_rates_changes(compared):
    comparison = compared(PAIR)
    choices = [
        Choice("standard", "mask", 0.01, {0.01: 20.0, 0.1: 19.0}, True, common_rate=0.1),
        Choice("robust", "mask", 0.1, {0.01: 18.0, 0.1: 19.5}, True, common_rate=0.1),
    ]
    (change,) = common_rate_changes(comparison.study, choices)
    assert (change["own"], change["common"], change["common_rate"]) == (-0.5, 0.5, 0.1)


def test_terminal_table_has_a_line_per_arm_with_interval_and_verdict(compared):
    lines = terminal_table(compared(PAIR).scores).splitlines()
    assert len(lines) == 4
    assert lines[3].split() == [
        "box",
        "AP",
        "mask",
        "robust",
        "0.01",
        "3",
        "21.60",
        "±",
        "0.10",
        "+1.40",
        "[+0.98,",
        "+1.82]",
        "better",
    ]
