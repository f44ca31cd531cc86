"""Run a study on Ray: the selection of learning rates, then the final trials; resume what is there."""

import signal
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tqdm import tqdm

from rt_detectron.study.cluster import parallel_trials, ray_session, trial_task
from rt_detectron.study.grid import FINAL, Study, Trial
from rt_detectron.study.kinds import KINDS
from rt_detectron.study.record import Outcome, git_state, is_finished, prepare, read_outcome, write_record
from rt_detectron.study.selection import choose
from rt_detectron.study.worker import LOG
from rt_detectron.utils.errors import one_line

_STOP_S = 10.0


def run_study(study: Study, output: Path, tools: Path, ray_address: str | None = None) -> list[Outcome]:
    """Run every trial that is not finished, as many at a time as fit; a crash does not stop the others.

    Args:
        output: the folder of the trials; on a cluster, on a file system that all machines share.
        tools: the folder of the tools that trials run.
        ray_address: of a Ray cluster; None runs on this machine.

    Returns:
        The outcomes of all trials whose learning rate is known, those of the selection first.

    Raises:
        InputError: before anything runs: a folder belongs to a different specification, Ray is not
            installed, not there, or too small.
    """
    for trial in study.possible_trials():
        is_finished(output, trial)  # raises for a folder of a different specification
    outcomes = finished_outcomes(study, output)
    if any(trial.name not in outcomes for trial in known_trials(study, outcomes.values())):
        with ray_session(ray_address) as ray:
            parallel_trials(ray, study.resources)
            _run(ray, study, output, tools, outcomes)
    return [outcomes[trial.name] for trial in known_trials(study, outcomes.values())]


def known_trials(study: Study, outcomes: Iterable[Outcome]) -> list[Trial]:
    """The selection's trials, and the final ones whose learning rate ``outcomes`` decide."""
    rates = {
        (choice.arm, choice.target): choice.learning_rate
        for choice in choose(study, outcomes)
        if choice.learning_rate is not None
    }
    return study.selection_trials() + study.final_trials(rates)


def finished_outcomes(study: Study, output: Path) -> dict[str, Outcome]:
    """The outcomes, by trial name, of what earlier runs finished."""
    outcomes: dict[str, Outcome] = {}
    for _ in range(2):  # the selection's decide which trials are final ones
        outcomes = {
            trial.name: read_outcome(output, trial)
            for trial in known_trials(study, outcomes.values())
            if is_finished(output, trial)
        }
    return outcomes


def _run(ray: Any, study: Study, output: Path, tools: Path, outcomes: dict[str, Outcome]) -> None:
    """Add an outcome for every trial that has none, also for those that become known on the way."""
    kind = KINDS[study.kind]
    submit = trial_task(ray, study.resources, git_state())
    running: dict[Any, tuple[Trial, int]] = {}  # Ray's reference -> the trial, and the attempt's number

    def start(trial: Trial, attempt: int = 1) -> None:
        folder = prepare(output, trial)
        steps = kind.steps(trial, tools, folder, study.resources)
        running[submit(steps, str(folder))] = trial, attempt

    def start_known() -> None:
        started = outcomes.keys() | {trial.name for trial, _ in running.values()}
        for trial in known_trials(study, outcomes.values()):
            if trial.name not in started:
                start(trial)

    counts = {"total": study.count_trials(), "initial": len(outcomes)}
    with _interruptible(ray, running), tqdm(**counts, unit="trial", desc="trials", disable=None) as bar:
        start_known()
        while running:
            done, _ = ray.wait(list(running), timeout=1.0)
            if sys.stderr.isatty():  # in a log file every redraw would be a line
                bar.refresh()
            for reference in done:
                trial, attempt = running.pop(reference)
                outcome = read_outcome(output, trial, _error(ray, reference))
                if outcome.error and attempt <= study.retries:
                    bar.write(f"{trial.name} crashed, log in {outcome.folder / LOG}; again", file=sys.stderr)
                    start(trial, attempt + 1)
                    continue
                _finish(study, outcome, outcomes, bar)
            if done:
                start_known()


def _finish(study: Study, outcome: Outcome, outcomes: dict[str, Outcome], bar: tqdm) -> None:
    """Record the outcome, and show it on the bar."""
    trial = outcome.trial
    outcomes[trial.name] = outcome
    if outcome.error:
        bar.write(f"{trial.name} failed, log in {outcome.folder / LOG}; the others go on", file=sys.stderr)
    else:
        choices = {(c.arm, c.target): asdict(c) for c in choose(study, outcomes.values())}
        write_record(outcome, choices.get((trial.arm, trial.target)) if trial.stage == FINAL else None)
        bar.write(f"{trial.name} finished", file=sys.stderr)
    bar.update()


def _error(ray: Any, reference: Any) -> str:
    """Why the trial of this finished task has no results, if it has none."""
    try:
        return ray.get(reference) or "its results cannot be read"
    except ray.exceptions.RayError as error:  # the worker died, or its machine
        return f"{type(error).__name__}: {one_line(error)}"


@contextmanager
def _interruptible(ray: Any, running: Mapping[Any, Any]) -> Iterator[None]:
    """A SIGTERM (a batch system's, say) interrupts as Ctrl-C does, and either stops what is running."""
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)  # Ray has set one of its own
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
        for reference in running:
            ray.cancel(reference)
        if running:
            ray.wait(list(running), num_returns=len(running), timeout=_STOP_S)
