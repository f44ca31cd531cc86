"""What a Ray worker does with a trial: its processes, one after another.

Imports nothing of the package. Workers get this module by value (:mod:`rt_detectron.study.cluster`), since
importing rt_detectron, and torch with it, would cost each of them seconds and hundreds of megabytes.
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

LOG = "trial.log"  # beside Detectron2's own log.txt, which misses tracebacks and stderr
PROCESSES = "processes.jsonl"  # a line for each process of the trial that has ended
_LAST_LINES = 10
_GRACE_S = 5.0
# The trial's process dies with the worker that started it, and that one with the driver, however they end.
# A process tells the kernel so itself, since between fork and exec of a threaded worker no Python may run.
_DIE_WITH_PARENT = """
import ctypes, os, signal, sys
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
os.execv(sys.argv[1], sys.argv[1:])
"""


@dataclass(frozen=True)
class Step:
    """A process of a trial, finished when it has left ``result`` in the trial's folder.

    Attributes:
        command: script and arguments, to be run by Python.
        result: name of a JSON file that holds the key ``holds``.
    """

    command: tuple[str, ...]
    result: str
    holds: str


def read_json(path: Path, holds: str) -> dict[str, Any] | None:
    """An object with the key ``holds``; None if there is no such file, or not a whole one."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) and isinstance(content.get(holds), dict) else None


def run_steps(
    steps: list[Step], folder: str, cwd: str, environment: dict[str, str], git: dict[str, Any] | None
) -> str | None:
    """Run the steps that are not finished yet; gives what went wrong with the first that failed, or None.

    Args:
        folder: of the trial, seen from ``cwd``.
        cwd: where the processes run; so paths mean the same on every machine that shares the file system.
        environment: variables to set beside this worker's, which hold the GPUs that Ray gave it.
        git: goes into the folder's PROCESSES.
    """
    path = Path(cwd, folder)
    for step in steps:
        if read_json(path / step.result, step.holds) is not None:
            continue
        start = time.time()
        status = _run(step, path / LOG, cwd, environment)
        finished = read_json(path / step.result, step.holds) is not None
        line = {
            "script": Path(step.command[0]).name,
            "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(start)),
            "wall_time_s": round(time.time() - start, 1),
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


def _run(step: Step, log: Path, cwd: str, environment: dict[str, str]) -> int:
    """Run a step's process, adding its output to ``log``; gives its exit status.

    Whatever interrupts the waiting stops the process and all that it started: it leads a process
    group of its own.
    """
    command = [sys.executable, *step.command]
    with log.open("ab") as stream:
        stream.write(f"$ {shlex.join(command)}\n".encode())
        stream.flush()
        process = subprocess.Popen(
            [sys.executable, "-c", _DIE_WITH_PARENT, *command],
            cwd=cwd,
            env={**os.environ, **environment},
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            while True:
                try:
                    return process.wait(1.0)
                except subprocess.TimeoutExpired:
                    continue  # so that Ray's cancelling, which is seen between waits only, takes effect
        finally:
            _stop(process)


def _stop(process: subprocess.Popen) -> None:
    """End the process group of ``process``: asked first, then killed, also data workers it left behind."""
    for request in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, request)
            process.wait(_GRACE_S)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue


def _crash(status: int, step: Step, shown: Path, log: Path) -> str:
    """What the user reads about a step that left no result, with the end of its log."""
    with log.open(encoding="utf-8", errors="replace") as stream:
        last_lines = "".join(deque(stream, maxlen=_LAST_LINES)).rstrip()
    how = f"killed by signal {-status}" if status < 0 else f"exit status {status}"
    return f"{Path(step.command[0]).name}: {how}, no {step.result}; the end of {shown}:\n{last_lines}"
