import json
from pathlib import Path

import pytest

from rt_detectron.study.load import load_study
from rt_detectron.utils.errors import InputError

REPOSITORY = Path(__file__).parents[2]


def test_specification_survives_json(write_study):
    specification = load_study(write_study()).selection_trials()[0].specification()
    assert json.loads(json.dumps(specification)) == specification


@pytest.mark.parametrize(
    ("file", "key"),
    [("std.pkl", "weights_sha256"), ("mask.yaml", "config_sha256"), ("base.yaml", "config_sha256")],
)
def test_specification_notices_changed_files(write_study, tmp_path, file, key):
    before = load_study(write_study()).selection_trials()[0].specification()
    with (tmp_path / file).open("a") as stream:
        stream.write("\nX: 1\n")
    after = load_study("study.yaml").selection_trials()[0].specification()
    assert [name for name in before if before[name] != after[name]] == [key]


@pytest.mark.parametrize("seeds", [None, [3, 4]])
def test_selection_trains_and_scores_within_the_training_set(write_study, seeds):
    selection = {"opts": ["A.E", 9], **({"seeds": seeds} if seeds else {})}
    study = load_study(write_study(selection=selection, evaluations={"attack": ["TEST.ATTACK.STEPS", 5]}))
    trials = study.selection_trials()
    assert [trial.name for trial in trials[:3]] == [
        f"standard/mask/lr0.02/selection-seed{(seeds or [1, 2])[0]}",
        f"standard/mask/lr0.01/selection-seed{(seeds or [1, 2])[0]}",
        f"l2/mask/lr0.02/selection-seed{(seeds or [1, 2])[0]}",
    ]
    assert len({trial.name for trial in trials}) == len(trials) == 2 * 2 * len(seeds or [1, 2])
    expected = (
        "A.E 9 DATASETS.TRAIN ('a_train@fit', 'b@fit') DATASETS.TEST ('a_train@held_out', 'b@held_out')"
    )
    assert all(" ".join(trial.opts).endswith(expected) for trial in trials)
    assert {trial.evaluations for trial in trials} == {()}
    assert {trial.evaluations for trial in study.possible_trials()[len(trials) :]} == {
        ("TEST.ATTACK.STEPS", "5")
    }


@pytest.mark.parametrize(
    ("given", "expected"), [("('c@person',)", "('c@person@fit',)"), (["c", "d"], "('c@fit', 'd@fit')")]
)
def test_selection_takes_the_training_set_of_the_opts_first(write_study, given, expected):
    study = load_study(write_study(opts=["DATASETS.TRAIN", given]))
    opts = study.selection_trials()[0].opts
    assert opts[len(opts) - opts[::-1].index("DATASETS.TRAIN")] == expected


def test_selection_without_a_training_set(write_study, tmp_path):
    name = write_study()
    (tmp_path / "base.yaml").write_text("A: 1\n")
    with pytest.raises(InputError, match=r"detectors.mask: .* DATASETS.TRAIN must be given in mask.yaml"):
        load_study(name).selection_trials()


def test_final_trials_are_those_with_a_rate_chosen(write_study):
    study = load_study(write_study())
    trials = study.final_trials({("standard", "mask"): 0.01})
    assert [trial.name for trial in trials] == ["standard/mask/lr0.01/seed1", "standard/mask/lr0.01/seed2"]
    assert study.final_trials({}) == []
    assert study.count_trials() == 8 + 4


def test_one_rate_needs_no_selection(write_study):
    study = load_study(write_study(learning_rates=[0.02], selection={"seeds": [5]}))
    assert study.selection_trials() == []
    assert [trial.name for trial in study.final_trials({})] == [
        "standard/mask/lr0.02/seed1",
        "l2/mask/lr0.02/seed1",
        "standard/mask/lr0.02/seed2",
        "l2/mask/lr0.02/seed2",
    ]


def test_an_arm_may_have_a_baseline_of_its_own(write_study):
    arms = {
        "a": {"weights": "std.pkl"},
        "b": {"weights": "l2.pkl", "eps": 0.5},
        "c": {"weights": "std.pkl", "eps": 0, "baseline": "c"},
        "d": {"weights": "l2.pkl", "eps": "5e-1", "baseline": "c"},
    }
    study = load_study(write_study(arms=arms, baseline="a"))
    assert [study.baseline_of(name) for name in "abcd"] == ["a", "a", "c", "c"]
    assert [arm.eps for arm in study.arms] == [None, 0.5, 0.0, 0.5]
