"""What a running study shows: a line for each running trial, and when all will be done."""

import json
import sys
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from statistics import fmean
from typing import Any

from tqdm import tqdm

from rt_detectron.study.grid import FINAL, Study, Trial
from rt_detectron.study.record import RECORD, Outcome
from rt_detectron.study.worker import read_json
from rt_detectron.utils.numbers import is_number

_TAIL_BYTES = 4096  # of metrics.json; a line of Detectron2's is shorter
_EVERY_S = 5.0


class Progress:
    """The bar of a study, below it the running trials. In a log file there are no bars, only messages."""

    def __init__(self, study: Study, finished: int, parallel: int):
        self.parallel = parallel
        self.bar = tqdm(
            total=study.count_trials(), initial=finished, unit="trial", desc="trials", disable=None
        )
        self.lines: list[tqdm] = []
        self._shown = 0.0

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: Any) -> None:
        for line in reversed(self.lines):
            line.close()
        self.bar.close()

    def write(self, text: str) -> None:
        self.bar.write(text, file=sys.stderr)

    def show(self, running: Iterable[tuple[Trial, Path]], seconds_left: float | None) -> None:
        """Show the running trials with their folders, and the work that is left, in seconds of one trial."""
        now = time.monotonic()
        if self.bar.disable or now < self._shown + _EVERY_S:
            return
        self._shown = now
        if seconds_left is not None:
            self.bar.set_postfix_str(
                f"{tqdm.format_interval(seconds_left / self.parallel)} left", refresh=False
            )
        self.bar.refresh()
        texts = [f"  {trial.name}: {state(folder)}" for trial, folder in running]
        while len(self.lines) < len(texts):
            self.lines.append(tqdm(bar_format="{desc}", position=len(self.lines) + 1, leave=False))
        for line, text in zip(self.lines, texts + [""] * len(self.lines), strict=False):
            line.set_description_str(text)


def state(folder: Path) -> str:
    """Iteration, loss and time left of a training, from the end of its metrics.json."""
    if not (record := _last_record(folder)):
        return "starting"
    text = f"iteration {record['iteration']}"
    if is_number(record.get("total_loss")):
        text += f", loss {record['total_loss']:.3f}"
    if is_number(record.get("eta_seconds")):
        text += f", {tqdm.format_interval(record['eta_seconds'])} left"
    return text


def _last_record(folder: Path) -> dict[str, Any] | None:
    """The last line of a training's metrics.json that tells its iteration."""
    try:
        with (folder / "metrics.json").open("rb") as file:
            file.seek(max(0, file.seek(0, 2) - _TAIL_BYTES))
            lines = file.read().decode("utf-8", errors="replace").splitlines()
    except OSError:
        return None
    for line in reversed(lines):
        with suppress(ValueError):  # half a line
            record = json.loads(line)
            if isinstance(record, dict) and "iteration" in record:
                return record
    return None


def left(study: Study, finished: Mapping[str, Outcome]) -> Counter[tuple[str, str]]:
    """(target, stage) -> number of trials that are not finished."""
    checkpoints = sum(len(arm.checkpoints) for arm in study.arms)
    found: Counter[tuple[str, str]] = Counter()
    for target in study.targets:
        found[target.name, FINAL] = checkpoints * len(study.seeds)
    found.update((trial.target, trial.stage) for trial in study.selection_trials())
    found.subtract((outcome.trial.target, outcome.trial.stage) for outcome in finished.values())
    return +found


def times(finished: Iterable[Outcome]) -> dict[tuple[str, str], float]:
    """(target, stage) -> mean wall time of its finished trials, in seconds."""
    found: dict[tuple[str, str], list[float]] = {}
    for outcome in finished:
        if record := read_json(outcome.folder / RECORD, "results"):
            found.setdefault((outcome.trial.target, outcome.trial.stage), []).append(record["wall_time_s"])
    return {group: fmean(seconds) for group, seconds in found.items()}


def seconds_left(
    remaining: Mapping[tuple[str, str], int],
    known: Mapping[tuple[str, str], float],
    running: Iterable[tuple[Trial, Path]] = (),
) -> float | None:
    """The work that is left, in seconds of one trial; None until it is known for each group.

    Args:
        known: of finished trials. Where none of a group is finished, the running ones' trainings count.
        running: trials with their folders.
    """
    spent, expected = 0.0, dict(known)
    for trial, folder in running:
        record = _last_record(folder) or {}
        seconds, eta = (record.get("time"), record.get("eta_seconds"))
        if is_number(seconds) and is_number(eta):
            done = seconds * (record["iteration"] + 1)
            spent += min(done, expected.setdefault((trial.target, trial.stage), done + eta))
    if not remaining.keys() <= expected.keys():
        return None
    return sum(expected[group] * count for group, count in remaining.items()) - spent
