"""Run a study on Ray: the selection of learning rates, then the final trials. Finished trials are kept."""

import os
import shlex
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from tabulate import tabulate
from tqdm import tqdm

from rt_detectron.study import worker
from rt_detectron.study.grid import FINAL, Resources, Study, Trial
from rt_detectron.study.progress import Progress, left, seconds_left, times
from rt_detectron.study.record import (
    RECORD,
    Outcome,
    check_unfinished,
    git_state,
    prepare,
    prune,
    read_outcome,
    trial_folder,
    write_record,
)
from rt_detectron.study.selection import choose, finished_outcomes, known_trials
from rt_detectron.study.worker import GRACE_S, LOG, read_json
from rt_detectron.utils.errors import InputError, one_line, optional_import

_STOP_S = GRACE_S + 10.0
_OBJECT_STORE_BYTES = 80 * 2**20  # Ray's minimum; trials exchange files, not objects
# Environment variables that the trials' processes get from the driver, wherever they run.
_HANDED_ON = ("DETECTRON2_DATASETS", "RT_DETECTRON_ZOO", "RT_DETECTRON_CACHE", "PYTHONPATH")
_STARTS = 3  # of Ray on this machine
_SYSTEM_FAILURES = 3  # of a trial that Ray retries: lost machines, preemption
_SOCKET_PATH = 107 - len(
    "/ray/session_2026-01-01_00-00-00_000000_0000000/sockets/plasma_store"
)  # bytes, of Linux


def run_study(
    study: Study,
    output: Path,
    tools: Path,
    ray_address: str | None = None,
    only: Callable[[Trial], bool] = lambda trial: True,
) -> list[Outcome]:
    """Run all unfinished trials, as many at a time as fit. If one crashes, the others go on.

    Args:
        output: folder of the trials. On a cluster, it is on a file system that all machines share.
        tools: folder of the tools that trials run.
        ray_address: address of a Ray cluster; None runs on this machine.
        only: whether to run a trial.

    Returns:
        The outcomes of all trials whose learning rate is known, those of the selection first; of those that
        were not to run, only the finished ones.

    Raises:
        InputError: before anything runs, if a folder was made for a different specification, if Ray is not
            installed or not running at ``ray_address``, or if no machine is large enough for a trial.
    """
    for trial in study.possible_trials():
        check_unfinished(output, trial)
    outcomes = finished_outcomes(study, output)
    for outcome in outcomes.values():
        _prune(study, outcome)  # an earlier driver may have been killed in between
    if any(trial.name not in outcomes and only(trial) for trial in known_trials(study, outcomes.values())):
        with ray_session(ray_address) as ray:
            parallel = parallel_trials(ray, study.resources, waits=ray_address is not None)
            _run(ray, study, output, tools, outcomes, only, parallel)
    return [
        outcomes[trial.name] for trial in known_trials(study, outcomes.values()) if trial.name in outcomes
    ]


def _run(
    ray: Any,
    study: Study,
    output: Path,
    tools: Path,
    outcomes: dict[str, Outcome],
    only: Callable[[Trial], bool],
    parallel: int,
) -> None:
    """Add an outcome for every trial without one, including final trials that become known on the way."""
    submit = trial_task(ray, study.resources, git_state())
    running: dict[Any, tuple[Trial, int]] = {}  # Ray's reference -> trial and number of the attempt
    known = times(outcomes.values())

    def start(trial: Trial, attempt: int = 1) -> None:
        folder = prepare(output, trial)
        running[submit(trial.name, _steps(study, trial, tools, folder), str(folder))] = trial, attempt

    def start_known() -> None:
        started = outcomes.keys() | {trial.name for trial, _ in running.values()}
        for trial in known_trials(study, outcomes.values()):
            if trial.name not in started and only(trial):
                start(trial)

    with _interruptible(ray, running), Progress(study, len(outcomes), parallel) as progress:
        start_known()
        while running:
            done, _ = ray.wait(list(running), timeout=1.0)
            shown = [(trial, trial_folder(output, trial)) for trial, _ in running.values()]
            at_work = [(trial, folder) for trial, folder in shown if (folder / LOG).is_file()]
            progress.show(at_work, seconds_left(left(study, outcomes), known, at_work))
            for reference in done:
                trial, attempt = running.pop(reference)
                outcome = read_outcome(output, trial, _error(ray, reference))
                if outcome.error and attempt <= study.retries:
                    progress.write(f"{trial.name} crashed, see {outcome.folder / LOG}; trying again")
                    start(trial, attempt + 1)
                    continue
                _finish(study, outcome, outcomes, progress)
            if done:
                known = times(outcomes.values())
                start_known()


def _steps(study: Study, trial: Trial, tools: Path, folder: Path) -> list[worker.Step]:
    """The processes of a trial. They read the copy of its config."""
    copied = replace(trial, config=study.copies.get(trial.target, trial.config))
    return study.downstream.steps(copied, tools, folder, study.resources)


def _finish(study: Study, outcome: Outcome, outcomes: dict[str, Outcome], progress: Progress) -> None:
    """Record the outcome and show it."""
    trial = outcome.trial
    outcomes[trial.name] = outcome
    if outcome.error:
        progress.write(f"{trial.name} failed, see {outcome.folder / LOG}; the others go on")
    else:
        choices = {(c.arm, c.target): asdict(c) for c in choose(study, outcomes.values())}
        selection = choices.get((trial.arm, trial.target)) if trial.stage == FINAL else None
        write_record(outcome, selection, study.downstream.weights_files)
        _prune(study, outcome)
        progress.write(f"{trial.name} finished")
    progress.bar.update()


def _prune(study: Study, outcome: Outcome) -> None:
    if not study.keep_checkpoints:
        prune(outcome, study.downstream.weights_files)


def _error(ray: Any, reference: Any) -> str:
    """What went wrong in a finished Ray task. It only counts if the trial has no results."""
    try:
        return ray.get(reference) or "its results cannot be read"
    except ray.exceptions.RayError as error:  # the worker or its machine died, more than once
        return f"{type(error).__name__}: {one_line(error)}"


@contextmanager
def _interruptible(ray: Any, running: Mapping[Any, Any]) -> Iterator[None]:
    """Let SIGTERM, as sent by a batch system, interrupt like Ctrl-C. Either stops the running trials."""
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)  # Ray has set its own
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
        for reference in running:
            ray.cancel(reference)
        if running:
            ray.wait(list(running), num_returns=len(running), timeout=_STOP_S)


def describe(study: Study, output: Path, tools: Path, ray_address: str | None) -> str:
    """The grid with the state of each trial, the commands that will run, and an estimate of the time."""
    finished = finished_outcomes(study, output)
    known = known_trials(study, finished.values())
    to_run = [trial for trial in known if trial.name not in finished]
    rows = [(trial.name, "finished" if trial.name in finished else "to run") for trial in known]
    chosen = {(trial.arm, trial.target) for trial in known if trial.stage == FINAL}
    for arm in study.arms:
        for target in study.targets:
            if (arm.name, target.name) not in chosen:
                seeds = ", ".join(map(str, study.seeds))
                rows.append((f"{arm.name}/{target.name}, seeds {seeds}", "after the selection"))
    remaining = left(study, finished)
    commands = [
        shlex.join(["python", *step.command])
        for trial in to_run
        for step in _steps(study, trial, tools, trial_folder(output, trial))
    ]
    return "\n".join(
        [
            tabulate(rows, ["trial", "state"]),
            f"{remaining.total()} of {study.count_trials()} trials to run:",
            *commands,
            *_estimate(study, finished, remaining, ray_address),
        ]
    )


def missing_trials(study: Study, outcomes: Sequence[Outcome]) -> tuple[int, list[str]]:
    """Number of trials that are not finished after a run, and the reasons."""
    failed = [outcome for outcome in outcomes if outcome.error]
    reasons = [f"trial {outcome.trial.name} failed: {outcome.error}" for outcome in failed]
    reasons += [choice.error for choice in choose(study, outcomes) if choice.error]
    return study.count_trials() - len(outcomes) + len(failed), reasons


def _estimate(
    study: Study, finished: Mapping[str, Outcome], remaining: Counter, ray_address: str | None
) -> list[str]:
    """Estimate the time of the trials that are left, from finished ones of the same target and stage."""
    known = times(finished.values())
    unknown = {group: count for group, count in remaining.items() if group not in known}
    lines = []
    if seconds := sum(known[group] * count for group, count in remaining.items() if group in known):
        with ray_session(ray_address) as ray:
            parallel = parallel_trials(ray, study.resources, waits=ray_address is not None)
        lines.append(
            f"time: about {tqdm.format_interval(seconds)} in all, {tqdm.format_interval(seconds / parallel)} "
            f"with {parallel} trials at a time, estimated from the finished trials"
        )
    if unknown:
        groups = ", ".join(f"{target} ({stage})" for target, stage in unknown)
        count = sum(unknown.values())
        lines.append(f"time of {count} trials: unknown until one of each group has finished: {groups}")
    return [*lines, _disk_use(study, finished)]


def _disk_use(study: Study, finished: Mapping[str, Outcome]) -> str:
    """How much disk the whole study will need, by its finished trials."""
    sizes, weights = [], []
    for outcome in finished.values():
        sizes.append(sum(path.stat().st_size for path in outcome.folder.rglob("*") if path.is_file()))
        record = read_json(outcome.folder / RECORD, "results") or {}
        if record.get("weights_bytes"):
            weights.append(record["weights_bytes"])
    if not sizes:
        return "disk: unknown until one trial has finished"
    total = max(sizes) * study.count_trials() / 1e9
    each = f"; {max(weights) / 1e9:.2g} GB more for each running trial" if weights else ""
    kept = "with" if study.keep_checkpoints else "without"
    return f"disk: about {total:.2g} GB for all trials, {kept} their checkpoints{each}"


def import_ray() -> Any:
    """The module ray.

    Raises:
        InputError: it is not installed.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's own is 15, behind everything else
    return optional_import("ray", "ray>=2.40", "running a study")


@contextmanager
def ray_session(address: str | None) -> Iterator[Any]:
    """Connect to the cluster at ``address``, or start Ray on this machine. Yields the module ray.

    If this process already has a session, it is used and left open.

    Raises:
        InputError: Ray is not installed, there is no cluster at ``address``, or Ray does not start here.
    """
    ray = import_ray()
    if ray.is_initialized():
        yield ray
        return
    if address:
        try:
            ray.init(address, log_to_driver=False, logging_level="ERROR")
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise InputError(f"no Ray at --ray-address {address}: {one_line(error)}") from None
    else:
        _start_locally(ray)
    try:
        yield ray
    finally:
        ray.shutdown()


def _start_locally(ray: Any) -> None:
    """Start Ray on this machine.

    Ray gives its own processes 30 s, which a busy machine may not keep, so a failed start is tried again.

    Raises:
        InputError: Ray did not start.
    """
    local = {"object_store_memory": _OBJECT_STORE_BYTES, "include_dashboard": False, **_short_folder()}
    for attempt in range(1, _STARTS + 1):
        try:
            ray.init("local", log_to_driver=False, logging_level="ERROR", **local)
            return
        except Exception as error:  # Ray raises bare Exceptions when it times out
            ray.shutdown()
            if attempt == _STARTS:
                raise InputError(
                    f"Ray did not start on this machine ({attempt} attempts): {one_line(error)}; "
                    "run the same command again once the machine is less busy"
                ) from None
            print(f"Ray did not start: {one_line(error)}; trying again", file=sys.stderr)


def _short_folder() -> dict[str, str]:
    """Where Ray keeps its session, if TMPDIR is too long for the paths of its sockets.

    Raises:
        InputError: there is no folder with a short path.
    """
    own = os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()
    if len(os.fsencode(own)) <= _SOCKET_PATH:
        return {}
    for folder in ("/tmp", "/var/tmp", "/dev/shm"):
        if os.access(folder, os.W_OK | os.X_OK):
            # With the user's id, since a folder of Ray belongs to who made it first.
            return {"_temp_dir": f"{folder}/ray-{os.getuid()}"}
    raise InputError(
        f"{own} is too long a path for Ray's sockets: set RAY_TMPDIR to one of {_SOCKET_PATH} bytes"
    )


def parallel_trials(ray: Any, resources: Resources, waits: bool = False) -> int:
    """Number of trials that fit into the session at a time, at least 1.

    Args:
        waits: whether machines may still be added, as a cluster that scales itself does.

    Raises:
        InputError: not one fits, and Ray would wait forever.
    """
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    fits = 0
    for node in nodes:
        by_gpu = node.get("GPU", 0) / resources.gpus if resources.gpus else float("inf")
        if 0 < resources.gpus < 1:  # a fraction of a GPU lies on one GPU
            by_gpu = node.get("GPU", 0) * (1 / resources.gpus // 1)
        fits += int(min(node.get("CPU", 0) / resources.cpus, by_gpu))
    if fits == 0:
        machines = "; ".join(f"{node.get('CPU', 0):g} CPUs, {node.get('GPU', 0):g} GPUs" for node in nodes)
        needs = f"a trial needs {resources.cpus} CPUs and {resources.gpus:g} GPUs"
        if not waits:
            way_out = "lower the study's resources, or give --ray-address"
            raise InputError(f"{needs}, which no machine has ({machines}): {way_out}")
        print(
            f"{needs}; no machine of the cluster has them yet ({machines}): waiting for one", file=sys.stderr
        )
    return max(fits, 1)


def trial_task(ray: Any, resources: Resources, git: dict[str, Any] | None) -> Callable[[str, list, str], Any]:
    """``submit(name, steps, folder)``: start :func:`worker.run_steps` as a Ray task, give its reference.

    Ray starts a task again whose machine or worker is lost. The driver does so after crashes.
    """
    ray.cloudpickle.register_pickle_by_value(worker)
    environment = {name: os.environ[name] for name in _HANDED_ON if name in os.environ}
    processes = max(1, int(resources.gpus))  # of one trial; they share its CPUs
    environment["OMP_NUM_THREADS"] = str(max(1, resources.cpus // processes))
    if short := _short_folder():  # the sockets of data workers are in TMPDIR, too
        environment["TMPDIR"] = os.path.dirname(short["_temp_dir"])
    if not resources.gpus:
        environment["CUDA_VISIBLE_DEVICES"] = ""  # else all trials would take the first GPU of a machine
    task = ray.remote(
        num_cpus=resources.cpus,
        num_gpus=resources.gpus,
        max_retries=_SYSTEM_FAILURES,
        runtime_env={"env_vars": environment},
    )(worker.run_steps)

    def submit(name: str, steps: list[worker.Step], folder: str):
        return task.options(name=name).remote(steps, folder, os.getcwd(), git)

    return submit
