"""Trainings of detectors that are killed, that fail in one of their processes, or that are refused."""

import functools
import importlib
import random
import shutil
import time
from pathlib import Path

import faults
import pytest
import torch
from small_detectors import SMALL, differences
from tool_process import ToolProcess, run_tool

REPOSITORY = Path(__file__).parents[2]
TOOL = str(REPOSITORY / "tools" / "train_net.py")
CONFIG = str(REPOSITORY / "configs" / "demo" / "mask_rcnn_r18_fpn.yaml")
# Imports what registers the small detector.
small = functools.partial(importlib.import_module, "small_detectors")


@pytest.fixture
def command(tool_server, tiny_opts):
    """``command(arguments ..., KEY=value ...)``: the tool's, for a tiny training of a small detector."""

    def command(*arguments, **keys):
        options = {**dict(zip(tiny_opts[::2], tiny_opts[1::2], strict=True)), **SMALL, **keys}
        words = [TOOL, "--config-file", CONFIG, *arguments]
        return [str(word) for word in (*words, *[part for pair in options.items() for part in pair])]

    return command


def load(path: Path) -> dict:
    return torch.load(path, weights_only=True)


def killed_at_random_moments(command, folder: Path, iterations: int, kills: int, seed: int) -> None:
    """What comes of a training that was killed so often is what comes of one that was not."""
    keys = {"SOLVER.MAX_ITER": iterations, "SOLVER.CHECKPOINT_PERIOD": 2, "SOLVER.EMA": 0.9, "SEED": -1}
    keys |= {
        "SOLVER.ADVERSARIAL.REPLAYS": 3,
        "DATALOADER.NUM_WORKERS": 1,
        "TEST.EVAL_PERIOD": iterations // 2,
    }
    generator = random.Random(seed)
    start = time.monotonic()
    whole = run_tool(command(OUTPUT_DIR="whole", **keys), folder, prepare=small)
    duration = time.monotonic() - start
    assert whole.returncode == 0, whole.stderr
    # All others go on from its first checkpoint, since that holds the seed that was drawn.
    tag = folder / "out/last_checkpoint"
    tag.parent.mkdir()
    shutil.copy(folder / "whole/model_0000001.pth", tag.parent)
    tag.write_text("model_0000001.pth")
    killed = 0
    for number in range(kills):
        before = tag.read_text()
        process = ToolProcess(command("--resume", OUTPUT_DIR="out", **keys), folder, prepare=small)
        # Soon after it has saved, or at any moment of its start.
        while number % 2 == 0 and tag.read_text() == before and process.poll() is None:
            time.sleep(0.01)
        time.sleep(generator.uniform(0, duration / kills / (5 if number % 2 == 0 else 1)))
        if process.poll() is not None:
            break  # it was faster
        process.kill()
        process.wait(60)
        killed += 1
    assert killed >= kills / 2
    resumed = run_tool(command("--resume", OUTPUT_DIR="out", **keys), folder, prepare=small)
    assert resumed.returncode == 0, resumed.stderr
    assert not differences(load(folder / "whole/model_final.pth"), load(folder / "out/model_final.pth"))
    assert (folder / "whole/inference/coco_instances_results.json").read_text() == (
        folder / "out/inference/coco_instances_results.json"
    ).read_text()
    assert not list((folder / "out").glob("*.tmp"))


def test_a_killed_training_goes_on_bit_by_bit(command, tmp_path):
    killed_at_random_moments(command, tmp_path, iterations=8, kills=2, seed=0)


@pytest.mark.slow
def test_twenty_times_killed(command, tmp_path):
    killed_at_random_moments(command, tmp_path, iterations=80, kills=20, seed=1)


@pytest.mark.parametrize("fault", [faults.detectors_loss_is_not_finite, faults.detectors_forward_raises])
def test_a_process_that_diverges_alone_ends_both_in_one_line(command, two_processes, tmp_path, fault):
    keys = {"OUTPUT_DIR": "out", "SOLVER.CHECKPOINT_PERIOD": 1, "SOLVER.MAX_ITER": 9}
    ended = run_tool(command(*two_processes(), **keys), tmp_path, prepare=functools.partial(_both, fault))
    assert ended.returncode == 2, ended.stderr
    assert "Traceback" not in ended.stderr + ended.stdout
    assert ended.stderr.splitlines()[-1] == (
        "error: the training diverged around iteration 1; log.txt says how. out/model_0000000.pth is from "
        "before that: go on from it with --resume and a lower SOLVER.BASE_LR, or with "
        "SOLVER.CLIP_GRADIENTS.ENABLED True"
    )
    assert [path.name for path in (tmp_path / "out").glob("*.pth")] == ["model_0000000.pth"]


def test_a_signal_to_one_process_during_an_evaluation_ends_both(command, two_processes, tmp_path):
    keys = {"OUTPUT_DIR": "out", "TEST.EVAL_PERIOD": 2, "SOLVER.MAX_ITER": 9}
    fault = functools.partial(_both, faults.told_to_stop_during_an_evaluation)
    ended = run_tool(command(*two_processes(), **keys), tmp_path, prepare=fault)
    assert ended.returncode == 0, ended.stderr
    assert "Traceback" not in ended.stderr
    assert (tmp_path / "out/last_checkpoint").read_text() == "model_0000001.pth"
    assert load(tmp_path / "out/model_0000001.pth")["iteration"] == 1


def _both(fault) -> None:
    small()
    fault()


@pytest.mark.parametrize(
    ("arguments", "keys", "words"),
    [
        (
            (),
            {"INPUT.FORMAT": "BGR", "MODEL.WEIGHTS": "", "SOLVER.IMS_PER_BATCH": 0},
            "SOLVER.IMS_PER_BATCH is 0",
        ),
        ((), {"MODEL.ROI_HEADS.NUM_CLASSES": 80}, "set MODEL.ROI_HEADS.NUM_CLASSES 10"),
        (("--resume",), {"SOLVER.AMP.ENABLED": True, "MODEL.DEVICE": "cpu"}, "mixed precision needs a GPU"),
    ],
    ids=["batch", "classes", "mixed precision"],
)
def test_a_refused_run_leaves_the_config_of_the_one_before(command, tmp_path, arguments, keys, words):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/config.yaml").write_text("of the one before")
    ended = run_tool(command(*arguments, OUTPUT_DIR="out", **keys), tmp_path, prepare=small)
    assert ended.returncode == 2
    assert words in ended.stderr.splitlines()[-1]
    assert "Traceback" not in ended.stderr
    assert (tmp_path / "out/config.yaml").read_text() == "of the one before"


@pytest.mark.parametrize("left", ["model_final.pth", "model_0000007.pth"])
def test_a_used_folder_is_refused_without_resume(command, tmp_path, left):
    (tmp_path / "out").mkdir()
    for name in (left, "config.yaml"):
        (tmp_path / "out" / name).write_text("kept")
    ended = run_tool(command(OUTPUT_DIR="out"), tmp_path, prepare=small)
    assert ended.returncode == 2
    assert ended.stderr.splitlines()[-1] == (
        "error: out holds a training: add --resume to go on with it, or choose another OUTPUT_DIR"
    )
    found = {path.name: path.read_text() for path in (tmp_path / "out").glob("[!.]*")}
    assert found == {left: "kept", "config.yaml": "kept"}


def test_a_batch_that_processes_cannot_share_is_one_line(command, two_processes, tmp_path):
    ended = run_tool(
        command(*two_processes(), OUTPUT_DIR="out", **{"SOLVER.IMS_PER_BATCH": 3}), tmp_path, prepare=small
    )
    assert ended.returncode == 2
    assert ended.stderr.splitlines()[-1] == (
        "error: SOLVER.IMS_PER_BATCH is 3; it must be a multiple of the 2 processes: 4, say"
    )
