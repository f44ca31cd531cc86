from pathlib import Path

import pytest

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


@pytest.mark.parametrize(("best", "at_border"), [(0.001, True), (0.01, False), (0.1, True)])
def test_a_best_rate_at_the_grids_border_is_noted(choose_by, best, at_border):
    choice = choose_by({rate: {1: 7.0 if rate == best else 3.0} for rate in (0.1, 0.001, 0.01)})[0]
    assert (choice.learning_rate, choice.at_border) == (best, at_border)


def test_smallest_of_equally_good_rates(choose_by):
    assert choose_by({0.1: {1: 4.0}, 0.01: {1: 4.0}, 0.001: {1: 2.0}})[0].learning_rate == 0.01


def test_undefined_ap_is_no_score(choose_by):
    choice = choose_by({0.1: {1: None, 2: 9.0}, 0.01: {1: 1.0, 2: 1.0}})[0]
    assert (choice.learning_rate, choice.scores) == (0.01, {0.01: 1.0, 0.1: None})


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
    assert [choice.arm for choice in choose(study, outcomes[:-1])] == ["standard"]
    assert choose(study, []) == []
