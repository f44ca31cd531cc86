from pathlib import Path

import pytest

from rt_detectron.study.grid import Resources
from rt_detectron.study.steps import selection_score, trial_steps

TOOLS, FOLDER = Path("tools"), Path("out/x")


@pytest.fixture
def trial(make_study):
    more = "evaluations: {attack: [TEST.ATTACK.STEPS, 5, TEST.ATTACK.L2_EPS, [0.5, 1]]}"
    study = make_study(opts=["A.D", 0.5], robust_opts=["A.B", [1, 2]], more=more)
    return study.final_trials()[1]


def test_commands_are_train_nets_then_evaluate_robustness(trial):
    train, evaluate = trial_steps(trial, TOOLS, FOLDER, Resources())
    assert "|".join(train.command) == (
        "tools/train_net.py|--config-file|mask.yaml|--resume|A.D|0.5|A.B|[1, 2]"
        "|OUTPUT_DIR|out/x|SOLVER.BASE_LR|0.02|SEED|1|MODEL.WEIGHTS|l2.pkl"
    )
    assert "|".join(evaluate.command) == (
        "tools/evaluate_robustness.py|--config-file|mask.yaml|--resume|A.D|0.5|A.B|[1, 2]"
        "|OUTPUT_DIR|out/x|SOLVER.BASE_LR|0.02|SEED|1|MODEL.WEIGHTS|out/x/model_final.pth"
        "|TEST.ATTACK.STEPS|5|TEST.ATTACK.L2_EPS|[0.5, 1]"
    )
    assert (train.result, evaluate.result) == ("results.json", "robustness.json")


def test_without_evaluations_a_trial_is_a_training(make_study):
    assert len(trial_steps(make_study().final_trials()[0], TOOLS, FOLDER, Resources())) == 1


@pytest.mark.parametrize(("gpus", "given"), [(0, False), (0.5, False), (1.0, False), (8.0, True)])
def test_several_gpus_are_all_used(trial, gpus, given):
    for step in trial_steps(trial, TOOLS, FOLDER, Resources(gpus=gpus)):
        assert ("--num-gpus 8 --dist-url auto" in " ".join(step.command)) == given


@pytest.mark.parametrize(
    ("metrics", "score"),
    [
        ({"bbox": {"AP": 3.5}, "segm": {"AP": 9.0}}, 3.5),
        ({"segm": {"AP": 9.0}}, 9.0),
        ({"bbox": {"AP": None}, "segm": {"AP": 9.0}}, None),
        ({"bbox": {"AP": float("nan")}}, None),
        ({}, None),
    ],
)
def test_score_is_box_ap(metrics, score):
    assert selection_score({"metrics": metrics}) == score
