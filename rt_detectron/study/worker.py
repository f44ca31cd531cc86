"""What a Ray worker does with a trial: run its processes, one after another.

This module imports nothing of the package, and Ray pickles it by value. Importing rt_detectron, and torch
with it, would cost each worker seconds and hundreds of megabytes.
"""

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LOG = "trial.log"  # Detectron2's own log.txt misses tracebacks and stderr
PROCESSES = "processes.jsonl"  # one line for each process of the trial that has ended
_LAST_LINES = 10
GRACE_S = 60.0  # for a process that is told to stop, so that it can write a checkpoint
# A trial's process must die with the worker that started it, however that ends. (The worker dies with the
# driver.) The process asks the kernel for it itself, since Python code between fork and exec is not safe in a
# worker with threads.
_DIE_WITH_PARENT = """
import ctypes, os, signal, sys
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
os.execv(sys.argv[1], sys.argv[1:])
"""


@dataclass(frozen=True)
class Step:
    """A process of a trial. It is finished once ``result`` is in the trial's folder.

    Attributes:
        command: Python script and arguments.
        result: name of a JSON file.
        holds: a key that the complete file has.
    """

    command: tuple[str, ...]
    result: str
    holds: str


def read_json(path: Path, holds: str, kind: type = dict) -> dict[str, Any] | None:
    """A JSON object whose key ``holds`` is of this kind; None if the file is missing or incomplete."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) and isinstance(content.get(holds), kind) else None


def run_steps(steps: list[Step], folder: str, cwd: str, git: dict[str, Any] | None) -> str | None:
    """Run the steps that are not finished yet, until one fails.

    Args:
        folder: folder of the trial, relative to ``cwd``.
        cwd: where the processes run, so that paths mean the same on every machine of a cluster.
        git: state of the code, for PROCESSES.

    Returns:
        What went wrong, or None.
    """
    # Ray cancels a task by an interrupt. A study that was started in the background ignores these, and so do
    # its workers, whose processes would then go on until they are killed.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    path = Path(cwd, folder)
    for step in steps:
        if read_json(path / step.result, step.holds) is not None:
            continue
        began = time.time()
        status = _run(step, path / LOG, cwd)
        finished = read_json(path / step.result, step.holds) is not None
        line = {
            "script": Path(step.command[0]).name,
            "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(began)),
            "wall_time_s": round(time.time() - began, 1),
            "exit_status": status,
            "finished": finished,
            "hostname": socket.gethostname(),
            "git": git,
        }
        with (path / PROCESSES).open("a") as stream:
            stream.write(json.dumps(line) + "\n")
        if not finished:
            return _crash(status, step, Path(folder, LOG), path / LOG)
    return None


def _run(step: Step, log: Path, cwd: str) -> int:
    """Run a step's process and append its output to ``log``. Returns the exit status."""
    process = start([sys.executable, *step.command], log, cwd)
    try:
        while True:
            try:
                return process.wait(1.0)
            except subprocess.TimeoutExpired:
                continue  # Ray's cancellation only takes effect between waits
    finally:
        stop(process)


def start(
    command: list[str], log: Path, cwd: str | None = None, environment: dict[str, str] | None = None
) -> subprocess.Popen:
    """Start a process that leads its own process group, and append its output to ``log``.

    It ends with the thread that calls this. End it with :func:`stop`, also when it has exited.
    """
    with log.open("ab") as stream:
        stream.write(f"$ {shlex.join(command)}\n".encode())
        stream.flush()
        return subprocess.Popen(
            [sys.executable, "-c", _DIE_WITH_PARENT, *command],
            cwd=cwd,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def stop(process: subprocess.Popen) -> None:
    """End the process group of ``process``, including data workers it left behind: SIGTERM, then SIGKILL."""
    for request in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, request)
            process.wait(GRACE_S)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue


def _crash(status: int, step: Step, shown: Path, log: Path) -> str:
    """The message about a step that left no result, with the end of its log."""
    how = f"killed by signal {-status}" if status < 0 else f"exit status {status}"
    return f"{Path(step.command[0]).name}: {how}, no {step.result}; the end of {shown}:\n{last_lines(log)}"


def last_lines(log: Path) -> str:
    """The end of a log."""
    with log.open(encoding="utf-8", errors="replace") as stream:
        return "".join(deque(stream, maxlen=_LAST_LINES)).rstrip()
