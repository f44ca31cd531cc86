"""Every number that a trial measured, by what it is: AP on clean, attacked and corrupted images, accuracy."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from rt_detectron.study.record import Outcome, by_test_set, is_number

# Detectron2's names, and that of classification -> what people call the main number.
TASKS = {"bbox": "box AP", "segm": "mask AP", "keypoints": "keypoint AP", "accuracy": "accuracy"}

CLEAN = "clean"  # the whole test set
ATTACK, NOISE, UNATTACKED = "attack", "noise", "attack: clean"  # all three on the attack's images
CORRUPTION, UNCORRUPTED = "corruption", "corruption: clean"
MEAN_ATTACK = "attack: mean"  # over all norms, eps and losses that were asked for
MPC, RPC = "mPC", "rPC"  # mean AP under corruption, and its percentage of the AP without


@dataclass(frozen=True)
class Quantity:
    """What a number measures.

    Attributes:
        kind: CLEAN, ATTACK, ...
        condition: of an attack its norm and loss, "l2, all"; of a corruption its name; else empty.
        level: of an attack its eps, of a corruption its severity; None for a mean over severities, and
            where there are none.
        task: one of TASKS.
        metric: as the files name it: "AP", "AP50", "APs", "AP-person"; left out it is the task's main one.
    """

    kind: str
    task: str = "bbox"
    metric: str = ""
    condition: str = ""
    level: float | None = None

    def __post_init__(self):
        if not self.metric:
            object.__setattr__(self, "metric", self._main)

    @property
    def _main(self) -> str:
        return "accuracy" if self.task == "accuracy" else "AP"

    @property
    def category(self) -> str | None:
        """Of what category alone it is the main number, if it is."""
        start = f"{self._main}-"
        return self.metric.removeprefix(start) if self.metric.startswith(start) else None


def measurements(outcome: Outcome) -> dict[Quantity, float | None]:
    """All that the trial measured, in the files' order; None if undefined. Of several test sets the first."""
    found = dict(_of(CLEAN, by_test_set(outcome.results["metrics"])[0])) if outcome.results else {}
    robustness = outcome.robustness or {}
    for attack in robustness.get("attack") or []:
        condition = f"{attack['norm']}, {attack['loss']}"
        for kind, key in ((UNATTACKED, "clean"), (ATTACK, "metrics"), (NOISE, "noise")):
            found.update(_of(kind, attack[key] or {}, condition, attack["eps"]))
    found.update(_mean(found, ATTACK, MEAN_ATTACK))
    corruption = robustness.get("corruption")
    if corruption:
        found.update(_of(UNCORRUPTED, corruption["clean"]))
        for kind in (MPC, RPC):
            found.update(_of(kind, {task: {"AP": value} for task, value in corruption[kind].items()}))
        for result in corruption["results"]:
            found.update(_of(CORRUPTION, result["metrics"], result["corruption"], result["severity"]))
        for name in dict.fromkeys(result["corruption"] for result in corruption["results"]):
            found.update(_mean(found, CORRUPTION, CORRUPTION, name))
    return found


def reported(values: Mapping[Quantity, float | None]) -> dict[Quantity, float]:
    """Those that are defined; of single categories only those on clean images."""
    return {
        quantity: value
        for quantity, value in values.items()
        if value is not None and (quantity.kind == CLEAN or quantity.category is None)
    }


def _of(
    kind: str, metrics: Mapping[str, Mapping[str, Any]], condition: str = "", level: float | None = None
) -> Iterator[tuple[Quantity, float | None]]:
    """From task -> metric -> value."""
    for task, values in metrics.items():
        for metric, value in values.items():
            quantity = Quantity(kind, task, metric, condition, level)
            yield quantity, float(value) if is_number(value) else None


def _mean(
    found: Mapping[Quantity, float | None], kind: str, mean_kind: str, condition: str | None = None
) -> Iterator[tuple[Quantity, float | None]]:
    """The mean AP of each task over levels, and conditions if none is given; None if one is undefined."""
    for task in TASKS:
        values = [
            value
            for quantity, value in found.items()
            if (quantity.kind, quantity.task, quantity.metric) == (kind, task, "AP")
            and condition in (None, quantity.condition)
        ]
        if values:
            yield Quantity(mean_kind, task, "AP", condition or ""), None if None in values else fmean(values)
