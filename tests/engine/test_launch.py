"""Processes that end while others wait for them. Detectors: tests/detection/test_processes.py."""

import argparse
import re
import shutil
import socket
import time
from pathlib import Path

import pytest
import torch
from detectron2.engine import default_argument_parser
from tool_process import run_tool

from rt_detectron.engine.launch import launch
from rt_detectron.utils.errors import InputError

HELPERS = Path(__file__).parents[1] / "helpers"
PROGRAM, RESUMING = HELPERS / "failing_processes.py", HELPERS / "resuming_elsewhere.py"


@pytest.mark.parametrize(
    ("how", "status", "last"),
    [
        ("mistaken", 2, "error: this file is not there: choose another one"),
        ("deaf", 2, "error: this file is not there: choose another one"),
        ("killed", 2, "error: process 1 was ended by SIGKILL; for SIGKILL, look whether the machine ran out"),
        ("stopped", 0, ""),
        ("fine", 0, ""),
    ],
)
def test_all_end_when_one_does(tool_server, tmp_path, how, status, last):
    start = time.monotonic()
    ended = run_tool([PROGRAM, how], tmp_path)
    assert ended.returncode == status, ended.stderr
    assert time.monotonic() - start < 60
    assert "Traceback" not in ended.stderr
    assert (ended.stderr.splitlines() or [""])[-1].startswith(last)
    assert ended.stdout.count("went on") == (2 if how == "fine" else 0)


def test_a_busy_port_is_one_line(tool_server, tmp_path):
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        ended = run_tool([PROGRAM, "fine", f"tcp://127.0.0.1:{busy.getsockname()[1]}"], tmp_path)
    assert ended.returncode == 2, ended.stderr
    assert "Traceback" not in ended.stderr
    assert ended.stderr.splitlines()[-1].startswith("error: --dist-url: the port is taken")


@pytest.mark.parametrize(
    ("chosen", "words"),
    [
        ({"num_gpus": 0}, "must be at least 1"),
        ({"num_machines": 2, "machine_rank": 2}, "--machine-rank 2 must be from 0 to 1: --num-machines is 2"),
        ({"num_machines": 2}, "needs --dist-url tcp://HOST:PORT"),
        ({"num_machines": 2, "dist_url": "auto"}, "needs --dist-url tcp://HOST:PORT"),
    ],
)
def test_numbers_that_cannot_be_are_refused(chosen, words):
    defaults = vars(default_argument_parser().parse_args([]))
    with pytest.raises(InputError, match=words):
        launch(lambda args: pytest.fail("started"), argparse.Namespace(**{**defaults, **chosen}))


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(InputError, match="--num-gpus 2: this machine has 1"):
        launch(lambda args: pytest.fail("started"), default_argument_parser().parse_args(["--num-gpus", "2"]))


@pytest.fixture
def machines(tmp_path):
    """Two folders, as of machines that share none, each with checkpoints that hold 0 and 1; the second one's
    last_checkpoint is an older one."""
    for rank in (0, 1):
        folder = tmp_path / str(rank) / "out"
        folder.mkdir(parents=True)
        for number in (0, 1):
            path = folder / f"model_{number:07d}.pth"
            if rank:
                shutil.copy(tmp_path / "0/out" / path.name, path)
            else:
                model = torch.nn.Linear(1, 1)
                torch.nn.init.constant_(model.weight, number)
                torch.save({"model": model.state_dict()}, path)
        (folder / "last_checkpoint").write_text(f"model_{1 - rank:07d}.pth")
    return tmp_path


def test_all_resume_from_the_checkpoint_that_the_first_one_chooses(tool_server, machines):
    ended = run_tool([RESUMING, machines], machines)
    assert ended.returncode == 0, ended.stderr
    assert [(machines / rank / "resumed").read_text() for rank in "01"] == ["1", "1"]
    (
        machines / "0/out/last_checkpoint"
    ).unlink()  # then the first one has none, and the other's does not count
    assert run_tool([RESUMING, machines], machines).returncode == 0
    assert [(machines / rank / "resumed").read_text() for rank in "01"] == ["nothing", "nothing"]


@pytest.mark.parametrize("fault", ["lacks", "has another"])
def test_a_process_without_that_checkpoint_ends_all(tool_server, machines, fault):
    path = machines / "1/out/model_0000001.pth"
    path.unlink()
    if fault == "has another":
        shutil.copy(machines / "1/out/model_0000000.pth", path)
    ended = run_tool([RESUMING, machines], machines)
    assert ended.returncode == 2
    assert "Traceback" not in ended.stderr
    assert re.fullmatch(
        r"error: cannot resume from out/model_0000001.pth: process 1 on \S+ lacks this file or has another "
        r"one; use an output folder that all machines share",
        ended.stderr.splitlines()[-1],
    )
    assert not list(machines.glob("*/resumed"))
