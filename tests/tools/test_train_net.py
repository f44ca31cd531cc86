"""The tool as a user runs it, each run a process since Detectron2's set-up is for whole processes."""

import json
import math
from pathlib import Path

import pytest
import torch

REPOSITORY = Path(__file__).parents[2]
TOOL = str(REPOSITORY / "tools" / "train_net.py")
CONFIG = str(REPOSITORY / "configs" / "demo" / "mask_rcnn_r18_fpn.yaml")


def test_two_processes_train_then_one_evaluates_the_same(run, two_processes, tiny_opts, tmp_path):
    trained = run(*two_processes(), *tiny_opts, "SOLVER.MAX_ITER", 2, "OUTPUT_DIR", "trained")
    assert trained.returncode == 0, trained.stderr
    assert trained.stdout.rstrip().endswith("Wrote trained/results.json")
    with open(tmp_path / "trained/metrics.json") as file:
        losses = [line["total_loss"] for line in map(json.loads, file) if "total_loss" in line]
    assert len(losses) == 1  # one process writes
    assert math.isfinite(losses[0])
    results = json.loads((tmp_path / "trained/results.json").read_text())
    assert (results["iterations"], results["seed"]) == (2, 1)
    assert set(results["metrics"]) == {"bbox", "segm"}
    weights = tmp_path / "trained/model_final.pth"
    assert torch.load(weights, weights_only=True)["rt_detectron"]["arch"] == "resnet18"
    assert "backbone.pkl" in (tmp_path / "trained/config.yaml").read_text()
    assert "building resnet18" in (tmp_path / "trained/log.txt").read_text()

    # Into the training's folder, which keeps what is there.
    evaluated = run("--eval-only", *tiny_opts, "MODEL.WEIGHTS", weights, "OUTPUT_DIR", "trained")
    assert evaluated.returncode == 0, evaluated.stderr
    assert evaluated.stdout.rstrip().endswith("Wrote trained/evaluation/results.json")
    assert json.loads((tmp_path / "trained/results.json").read_text()) == results
    assert "backbone.pkl" in (tmp_path / "trained/config.yaml").read_text()
    again = json.loads((tmp_path / "trained/evaluation/results.json").read_text())
    assert again["metrics"] == results["metrics"]
    assert again["iterations"] == 0
    assert again["weights"] == str(weights)
    # Both processes evaluated with the weights that were saved.
    first, second = (
        sorted(
            [p["image_id"], p["category_id"], round(p["score"], 4), [round(x, 1) for x in p["bbox"]]]
            for p in json.loads((tmp_path / folder / "inference/coco_instances_results.json").read_text())
        )
        for folder in ("trained", "trained/evaluation")
    )
    assert len(first) > 10
    assert [p[:2] for p in first] == [p[:2] for p in second]
    assert [p[2] for p in first] == pytest.approx([p[2] for p in second], abs=2e-4)


def test_a_mistake_in_two_processes_is_still_one_line(run, two_processes, tiny_opts):
    failed = run(*two_processes(), *tiny_opts, "MODEL.ROI_HEADS.NUM_CLASSES", 80)
    assert failed.returncode == 2
    assert "Traceback" not in failed.stderr
    assert [line for line in failed.stderr.splitlines() if line.startswith("error: ")] == [
        "error: MODEL.ROI_HEADS.NUM_CLASSES is 80, but rt_demo_train has 10 classes; "
        "set MODEL.ROI_HEADS.NUM_CLASSES 10"
    ]
    assert failed.stderr.splitlines()[-1].startswith("error: ")


@pytest.mark.parametrize(("weights", "words"), [(None, "not a backbone"), ("", "no weights are given")])
def test_only_a_trained_detector_is_evaluated(run, tiny_opts, weights, words):
    own = [] if weights is None else ["MODEL.WEIGHTS", weights]
    done = run("--eval-only", *tiny_opts, *own, "OUTPUT_DIR", "refused")
    assert done.returncode == 2
    assert words in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_help_shows_examples(run_here):
    status, out, _ = run_here("--help")
    assert status == 0
    assert "tools/train_net.py --config-file configs/robust_r50_eps3.yaml --resume" in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "--config-file (none): no such file"),
        (["--config-file", "nowhere.yaml"], "--config-file nowhere.yaml: no such file"),
        (
            ["--config-file", CONFIG, "SOLVER.BASE_RL", "1"],
            "no key SOLVER.BASE_RL; did you mean SOLVER.BASE_LR",
        ),
        (["--config-file", CONFIG, "DATASETS.TRAIN", "('coco_2017_trian',)"], "did you mean coco_2017_train"),
        (["--config-file", CONFIG, "--eval-only", "DATASETS.TEST", "('zzz',)"], "'zzz' is not registered"),
    ],
)
def test_mistakes_are_one_line(run_here, arguments, words):
    status, out, err = run_here(*arguments)
    assert (status, out) == (2, "")
    assert err.splitlines()[-1].startswith("error: ")
    assert words in err.splitlines()[-1]
    assert "Traceback" not in err
