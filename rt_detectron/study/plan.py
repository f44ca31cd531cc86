"""What a study has still to run, and how long that may take."""

import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean

from tabulate import tabulate
from tqdm import tqdm

from rt_detectron.study.cluster import parallel_trials, ray_session
from rt_detectron.study.grid import FINAL, Study
from rt_detectron.study.kinds import KINDS
from rt_detectron.study.record import RECORD, Outcome, trial_folder
from rt_detectron.study.run import finished_outcomes, known_trials
from rt_detectron.study.selection import choose
from rt_detectron.study.worker import read_json


def describe(study: Study, output: Path, tools: Path, ray_address: str | None) -> str:
    """The grid with the state of each trial, the commands of those to run, and an estimate of the time."""
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
        for step in KINDS[study.kind].steps(trial, tools, trial_folder(output, trial), study.resources)
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
    """How many trials of the study are not finished after a run, and why."""
    failed = [outcome for outcome in outcomes if outcome.error]
    reasons = [f"trial {outcome.trial.name} failed: {outcome.error}" for outcome in failed]
    reasons += [choice.error for choice in choose(study, outcomes) if choice.error]
    return study.count_trials() - len(outcomes) + len(failed), reasons


def _left(study: Study, finished: Mapping[str, Outcome]) -> Counter[tuple[str, str]]:
    """(target, stage) -> how many trials are not finished."""
    left: Counter[tuple[str, str]] = Counter()
    for target in study.targets:
        left[target.name, FINAL] = len(study.arms) * len(study.seeds)
    left.update((trial.target, trial.stage) for trial in study.selection_trials())
    left.subtract((outcome.trial.target, outcome.trial.stage) for outcome in finished.values())
    return +left


def _estimate(
    study: Study, finished: Mapping[str, Outcome], left: Counter, ray_address: str | None
) -> list[str]:
    """Lines on the time that the trials left may take, by what finished ones of the same kind took."""
    times: dict[tuple[str, str], list[float]] = {}
    for outcome in finished.values():
        record = read_json(outcome.folder / RECORD, "results")
        times.setdefault((outcome.trial.target, outcome.trial.stage), []).append(record["wall_time_s"])
    unknown = {kind: count for kind, count in left.items() if kind not in times}
    lines = []
    if seconds := sum(fmean(times[kind]) * count for kind, count in left.items() if kind in times):
        with ray_session(ray_address) as ray:
            parallel = parallel_trials(ray, study.resources)
        lines.append(
            f"time: about {tqdm.format_interval(seconds)} in all, {tqdm.format_interval(seconds / parallel)} "
            f"with {parallel} trials at a time, by the trials finished"
        )
    if unknown:
        kinds = ", ".join(f"{target} ({stage})" for target, stage in unknown)
        count = sum(unknown.values())
        lines.append(f"time of {count} trials: unknown until one of their kind has finished: {kinds}")
    return lines
