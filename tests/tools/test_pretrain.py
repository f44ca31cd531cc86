"""The tool as a user runs it, each run a process since Detectron2's set-up is for whole processes."""

import json
import math
import os
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

from rt_detectron.checkpoint.architectures import build_classifier

REPOSITORY = Path(__file__).parents[2]
TOOL = str(REPOSITORY / "tools" / "pretrain.py")
CONFIG = str(REPOSITORY / "configs" / "pretrain" / "demo_l2.py")
# The demo's recipe, whose evaluator moreover leaves the weights that each process evaluates.
RECORDING = f"""
from detectron2.config import LazyConfig
from recording import RecordingEvaluator

cfg = LazyConfig.load({CONFIG!r})
model, dataloader, optimizer = cfg.model, cfg.dataloader, cfg.optimizer
lr_multiplier, evaluator, train, threat_model = cfg.lr_multiplier, cfg.evaluator, cfg.train, cfg.threat_model
evaluator._target_ = RecordingEvaluator
"""
RECORDING_EVALUATOR = """
import torch
from detectron2.utils import comm
from rt_detectron.pretrain.evaluation import AccuracyEvaluator

class RecordingEvaluator(AccuracyEvaluator):
    def evaluate(self):
        torch.save(self.model.classifier.state_dict(), f"rank{comm.get_rank()}.pth")
        return super().evaluate()
"""


@pytest.fixture
def command(tiny_datasets, tmp_path):
    """Arguments of subprocess for a tiny training of the given config, on CPUs; output in tmp_path/out."""

    def command(config, *arguments):
        root = tiny_datasets / "demo" / "classification"
        overrides = {
            "dataloader.train.dataset.root": root / "train",
            "dataloader.test.dataset.root": root / "val",
            "dataloader.train.dataset.transform.transforms.0.size": 20,
            "dataloader.train.dataset.transform.transforms.1.size": 16,
            "dataloader.test.dataset.transform.transforms.0.size": 16,
            "dataloader.train.total_batch_size": 4,
            "dataloader.train.num_workers": 0,
            "dataloader.test.num_workers": 0,
            "evaluator.attack.steps": 1,
            "train.output_dir": "out",
        }
        pairs = [f"{key}={value}" for key, value in overrides.items()]
        environment = {"PYTHONPATH": f"{REPOSITORY}:{tmp_path}", "OMP_NUM_THREADS": "1"}
        environment |= {"PYTHONWARNINGS": "ignore", "CUDA_VISIBLE_DEVICES": ""}
        options = [argument for argument in arguments if "=" not in argument]
        pairs += [argument for argument in arguments if "=" in argument]
        launcher = [sys.executable]
        if "torchrun" in options:
            options.remove("torchrun")
            launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        return {
            "args": [*launcher, TOOL, "--config-file", config, *options, *pairs],
            "cwd": tmp_path,
            "env": {**os.environ, **environment},
            "text": True,
        }

    return command


def test_two_processes_train_one_classifier(command, tmp_path):
    (tmp_path / "recording_config.py").write_text(RECORDING)
    (tmp_path / "recording.py").write_text(RECORDING_EVALUATOR)
    arguments = ["--num-gpus", "2", "--dist-url", "auto", "train.epochs=1", "train.log_period=1"]
    finished = subprocess.run(**command("recording_config.py", *arguments), capture_output=True)
    assert finished.returncode == 0, finished.stderr
    with open(tmp_path / "out/metrics.json") as file:
        lines = [json.loads(line) for line in file]
    losses = [line["total_loss"] for line in lines if "total_loss" in line]
    assert len(losses) == 2  # 10 images in batches of 4; one process writes
    assert all(map(math.isfinite, losses))
    assert lines[-1]["accuracy/images"] == 10  # each image once, over both processes

    first, second = (torch.load(tmp_path / f"rank{rank}.pth", weights_only=True) for rank in (0, 1))
    saved = torch.load(tmp_path / "out/classifier.pth", weights_only=True)
    build_classifier("resnet18", 10).load_state_dict(saved["model"])
    assert saved["rt_detectron"]["norm"] == "l2"
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name
        assert torch.equal(tensor, saved["model"][name.removeprefix("network.")]), name
    assert saved["model"]["bn1.num_batches_tracked"] == 2


def test_a_corrupt_image_in_a_loaders_worker_is_one_line(command, tmp_path):
    for label in range(2):
        (tmp_path / "train" / str(label)).mkdir(parents=True)
        for i in range(2):
            Image.new("RGB", (16, 16)).save(tmp_path / "train" / str(label) / f"{i}.jpg")
    (tmp_path / "train/1/1.jpg").write_bytes(b"\xff\xd8\xff no image")
    overrides = ["dataloader.train.dataset.root=train", "dataloader.train.num_workers=1"]
    overrides += ["dataloader.test.dataset.root=train", "model.classifier.num_classes=2"]
    failed = subprocess.run(**command(CONFIG, *overrides), capture_output=True)
    assert failed.returncode == 2
    assert failed.stderr.splitlines()[-1].startswith("error: train/1/1.jpg: cannot be read (")
    assert failed.stderr.rstrip().endswith("repair or delete it, or set on_corrupt=skip")
    assert "Traceback" not in failed.stderr + failed.stdout
    assert not (tmp_path / "out/classifier.pth").exists()


BRIEFLY = ["train.epochs=2", "train.eval_epochs=2"]
TWO_PROCESSES = ["--num-gpus", "2", "--dist-url", "auto"]


def trained(command, folder, *arguments, config=CONFIG) -> dict:
    finished = subprocess.run(
        **command(config, *arguments, f"train.output_dir={folder}"), capture_output=True
    )
    assert finished.returncode == 0, finished.stderr
    return torch.load(folder / "model_final.pth", weights_only=True)["model"]


def farthest(one: dict, other: dict) -> float:
    return max((one[name] - other[name]).abs().max().item() for name in one)


def test_two_processes_of_torchrun_with_sync_bn_train_as_one(command, tmp_path):
    alone = trained(command, tmp_path / "one", *BRIEFLY)
    together = trained(command, tmp_path / "two", *BRIEFLY, "torchrun", "train.sync_bn=True")
    assert farthest(alone, together) < 2e-5


def test_accumulating_trains_as_more_processes_do(command, tmp_path):
    # Without an adversary, who would see BN statistics, which are of all parts and of one process.
    standard = {"config": CONFIG.replace("l2", "standard")}
    alone = trained(command, tmp_path / "one", *BRIEFLY, "train.accumulate=2", **standard)
    together = trained(command, tmp_path / "two", *BRIEFLY, *TWO_PROCESSES, **standard)
    learned = [name for name in alone if not name.endswith(("running_mean", "running_var", "tracked"))]
    assert farthest({name: alone[name] for name in learned}, together) < 2e-5


def heed_interrupts():
    """A shell starts its background jobs, such as these tests may be, with SIGINT ignored."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def test_an_interrupted_training_leaves_checkpoints_but_no_classifier(command, tmp_path):
    endless = ["train.epochs=10000", "train.log_period=1", "train.checkpoint_epochs=1"]
    process = subprocess.Popen(
        **command(CONFIG, *endless),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        preexec_fn=heed_interrupts,
    )
    deadline = time.monotonic() + 120
    while not (tmp_path / "out/last_checkpoint").exists():
        assert process.poll() is None
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    try:
        assert process.wait(60) != 0
    finally:
        process.kill()
    assert not list((tmp_path / "out").glob("classifier.pth*"))
    assert list((tmp_path / "out").glob("model_*.pth"))


@pytest.fixture
def run_here(monkeypatch, capfd):
    """The tool within this process, for runs that end before training: (exit status, out, err)."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", [TOOL, *arguments])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(TOOL, run_name="__main__")
        return end.value.code, *capfd.readouterr()

    return run


def test_help_shows_examples(run_here):
    status, out, _ = run_here("--help")
    assert status == 0
    assert "tools/pretrain.py --config-file configs/pretrain/resnet50_l2_eps3.py --num-gpus 8" in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "--config-file (none): no such file"),
        (["--config-file", "nowhere.py"], "--config-file nowhere.py: no such file"),
        (["--config-file", CONFIG, "train.epoch=1"], "unknown configuration key 'train.epoch'"),
        (["--config-file", CONFIG, "train.epochs"], "'train.epochs' is not of the form key=value"),
    ],
)
def test_mistakes_are_one_line(run_here, arguments, words):
    status, out, err = run_here(*arguments)
    assert (status, out) == (2, "")
    assert err.splitlines()[-1].startswith("error: ")
    assert words in err.splitlines()[-1]
    assert "Traceback" not in err
