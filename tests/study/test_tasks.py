from pathlib import Path

import pytest
from detectron2.config import LazyConfig

from rt_detectron.study.grid import Resources
from rt_detectron.study.tasks import DOWNSTREAM_TASKS

TOOLS, FOLDER = Path("tools"), Path("out/x")
DETECTION, TRANSFER = DOWNSTREAM_TASKS["detectors"], DOWNSTREAM_TASKS["transfers"]


@pytest.fixture
def trial(make_study):
    more = "evaluations: {attack: [TEST.ATTACK.STEPS, 5, TEST.ATTACK.L2_EPS, [0.5, 1]]}"
    study = make_study(opts=["A.D", 0.5], robust_opts=["A.B", [1, 2]], more=more)
    return study.final_trials()[1]


@pytest.fixture
def transfer_study(make_transfer_study):
    opts = "[dataset.name, cifar10, dataset.classes, [6, 7], dataset.downscale, null]"
    return make_transfer_study(opts=opts, rates=(0.1, 0.01))


def test_a_detector_is_trained_then_evaluated(trial):
    train, evaluate = DETECTION.steps(trial, TOOLS, FOLDER, Resources())
    assert "|".join(train.command) == (
        "tools/train_net.py|--config-file|mask.yaml|--resume|SOLVER.MAX_TO_KEEP|1"
        "|A.D|0.5|A.B|[1, 2]"
        "|OUTPUT_DIR|out/x|SOLVER.BASE_LR|0.02|SEED|1|MODEL.WEIGHTS|l2.pkl"
    )
    assert "|".join(evaluate.command) == (
        "tools/evaluate_robustness.py|--config-file|mask.yaml|--resume|SOLVER.MAX_TO_KEEP|1"
        "|A.D|0.5|A.B|[1, 2]"
        "|OUTPUT_DIR|out/x|SOLVER.BASE_LR|0.02|SEED|1|MODEL.WEIGHTS|out/x/model_final.pth"
        "|TEST.ATTACK.STEPS|5|TEST.ATTACK.L2_EPS|[0.5, 1]"
    )
    assert (train.result, evaluate.result) == ("results.json", "robustness.json")


def test_without_evaluations_a_trial_is_a_training(make_study):
    assert len(DETECTION.steps(make_study().final_trials()[0], TOOLS, FOLDER, Resources())) == 1


@pytest.mark.parametrize(("gpus", "given"), [(0, False), (0.5, False), (1.0, False), (8.0, True)])
def test_several_gpus_are_all_used(trial, transfer_study, gpus, given):
    steps = DETECTION.steps(trial, TOOLS, FOLDER, Resources(gpus=gpus))
    steps += TRANSFER.steps(transfer_study.selection_trials()[0], TOOLS, FOLDER, Resources(gpus=gpus))
    for step in steps:
        assert ("--num-gpus 8 --dist-url auto" in " ".join(step.command)) == given


@pytest.mark.parametrize(
    ("metrics", "score"),
    [
        ({"bbox": {"AP": 3.5}, "segm": {"AP": 9.0}}, 3.5),
        ({"segm": {"AP": 9.0}}, 9.0),
        ({"bbox": {"AP": None}, "segm": {"AP": 9.0}}, None),
        ({"bbox": {"AP": float("nan")}}, None),
        ({}, None),
        ({"a": {"bbox": {"AP": 3.0}}, "b": {"bbox": {"AP": 4.0}}}, 3.5),
        ({"a": {"bbox": {"AP": 3.0}}, "b": {"bbox": {"AP": None}}}, None),
    ],
)
def test_a_detector_scores_by_box_ap(metrics, score):
    assert DETECTION.score({"metrics": metrics}) == score


@pytest.mark.parametrize(
    ("metrics", "score"),
    [
        ({"accuracy": {"accuracy": 81.5, "top1": 90.0}}, 81.5),
        ({"accuracy": {"accuracy": None}}, None),
        ({}, None),
    ],
)
def test_a_transfer_scores_by_its_data_sets_accuracy(metrics, score):
    assert TRANSFER.score({"metrics": metrics}) == score


def test_a_transfer_is_one_process_whose_overrides_hydra_reads(transfer_study):
    (step,) = TRANSFER.steps(transfer_study.selection_trials()[0], TOOLS, Path("out/it's x"), Resources())
    tool, option, config, resume, *overrides = step.command
    assert (tool, option, config, resume) == ("tools/transfer.py", "--config-file", "fixed.py", "--resume")
    cfg = LazyConfig.apply_overrides(LazyConfig.load(config), overrides)
    assert cfg.weights == "std.pkl"
    assert cfg.train == {"output_dir": "out/it's x", "seed": 1}
    assert cfg.optimizer == {"lr": 0.1}
    assert cfg.dataset == {"name": "cifar10", "classes": [6, 7], "downscale": None, "held_out": True}


def test_a_transfers_final_trials_use_the_whole_training_set(transfer_study):
    (step,) = TRANSFER.steps(
        transfer_study.final_trials({("standard", "cifar10"): 0.1})[0], TOOLS, FOLDER, Resources()
    )
    assert "held_out" not in " ".join(step.command)


def test_the_digest_sees_what_a_config_imports(transfer_study, tmp_path):
    before = TRANSFER.digest("fixed.py")
    assert before == transfer_study.targets[0].config_sha256
    (tmp_path / "common" / "base.py").write_text("dataset = dict(name='other')\n")
    assert TRANSFER.digest("fixed.py") != before
