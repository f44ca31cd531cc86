from pathlib import Path

import pytest

from rt_detectron.study.load import load_study
from rt_detectron.study.record import Outcome
from rt_detectron.study.selection import choose


@pytest.fixture
def choose_by(make_study):
    """``choose_by(scores)``: the choices where the AP of each arm is ``scores[rate][seed]``."""

    def choose_by(scores, error=None):
        seeds = next(iter(scores.values()))
        study = make_study(learning_rates=list(scores), more=f"selection: {{seeds: {list(seeds)}}}")
        outcomes = [
            Outcome(trial, Path(), {"metrics": {"bbox": {"AP": scores[trial.learning_rate][trial.seed]}}})
            for trial in study.selection_trials()
        ]
        if error:
            outcomes[0] = Outcome(outcomes[0].trial, Path(), None, error=error)
        return choose(study, outcomes)

    return choose_by


def test_best_mean_over_the_seeds_wins(choose_by):
    choices = choose_by({0.02: {1: 9.0, 2: 1.0}, 0.01: {1: 5.0, 2: 6.0}, 0.005: {1: 5.0, 2: 5.0}})
    assert [(choice.arm, choice.target, choice.learning_rate) for choice in choices] == [
        ("standard", "mask_rcnn", 0.01),
        ("robust", "mask_rcnn", 0.01),
    ]
    assert choices[0].scores == {0.005: 5.0, 0.01: 5.5, 0.02: 5.0}
    assert not choices[0].at_border


def outcomes_of(study, scores):
    """Those of the selection, from (arm, rate) -> the AP of each seed."""
    return [
        Outcome(t, Path(), {"metrics": {"bbox": {"AP": scores[t.arm, t.learning_rate][t.seed - 1]}}})
        for t in study.selection_trials()
    ]


def test_rates_within_a_standard_error_go_to_the_one_that_most_arms_chose(write_study):
    """21 against 20 right of 80 images once decided an arm's rate."""
    arms = {name: {"weights": "std.pkl"} for name in ("standard", "a", "b")}
    study = load_study(write_study(arms=arms, learning_rates=[0.01, 0.1], seeds=[1, 2, 3]))
    assert study.selection.seeds == (1, 2, 3)
    scores = {
        ("standard", 0.01): [20, 22, 21], ("standard", 0.1): [30, 32, 31],
        ("a", 0.01): [20, 22, 21], ("a", 0.1): [30, 32, 31],
        ("b", 0.01): [31, 33, 32], ("b", 0.1): [31, 32.5, 31.5],
    }  # fmt: skip
    outcomes = outcomes_of(study, scores)
    choices = {choice.arm: choice for choice in choose(study, outcomes)}
    assert {arm: choice.learning_rate for arm, choice in choices.items()} == dict.fromkeys(arms, 0.1)
    assert choices["b"].tied == (0.01, 0.1)
    assert choices["a"].tied == (0.1,)
    assert choices["a"].common_rate == 0.1
    scores["b", 0.01] = [41, 43, 42]  # no tie any more
    assert choose(study, outcomes_of(study, scores))[2].learning_rate == 0.01


def test_by_default_three_seeds_choose(make_study):
    rates = [0.1, 0.01]
    assert make_study(learning_rates=rates, seeds=[5, 6, 7, 8]).selection.seeds == (5, 6, 7)
    assert make_study(learning_rates=rates, seeds=[5, 6]).selection.seeds == (5, 6)


@pytest.mark.parametrize(("best", "at_border"), [(0.001, True), (0.01, False), (0.1, True)])
def test_a_best_rate_at_the_grids_border_is_noted(choose_by, best, at_border):
    choice = choose_by({rate: {1: 7.0 if rate == best else 3.0} for rate in (0.1, 0.001, 0.01)})[0]
    assert (choice.learning_rate, choice.at_border) == (best, at_border)


def test_smallest_of_equally_good_rates(choose_by):
    assert choose_by({0.1: {1: 4.0}, 0.01: {1: 4.0}, 0.001: {1: 2.0}})[0].learning_rate == 0.01


def test_finding_nothing_is_an_ap_of_zero(choose_by):
    choice = choose_by({0.1: {1: None, 2: 1.0}, 0.01: {1: 1.0, 2: 1.0}})[0]
    assert choice.scores == {0.01: 1.0, 0.1: 0.5}


def test_no_defined_ap_at_all_is_an_error(choose_by):
    choice = choose_by({0.1: {1: None}, 0.01: {1: None}})[0]
    assert choice.learning_rate is None
    assert (
        choice.error == "no learning rate for standard on mask_rcnn: AP on the held-out images is undefined"
    )


def test_a_crash_leaves_the_choice_open(choose_by):
    crashed, other = choose_by({0.1: {1: 3.0}, 0.01: {1: 2.0}}, error="exit status 1")
    assert crashed.learning_rate is None
    assert crashed.error == (
        "no learning rate for standard on mask_rcnn: standard/mask_rcnn/lr0.1/selection-seed1 failed"
    )
    assert other.learning_rate == 0.1


def test_choice_waits_for_the_last_trial(make_study):
    study = make_study(learning_rates=[0.1, 0.01])
    outcomes = [
        Outcome(trial, Path(), {"metrics": {"bbox": {"AP": 1.0}}}) for trial in study.selection_trials()
    ]
    assert choose(study, outcomes[:-1]) == []  # ties are for the rate that most arms of the target choose
    assert [choice.arm for choice in choose(study, outcomes)] == ["standard", "robust"]
    assert choose(study, []) == []
