"""The tool as a user runs it, each run a process since Detectron2's set-up is for whole processes."""

import functools
import json
import math
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import faults
import pytest
import torch
from PIL import Image
from tool_process import ENVIRONMENT, ToolProcess, run_tool

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
def command(tiny_datasets):
    """The tool's path and arguments for a tiny training of the given config; output in out."""

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
        options = [argument for argument in arguments if "=" not in argument]
        pairs += [argument for argument in arguments if "=" in argument]
        return [TOOL, "--config-file", config, *options, *pairs]

    return command


@pytest.fixture
def run(command, tool_server, tmp_path):
    """``run(config, arguments ...)``: the completed process of such a training, in tmp_path."""
    return lambda config, *arguments, **options: run_tool(command(config, *arguments), tmp_path, **options)


@pytest.fixture
def as_users_do(command, tmp_path):
    """``as_users_do(config, arguments ...)``: subprocess's arguments for it; "torchrun" may be among them."""

    def as_users_do(config, *arguments):
        launcher = [sys.executable]
        if "torchrun" in arguments:
            launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        given = command(config, *(argument for argument in arguments if argument != "torchrun"))
        environment = {**os.environ, **ENVIRONMENT, "PYTHONPATH": f"{REPOSITORY}:{tmp_path}"}
        return {"args": [*launcher, *given], "cwd": tmp_path, "env": environment, "text": True}

    return as_users_do


@pytest.mark.slow  # test_accumulating_trains_as_more_processes_do has two processes, too
def test_two_processes_train_one_classifier(as_users_do, two_processes, tmp_path):
    (tmp_path / "recording_config.py").write_text(RECORDING)
    (tmp_path / "recording.py").write_text(RECORDING_EVALUATOR)
    arguments = [*two_processes(), "train.epochs=1", "train.log_period=1"]
    finished = subprocess.run(**as_users_do("recording_config.py", *arguments), capture_output=True)
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


def test_a_corrupt_image_in_a_loaders_worker_is_one_line(run, tmp_path):
    for label in range(2):
        (tmp_path / "train" / str(label)).mkdir(parents=True)
        for i in range(2):
            Image.new("RGB", (16, 16)).save(tmp_path / "train" / str(label) / f"{i}.jpg")
    (tmp_path / "train/1/1.jpg").write_bytes(b"\xff\xd8\xff no image")
    overrides = ["dataloader.train.dataset.root=train", "dataloader.train.num_workers=1"]
    overrides += ["dataloader.test.dataset.root=train", "model.classifier.num_classes=2"]
    failed = run(CONFIG, *overrides)
    assert failed.returncode == 2
    assert failed.stderr.splitlines()[-1].startswith("error: train/1/1.jpg: cannot be read (")
    assert failed.stderr.rstrip().endswith("repair or delete it, or set on_corrupt=skip")
    assert "Traceback" not in failed.stderr + failed.stdout
    assert not (tmp_path / "out/classifier.pth").exists()


# Rounding errors grow before long: two steps, in batches of 8.
BRIEFLY = [
    "train.epochs=2",
    "train.eval_epochs=2",
    "dataloader.train.total_batch_size=8",
    "optimizer.lr=0.002",
]
BRIEFLY += [
    f"dataloader.{key}={size}"
    for key, size in {
        "train.dataset.transform.transforms.0.size": 66,
        "train.dataset.transform.transforms.1.size": 64,
        "test.dataset.transform.transforms.0.size": 64,
    }.items()
]


@pytest.fixture
def trained(run, as_users_do):
    """``trained(folder, arguments ...)``: the network that the training into the folder ends with."""

    def trained(folder, *arguments, config=CONFIG) -> dict:
        arguments = [*arguments, f"train.output_dir={folder}"]
        if "torchrun" in arguments:
            finished = subprocess.run(**as_users_do(config, *arguments), capture_output=True)
        else:
            finished = run(config, *arguments)
        assert finished.returncode == 0, finished.stderr
        return torch.load(folder / "model_final.pth", weights_only=True)["model"]

    return trained


def farthest(one: dict, other: dict) -> float:
    return max((one[name] - other[name]).abs().max().item() for name in one)


@pytest.mark.parametrize("launcher", ["launch", pytest.param("torchrun", marks=pytest.mark.slow)])
def test_two_processes_with_sync_bn_train_as_one(trained, two_processes, tmp_path, launcher):
    # One step: in a second one an attack on weights that differ by rounding already goes elsewhere, how far
    # depends on the machine. Already the first makes more of rounding than a standard step.
    once = [*BRIEFLY, "train.epochs=1", "optimizer.lr=0.2"]
    alone = trained(tmp_path / "one", *once)
    start = two_processes() if launcher == "launch" else ["torchrun"]
    together = trained(tmp_path / "two", *once, *start, "train.sync_bn=True")
    assert farthest(alone, together) < 1e-4
    local = trained(tmp_path / "local", *once, *two_processes())
    assert farthest(alone, local) > 1e-2  # what it would be without synchronising


def test_accumulating_trains_as_more_processes_do(trained, two_processes, tmp_path):
    # Without an adversary, who would see BN statistics, which are of all parts and of one process.
    standard = {"config": CONFIG.replace("l2", "standard")}
    alone = trained(tmp_path / "one", *BRIEFLY, "train.accumulate=2", **standard)
    together = trained(tmp_path / "two", *BRIEFLY, *two_processes(), **standard)
    learned = [name for name in alone if not name.endswith(("running_mean", "running_var", "tracked"))]
    assert farthest({name: alone[name] for name in learned}, together) < 1e-5


ENDLESS = ["train.epochs=10000", "train.log_period=1", "train.checkpoint_epochs=1"]


def heed_interrupts():
    """A shell starts its background jobs, such as these tests may be, with SIGINT ignored."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def start(command, as_users_do, tool_server, tmp_path):
    """``start(*arguments, wait_for=FILE)``: the process of a training, once it has written out/FILE.

    Several processes are started as users do, since signals must find their way through them.
    """
    processes = []

    def start(*arguments, wait_for="last_checkpoint"):
        if {"torchrun", "--num-gpus"} & set(arguments):
            with open(tmp_path / "stderr", "w") as log:
                given = {"stdout": subprocess.DEVNULL, "stderr": log, "preexec_fn": heed_interrupts}
                process = subprocess.Popen(**as_users_do(CONFIG, *arguments), **given)
        else:
            process = ToolProcess(command(CONFIG, *arguments), tmp_path)
        processes.append(process)
        deadline = time.monotonic() + 120
        path = tmp_path / "out" / wait_for
        while not (path.exists() and path.stat().st_size):
            assert process.poll() is None, (tmp_path / "stderr").read_text()
            assert time.monotonic() < deadline, "waited in vain"
            time.sleep(0.05)
        return process

    yield start
    for process in processes:
        process.kill()


def test_an_interrupted_training_leaves_a_checkpoint_but_no_classifier(start, tmp_path):
    process = start(*ENDLESS)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) != 0
    assert not list((tmp_path / "out").glob("classifier.pth*"))
    assert list((tmp_path / "out").glob("model_*.pth"))


@pytest.mark.parametrize("launcher", ["one", "launch", pytest.param("torchrun", marks=pytest.mark.slow)])
def test_a_preempted_training_saves_and_ends_within_a_minute(start, two_processes, tmp_path, launcher):
    options = {"one": [], "launch": two_processes(), "torchrun": ["torchrun"]}[launcher]
    process = start(*ENDLESS, "train.checkpoint_epochs=10000", *options, wait_for="metrics.json")
    assert not (tmp_path / "out/last_checkpoint").exists()
    process.send_signal(signal.SIGTERM)
    status = process.wait(60)
    # torchrun itself reports the signal, however well its processes ended.
    assert status == 0 or launcher == "torchrun", (tmp_path / "stderr").read_text()
    assert "Traceback" not in (tmp_path / "stderr").read_text() or launcher == "torchrun"
    checkpoint = tmp_path / "out" / (tmp_path / "out/last_checkpoint").read_text()
    iteration = torch.load(checkpoint, weights_only=True)["iteration"]
    assert checkpoint.name == f"model_{iteration:07d}.pth"


def test_a_second_training_into_the_same_folder_is_refused(start, run):
    first = start(*ENDLESS)
    second = run(CONFIG, *ENDLESS, "--resume")
    assert second.returncode == 2
    assert second.stderr.splitlines()[-1].startswith("error: another process writes to out")
    assert first.poll() is None
    first.kill()
    first.wait()
    third = run(CONFIG, *ENDLESS)  # the lock died with it
    assert third.stderr.splitlines()[-1].startswith("error: out holds a training: add --resume")


def test_a_full_disk_is_one_line_and_leaves_what_was_whole(run, start, tmp_path):
    start(*ENDLESS).kill()
    before = (tmp_path / "out/last_checkpoint").read_text()
    limit = functools.partial(resource.setrlimit, resource.RLIMIT_FSIZE, (1 << 20,) * 2)
    full = run(CONFIG, *ENDLESS, "--resume", prepare=limit)
    assert full.returncode == 2
    error = full.stderr.splitlines()[-1]
    assert error.startswith("error: cannot write out/model_")
    assert error.endswith(f"{before} is whole: make room and go on with --resume")
    assert "Traceback" not in full.stderr
    assert not list((tmp_path / "out").glob("*.tmp"))
    torch.load(tmp_path / "out" / before, weights_only=True)


def killed_at_random_moments(trained, start, tmp_path, epochs: int, kills: int, seed: int) -> None:
    """The outcome of a training that was killed so often, worker and all, is that of one that was not."""
    arguments = [f"train.epochs={epochs}", "train.checkpoint_epochs=1", f"train.eval_epochs={epochs}"]
    arguments += [
        "train.log_period=1",
        "optimizer.lr=0.002",
        "dataloader.train.num_workers=1",
        "train.ema=0.9",
    ]
    arguments += ["model.strategy.attack.random_start=True"]
    whole = trained(tmp_path / "whole", *arguments)
    generator = random.Random(seed)
    metrics = tmp_path / "out/metrics.json"
    for _ in range(kills):
        seen = metrics.stat().st_size if metrics.exists() else 0
        process = start(*arguments, "--resume", wait_for="metrics.json")
        while metrics.stat().st_size == seen:
            assert process.poll() is None
            time.sleep(0.01)
        time.sleep(generator.uniform(0, 1))
        assert process.poll() is None, "it ended before it could be killed"
        process.kill()
        process.wait()
    resumed = trained(tmp_path / "out", *arguments, "--resume")
    assert farthest(whole, resumed) == 0
    for name in ("classifier.pth", "backbone.pkl"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()


def test_a_killed_training_goes_on_bit_by_bit(trained, start, tmp_path):
    killed_at_random_moments(trained, start, tmp_path, epochs=6, kills=1, seed=0)


@pytest.mark.slow
def test_twenty_times_killed(trained, start, tmp_path):
    killed_at_random_moments(trained, start, tmp_path, epochs=120, kills=20, seed=1)


def test_a_loss_that_is_not_finite_in_one_process_ends_both(command, two_processes, tmp_path):
    arguments = [*two_processes(), "train.epochs=9", "train.eval_epochs=9", "train.log_period=1"]
    ended = run_tool(command(CONFIG, *arguments), tmp_path, prepare=faults.classifiers_loss_is_not_finite)
    assert ended.returncode == 2, ended.stderr
    assert "Traceback" not in ended.stderr + ended.stdout
    assert ended.stderr.splitlines()[-1].startswith(
        "error: the loss is not finite around iteration 1; log.txt"
    )


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
