"""The files of a study's trials: their specifications, results and records."""

import json
import subprocess
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

from rt_detectron.study.grid import Study, Trial
from rt_detectron.study.worker import PROCESSES, read_json
from rt_detectron.utils.errors import InputError
from rt_detectron.utils.files import json_lines, printable, write_json, write_text

SPECIFICATION, RECORD = "trial.json", "record.json"
STUDY = "study.json"  # in the output folder: the study as it runs, for reports without its files
COPIED = "copied.json"  # beside the copy of a config: what it is a copy of
# Files that the processes of a trial write, and a key that a complete file has.
RESULTS = ("results.json", "metrics")
ROBUSTNESS = ("robustness.json", "clean")


@dataclass(frozen=True)
class Outcome:
    """A trial with its results.

    Attributes:
        results: content of results.json; None if the training did not finish.
        robustness: content of robustness.json; None without an evaluation, or if it did not finish.
        error: why the trial did not finish; None if it did.
        errors: its types of error, and
        draws: quantity -> (B,) its values on resampled test images, as an earlier report found them; None:
            they are read from the trial's files.
    """

    trial: Trial
    folder: Path
    results: dict[str, Any] | None
    robustness: dict[str, Any] | None = None
    error: str | None = None
    errors: dict[str, dict[str, float]] | None = None
    draws: Mapping[Any, Any] | None = None


def trial_folder(output: Path, trial: Trial) -> Path:
    return output / "trials" / trial.name


def is_finished(output: Path, trial: Trial) -> bool:
    """Whether the trial has a record and all of its results.

    Raises:
        InputError: the folder was made for a different specification.
    """
    folder = trial_folder(output, trial)
    return (
        not _has_other_evaluations(folder, trial)
        and read_json(folder / RECORD, "results") is not None
        and _has_all_results(folder, trial)
    )


def check_unfinished(output: Path, trial: Trial) -> None:
    """Check that what is missing of a trial can still be made.

    Raises:
        InputError: its folder was made for a different specification, or other evaluations are asked for, but
            its weights are deleted.
    """
    folder = trial_folder(output, trial)
    missing = _has_other_evaluations(folder, trial) or not _has_all_results(folder, trial)
    if missing and trial.evaluations and _is_pruned(folder):
        raise InputError(
            f"{folder} lacks evaluations that the study asks for, and its weights are deleted "
            "(keep_checkpoints: true keeps them): delete that folder to train again, or use another --output"
        )


def prune(outcome: Outcome, patterns: Iterable[str]) -> int:
    """Delete the checkpoints of a trial that has its record. Gives their size in bytes."""
    size = 0
    for path in _matching(outcome.folder, patterns):
        size += path.stat().st_size
        path.unlink()
    return size


def _matching(folder: Path, patterns: Iterable[str]) -> set[Path]:
    return {path for pattern in patterns for path in folder.glob(pattern)}


def _is_pruned(folder: Path) -> bool:
    return (folder / RECORD).is_file() and not any(folder.glob("*.pth"))


def remove_leftovers(output: Path) -> None:
    """Delete the temporary files of processes that were killed. Nobody else may write into ``output``."""
    for path in output.rglob("*.tmp"):
        path.unlink(missing_ok=True)


def prepare(output: Path, trial: Trial) -> Path:
    """Make the trial's folder and its trial.json. Results of a different evaluation are deleted."""
    folder = trial_folder(output, trial)
    if _has_other_evaluations(folder, trial):
        (folder / ROBUSTNESS[0]).unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / SPECIFICATION, trial.specification())
    return folder


def read_outcome(output: Path, trial: Trial, error: str | None = None) -> Outcome:
    """Read the trial's files. ``error`` is dropped if they are complete."""
    folder = trial_folder(output, trial)
    results = read_json(folder / RESULTS[0], RESULTS[1])
    robustness = read_json(folder / ROBUSTNESS[0], ROBUSTNESS[1]) if trial.evaluations else None
    error = None if _has_all_results(folder, trial) else error
    return Outcome(trial, folder, results, robustness, error)


def write_record(outcome: Outcome, selection: dict[str, Any] | None, weights: Iterable[str] = ()) -> None:
    """Write record.json, which holds everything about a finished trial.

    ``attempts`` is 1 plus the number of processes that crashed. ``wall_time_s`` is the sum over
    ``processes``; processes that were killed together with the driver are missing there. ``config`` is the
    config.yaml that the training wrote. ``selection`` says how the learning rate was chosen.
    ``weights_bytes`` is the size of its checkpoints, which the patterns ``weights`` find.
    """
    processes = _read_processes(outcome.folder)
    last = processes[-1] if processes else {}
    record = {
        "trial": outcome.trial.specification(),
        "results": outcome.results,
        "robustness": outcome.robustness,
        "selection": selection,
        "config": _read_config(outcome.folder / "config.yaml"),
        "git": last.get("git"),
        "hostname": last.get("hostname"),
        "wall_time_s": round(sum(process["wall_time_s"] for process in processes), 1),
        "weights_bytes": sum(path.stat().st_size for path in _matching(outcome.folder, weights)),
        "attempts": 1 + sum(not process["finished"] for process in processes),
        "processes": processes,
    }
    write_text(outcome.folder / RECORD, json.dumps(record, indent=2))


def with_copied_configs(study: Study, output: Path, make: bool) -> tuple[Study, list[str]]:
    """The study with configs as they were when it began, so that a later edit changes nothing.

    Args:
        make: copy the configs of targets that are new.

    Returns:
        The study, and a note for each config that has changed since it was copied.
    """
    copies, targets, notes = {}, [], []
    for target in study.targets:
        folder = output / "configs" / target.name
        known = read_json(folder / COPIED, "source")
        if known is None or known["source"]["config"] != target.config:
            known = None
            if make:
                folder.mkdir(parents=True, exist_ok=True)
                copy = study.downstream.copy_config(target.config, folder)
                source = {"config": target.config, "sha256": target.config_sha256, "copy": copy}
                write_json(folder / COPIED, {"source": source})
                known = {"source": source}
        if known is not None:
            source = known["source"]
            copies[target.name] = source["copy"]
            if source["sha256"] != target.config_sha256:
                target = replace(target, config_sha256=source["sha256"])
                notes.append(f"{target.config} has changed since the study began; {source['copy']} is used")
        targets.append(target)
    return replace(study, targets=tuple(targets), copies=copies), notes


def git_state() -> dict[str, Any] | None:
    """Commit of the running code, and whether files differ from it. None outside a git checkout."""
    root = Path(__file__).parents[2]

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(root), *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")) != root.resolve():
            return None  # installed inside another project's checkout
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain", "-uno"))}
    except (OSError, subprocess.CalledProcessError):
        return None


def check_name(output: Path) -> None:
    """Check that the folder ``output`` has a name that results can hold.

    Raises:
        InputError: if it is no UTF-8.
    """
    name = str(output.absolute())
    try:
        name.encode()
    except UnicodeEncodeError:
        raise InputError(
            f"--output {printable(name)} is no UTF-8: results name their folder, so give another"
        ) from None


@contextmanager
def output_folder(output: Path) -> Iterator[None]:
    """Make the folder ``output`` and lock it for this process.

    Raises:
        InputError: if it cannot be written, or is another process's.
    """
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


def mean_if_defined(values: Iterable[Any]) -> Any:
    """The mean of numbers or arrays; None if there are no values or one of them is undefined."""
    values = list(values)
    defined = [value for value in values if value is not None]
    return sum(defined) / len(defined) if defined and len(defined) == len(values) else None


def by_test_set(metrics: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """task -> metric -> value, for each test set. Detectron2 nests the metrics of several sets one deeper."""
    is_nested = any(isinstance(value, Mapping) for task in metrics.values() for value in task.values())
    return list(metrics.values()) if is_nested else [metrics]


def _has_other_evaluations(folder: Path, trial: Trial) -> bool:
    """Whether the folder's trial.json differs from ``trial`` in its evaluations. The training can be kept.

    Raises:
        InputError: it differs in something else.
    """
    try:
        recorded = json.loads((folder / SPECIFICATION).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return False
    except (OSError, ValueError):
        recorded = None
    if not isinstance(recorded, dict):
        raise InputError(
            f"{folder / SPECIFICATION} cannot be read: delete that folder or use another --output"
        )
    wanted = trial.specification()
    changed = {key for key in wanted.keys() | recorded.keys() if wanted.get(key) != recorded.get(key)}
    if changed - {"evaluations"}:
        raise InputError(
            f"{folder} was made with a different {', '.join(sorted(changed))} than the study asks for now: "
            "delete that folder or use another --output"
        )
    return bool(changed)


def _has_all_results(folder: Path, trial: Trial) -> bool:
    wanted = [RESULTS, ROBUSTNESS] if trial.evaluations else [RESULTS]
    return all(read_json(folder / name, key) is not None for name, key in wanted)


def _read_processes(folder: Path) -> list[dict[str, Any]]:
    try:
        return list(json_lines(folder / PROCESSES))
    except OSError:
        return []


def _read_config(path: Path) -> dict[str, Any] | None:
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return None
