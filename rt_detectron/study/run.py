"""Run a study on Ray: the selection of learning rates, then the final trials. Finished trials are kept."""

import os
import shlex
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

from tabulate import tabulate
from tqdm import tqdm

from rt_detectron.study import worker
from rt_detectron.study.grid import FINAL, Resources, Study, Trial
from rt_detectron.study.record import (
    RECORD,
    Outcome,
    git_state,
    is_finished,
    prepare,
    read_outcome,
    trial_folder,
    write_record,
)
from rt_detectron.study.selection import choose, finished_outcomes, known_trials
from rt_detectron.study.worker import LOG, read_json
from rt_detectron.utils.errors import InputError, one_line, optional_import

_STOP_S = 10.0
_OBJECT_STORE_BYTES = 80 * 2**20  # Ray's minimum; trials exchange files, not objects
# Environment variables that the trials' processes get from the driver, wherever they run.
_HANDED_ON = ("DETECTRON2_DATASETS", "RT_DETECTRON_ZOO", "RT_DETECTRON_CACHE", "PYTHONPATH")


def run_study(study: Study, output: Path, tools: Path, ray_address: str | None = None) -> list[Outcome]:
    """Run all unfinished trials, as many at a time as fit. If one crashes, the others go on.

    Args:
        output: folder of the trials. On a cluster, it is on a file system that all machines share.
        tools: folder of the tools that trials run.
        ray_address: address of a Ray cluster; None runs on this machine.

    Returns:
        The outcomes of all trials whose learning rate is known, those of the selection first.

    Raises:
        InputError: before anything runs, if a folder was made for a different specification, if Ray is not
            installed or not running at ``ray_address``, or if no machine is large enough for a trial.
    """
    for trial in study.possible_trials():
        is_finished(output, trial)  # raises if the folder was made for a different specification
    outcomes = finished_outcomes(study, output)
    if any(trial.name not in outcomes for trial in known_trials(study, outcomes.values())):
        with ray_session(ray_address) as ray:
            parallel_trials(ray, study.resources)
            _run(ray, study, output, tools, outcomes)
    return [outcomes[trial.name] for trial in known_trials(study, outcomes.values())]


def _run(ray: Any, study: Study, output: Path, tools: Path, outcomes: dict[str, Outcome]) -> None:
    """Add an outcome for every trial without one, including final trials that become known on the way."""
    submit = trial_task(ray, study.resources, git_state())
    running: dict[Any, tuple[Trial, int]] = {}  # Ray's reference -> trial and number of the attempt

    def start(trial: Trial, attempt: int = 1) -> None:
        folder = prepare(output, trial)
        steps = study.downstream.steps(trial, tools, folder, study.resources)
        running[submit(steps, str(folder))] = trial, attempt

    def start_known() -> None:
        started = outcomes.keys() | {trial.name for trial, _ in running.values()}
        for trial in known_trials(study, outcomes.values()):
            if trial.name not in started:
                start(trial)

    bar = tqdm(total=study.count_trials(), initial=len(outcomes), unit="trial", desc="trials", disable=None)
    with _interruptible(ray, running), bar:
        start_known()
        while running:
            done, _ = ray.wait(list(running), timeout=1.0)
            if sys.stderr.isatty():  # in a log file, every redraw would be a new line
                bar.refresh()
            for reference in done:
                trial, attempt = running.pop(reference)
                outcome = read_outcome(output, trial, _error(ray, reference))
                if outcome.error and attempt <= study.retries:
                    bar.write(
                        f"{trial.name} crashed, see {outcome.folder / LOG}; trying again", file=sys.stderr
                    )
                    start(trial, attempt + 1)
                    continue
                _finish(study, outcome, outcomes, bar)
            if done:
                start_known()


def _finish(study: Study, outcome: Outcome, outcomes: dict[str, Outcome], bar: tqdm) -> None:
    """Record the outcome and show it on the progress bar."""
    trial = outcome.trial
    outcomes[trial.name] = outcome
    if outcome.error:
        bar.write(f"{trial.name} failed, see {outcome.folder / LOG}; the others go on", file=sys.stderr)
    else:
        choices = {(c.arm, c.target): asdict(c) for c in choose(study, outcomes.values())}
        write_record(outcome, choices.get((trial.arm, trial.target)) if trial.stage == FINAL else None)
        bar.write(f"{trial.name} finished", file=sys.stderr)
    bar.update()


def _error(ray: Any, reference: Any) -> str:
    """What went wrong in a finished Ray task. It only counts if the trial has no results."""
    try:
        return ray.get(reference) or "its results cannot be read"
    except ray.exceptions.RayError as error:  # the worker or its machine died
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
    left = _left(study, finished)
    commands = [
        shlex.join(["python", *step.command])
        for trial in to_run
        for step in study.downstream.steps(trial, tools, trial_folder(output, trial), study.resources)
    ]
    return "\n".join(
        [
            tabulate(rows, ["trial", "state"]),
            f"{left.total()} of {study.count_trials()} trials to run:",
            *commands,
            *_estimate(study, finished, left, ray_address),
        ]
    )


def missing_trials(study: Study, outcomes: Sequence[Outcome]) -> tuple[int, list[str]]:
    """Number of trials that are not finished after a run, and the reasons."""
    failed = [outcome for outcome in outcomes if outcome.error]
    reasons = [f"trial {outcome.trial.name} failed: {outcome.error}" for outcome in failed]
    reasons += [choice.error for choice in choose(study, outcomes) if choice.error]
    return study.count_trials() - len(outcomes) + len(failed), reasons


def _left(study: Study, finished: Mapping[str, Outcome]) -> Counter[tuple[str, str]]:
    """(target, stage) -> number of trials that are not finished."""
    left: Counter[tuple[str, str]] = Counter()
    for target in study.targets:
        left[target.name, FINAL] = len(study.arms) * len(study.seeds)
    left.update((trial.target, trial.stage) for trial in study.selection_trials())
    left.subtract((outcome.trial.target, outcome.trial.stage) for outcome in finished.values())
    return +left


def _estimate(
    study: Study, finished: Mapping[str, Outcome], left: Counter, ray_address: str | None
) -> list[str]:
    """Estimate the time of the trials that are left, from finished ones of the same target and stage."""
    times: dict[tuple[str, str], list[float]] = {}
    for outcome in finished.values():
        if record := read_json(outcome.folder / RECORD, "results"):
            times.setdefault((outcome.trial.target, outcome.trial.stage), []).append(record["wall_time_s"])
    unknown = {group: count for group, count in left.items() if group not in times}
    lines = []
    if seconds := sum(fmean(times[group]) * count for group, count in left.items() if group in times):
        with ray_session(ray_address) as ray:
            parallel = parallel_trials(ray, study.resources)
        lines.append(
            f"time: about {tqdm.format_interval(seconds)} in all, {tqdm.format_interval(seconds / parallel)} "
            f"with {parallel} trials at a time, estimated from the finished trials"
        )
    if unknown:
        groups = ", ".join(f"{target} ({stage})" for target, stage in unknown)
        count = sum(unknown.values())
        lines.append(f"time of {count} trials: unknown until one of each group has finished: {groups}")
    return lines


def import_ray() -> Any:
    """The module ray.

    Raises:
        InputError: it is not installed.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    return optional_import("ray", "ray>=2.40", "running a study")


@contextmanager
def ray_session(address: str | None) -> Iterator[Any]:
    """Connect to the cluster at ``address``, or start Ray on this machine. Yields the module ray.

    If this process already has a session, it is used and left open.

    Raises:
        InputError: Ray is not installed, or there is no cluster at ``address``.
    """
    ray = import_ray()
    if ray.is_initialized():
        yield ray
        return
    local = {} if address else {"object_store_memory": _OBJECT_STORE_BYTES, "include_dashboard": False}
    try:
        ray.init(address or "local", log_to_driver=False, logging_level="ERROR", **local)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise InputError(f"no Ray at --ray-address {address}: {one_line(error)}") from None
    try:
        yield ray
    finally:
        ray.shutdown()


def parallel_trials(ray: Any, resources: Resources) -> int:
    """Number of trials that fit into the session at a time.

    Raises:
        InputError: not one fits. Ray would wait forever.
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
        raise InputError(
            f"a trial needs {resources.cpus} CPUs and {resources.gpus:g} GPUs, which no machine has "
            f"({machines}): lower the study's resources, or give --ray-address"
        )
    return fits


def trial_task(ray: Any, resources: Resources, git: dict[str, Any] | None) -> Callable[[list, str], Any]:
    """``submit(steps, folder)``: start :func:`worker.run_steps` as a Ray task and return its reference."""
    ray.cloudpickle.register_pickle_by_value(worker)
    # No retries by Ray, which would be silent: the driver retries.
    task = ray.remote(num_cpus=resources.cpus, num_gpus=resources.gpus, max_retries=0)(worker.run_steps)
    environment = {name: os.environ[name] for name in _HANDED_ON if name in os.environ}
    processes = max(1, int(resources.gpus))  # of one trial; they share its CPUs
    environment["OMP_NUM_THREADS"] = str(max(1, resources.cpus // processes))

    def submit(steps: list[worker.Step], folder: str):
        return task.remote(steps, folder, os.getcwd(), environment, git)

    return submit
