"""Run a study's trials, each in its own process and folder, and resume what an earlier run left."""

import json
import os
import shlex
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from tqdm import tqdm

from rt_detectron.errors import InputError
from rt_detectron.files import replaced_atomically
from rt_detectron.study.grid import Trial

LOG = "train.log"  # beside Detectron2's own log.txt, which misses tracebacks and stderr
_LAST_LINES = 10
_GRACE_S = 10.0


@dataclass(frozen=True)
class Outcome:
    """A trial and what came of it: ``results`` (its results.json), or ``error``, why there are none."""

    trial: Trial
    folder: Path
    results: dict[str, Any] | None
    error: str | None = None


def trial_folder(output: Path, trial: Trial) -> Path:
    return output / "trials" / trial.name


def read_results(folder: Path) -> dict[str, Any] | None:
    """The trial's results.json; None if the trial is unfinished (no such file, or not a whole one)."""
    try:
        results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return results if isinstance(results, dict) and isinstance(results.get("metrics"), dict) else None


def is_finished(output: Path, trial: Trial) -> bool:
    """Whether the trial has results, and they are of this very specification.

    Raises:
        InputError: the trial's folder belongs to a different specification.
    """
    folder = trial_folder(output, trial)
    try:
        recorded = json.loads((folder / "trial.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return False
    except (OSError, ValueError):
        recorded = None
    if not isinstance(recorded, dict):
        raise InputError(
            f"{folder / 'trial.json'} cannot be read: delete that folder or use another --output"
        )
    wanted = trial.specification()
    changed = [key for key in wanted.keys() | recorded.keys() if wanted.get(key) != recorded.get(key)]
    if changed:
        raise InputError(
            f"{folder} was made with a different {', '.join(sorted(changed))} than the study asks for now: "
            "delete that folder or use another --output"
        )
    return read_results(folder) is not None


@contextmanager
def output_folder(output: Path) -> Iterator[None]:
    """Make ``output`` and hold it for this process alone."""
    try:
        output.mkdir(parents=True, exist_ok=True)
        lock = FileLock(output / "compare.lock", timeout=0)
        lock.acquire()
    except Timeout:
        raise InputError(
            f"another comparison is running in {output}: wait for it, or give another --output"
        ) from None
    except OSError as error:
        raise InputError(f"cannot write to --output {output}: {error.strerror or error}") from None
    try:
        yield
    finally:
        lock.release()


def run_trials(trials: Sequence[Trial], output: Path, train_net: Path) -> list[Outcome]:
    """Run every trial that has no results yet, one after the other; a crash does not stop the others.

    Raises:
        InputError: before anything runs, if a folder belongs to a different specification.
    """
    finished = {trial.name: is_finished(output, trial) for trial in trials}
    pending = [trial for trial in trials if not finished[trial.name]]
    crashes = {}
    done = len(trials) - len(pending)
    with tqdm(total=len(trials), initial=done, unit="trial", desc="trials", disable=None) as bar:
        for number, trial in enumerate(pending, start=done + 1):
            folder = trial_folder(output, trial)
            folder.mkdir(parents=True, exist_ok=True)
            write_atomically(folder / "trial.json", json.dumps(trial.specification(), indent=2))
            bar.write(
                f"trial {number} of {len(trials)}: {trial.name}, log in {folder / LOG}", file=sys.stderr
            )
            status = run_process(
                trial.command(sys.executable, str(train_net), str(folder)), folder / LOG, bar
            )
            if read_results(folder) is None:
                crashes[trial.name] = _crash(status, folder)
                bar.write(f"{trial.name} failed; the others go on", file=sys.stderr)
            bar.update()
    return [_outcome(trial, output, crashes.get(trial.name)) for trial in trials]


def run_process(command: list[str], log: Path, bar: tqdm) -> int:
    """Run ``command``, adding its output to ``log``; gives its exit status.

    Whatever interrupts the waiting stops the process and all that it started: it leads a process
    group of its own.
    """
    # Only a terminal can redraw the bar in place; in a log file every redraw would be a line.
    redraw_s = 1.0 if sys.stderr.isatty() else None
    with log.open("ab") as stream:
        stream.write(f"$ {shlex.join(command)}\n".encode())
        stream.flush()
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=stream, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            while True:
                try:
                    return process.wait(redraw_s)
                except subprocess.TimeoutExpired:
                    bar.refresh()
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


def _crash(status: int, folder: Path) -> str:
    """What the user reads about a trial that left no results, with the end of its log."""
    with (folder / LOG).open(encoding="utf-8", errors="replace") as stream:
        last_lines = "".join(deque(stream, maxlen=_LAST_LINES)).rstrip()
    how = f"killed by signal {-status}" if status < 0 else f"exit status {status}"
    return f"{how}, no results; the end of {folder / LOG}:\n{last_lines}"


def _outcome(trial: Trial, output: Path, crash: str | None) -> Outcome:
    folder = trial_folder(output, trial)
    results = read_results(folder)
    return Outcome(trial, folder, results, None if results else crash)


def write_atomically(path: Path, text: str) -> None:
    """Write ``text`` so that ``path`` is at any time either the old file or the whole new one."""
    with replaced_atomically(path) as temporary:
        Path(temporary).write_text(text, encoding="utf-8")
