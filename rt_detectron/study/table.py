"""The rows of a study: every arm on every target, compared with its baseline."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from rt_detectron.study.bootstrap import (
    Matches,
    average_precision,
    match,
    resampled_accuracy_differences,
    resampled_differences,
)
from rt_detectron.study.grid import FINAL, Study
from rt_detectron.study.measurements import CLEAN, TASKS, Quantity, measurements, reported
from rt_detectron.study.record import Outcome, by_test_set
from rt_detectron.study.statistics import Interval, Row, changes, percentile_interval, summaries
from rt_detectron.visualization.coco import load_coco, load_detections

UNREADABLE = (OSError, ValueError, LookupError, TypeError)  # what broken or absent files raise
_TOLERANCE = 0.01  # of AP in percent: results.json may be rounded


def study_table(study: Study, outcomes: Sequence[Outcome]) -> list[Row]:
    """One row for each target and arm, in the study's order, of the final trials that have results."""
    groups: dict[tuple[str, str], dict[int, Outcome]] = {}
    for outcome in outcomes:
        if outcome.trial.stage == FINAL and outcome.results:
            trial = outcome.trial
            groups.setdefault((trial.target, trial.arm), {})[trial.seed] = outcome
    return [
        _row(arm.name, target.name, study.baseline_of(arm.name), groups)
        for target in study.targets
        for arm in study.arms
        if (target.name, arm.name) in groups
    ]


def _row(
    arm: str, target: str, baseline: str, groups: Mapping[tuple[str, str], Mapping[int, Outcome]]
) -> Row:
    group = groups[target, arm]
    others = {} if arm == baseline else groups.get((target, baseline), {})
    scores, reference = (
        {seed: reported(measurements(outcome)) for seed, outcome in outcomes.items()}
        for outcomes in (group, others)
    )
    row = Row(
        arm=arm,
        target=target,
        baseline=baseline,
        learning_rate=next(iter(group.values())).trial.learning_rate,
        seeds=tuple(sorted(group)),
        scores=summaries(scores),
        changes=changes(scores, reference),
    )
    common = group.keys() & others.keys()
    if len(common) != 1:
        return row
    (seed,) = common
    return _with_bootstrap(row, group[seed], others[seed])


def _with_bootstrap(row: Row, outcome: Outcome, baseline: Outcome) -> Row:
    """The row of a single seed, with intervals over the test images where the predictions are there."""
    found = dict(row.changes)
    try:
        for task in ("bbox", "segm", "accuracy"):
            quantity = Quantity(CLEAN, task)
            if quantity in found:
                of_task = accuracy_interval if task == "accuracy" else bootstrap_interval
                interval = of_task(outcome, baseline, task)
                found[quantity] = replace(found[quantity], interval=interval)
    except UNREADABLE as error:
        return replace(row, note=f"no interval over the test images ({one_reason(error)})")
    return replace(row, changes=found)


def one_reason(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


def bootstrap_interval(outcome: Outcome, baseline: Outcome, task: str) -> Interval | None:
    """The interval of the difference in AP over resampled test images.

    Raises:
        UNREADABLE: predictions or ground truth cannot be read, or are not those that AP was computed of.
    """
    ours, theirs = test_sets_of(outcome, baseline)
    return _interval(
        (ours["json_file"], ours["predictions"], _ap(outcome, task)),
        (theirs["json_file"], theirs["predictions"], _ap(baseline, task)),
        task,
    )


def accuracy_interval(outcome: Outcome, baseline: Outcome, task: str) -> Interval | None:
    """The same of the difference in accuracy.

    Raises:
        UNREADABLE: predictions cannot be read, or are not of the same images.
    """
    predictions = []
    for trial in (outcome, baseline):
        path = trial.results["datasets"][0]["predictions"]
        predictions.append(json.loads(Path(path).read_text(encoding="utf-8")))
    ours, theirs = predictions
    if (ours["keys"], ours["labels"]) != (theirs["keys"], theirs["labels"]):
        raise ValueError(f"{baseline.trial.name} was not evaluated on the same images")
    labels = np.asarray(ours["labels"])
    correct, of_baseline = (np.asarray(found["predicted"]) == labels for found in predictions)
    per_class = outcome.results["datasets"][0]["metric"] == "mean_per_class"
    return percentile_interval(resampled_accuracy_differences(correct, of_baseline, labels, per_class))


def test_sets_of(outcome: Outcome, baseline: Outcome) -> tuple[dict[str, Any], dict[str, Any]]:
    """The first test set of the outcome, and the same one of the baseline; both with predictions."""
    ours = outcome.results["datasets"][0]
    theirs = next(
        (item for item in baseline.results["datasets"] if item["json_file"] == ours["json_file"]), None
    )
    if theirs is None:
        raise ValueError(f"{baseline.trial.name} was not evaluated on {ours['name']}")
    for trial, dataset in ((outcome.trial, ours), (baseline.trial, theirs)):
        if not dataset["predictions"]:
            raise ValueError(f"{trial.name} kept no predictions")
    return ours, theirs


def _ap(outcome: Outcome, task: str) -> float:
    return by_test_set(outcome.results["metrics"])[0][task]["AP"]


@lru_cache
def _interval(first: tuple[str, str, float], second: tuple[str, str, float], task: str) -> Interval | None:
    matches = []
    for json_file, predictions, expected in (first, second):
        matches.append(load_matches(json_file, predictions, task))
        (ap,) = average_precision(matches[-1], np.ones((len(matches[-1].image_ids), 1), dtype=np.int32))
        if not abs(ap - expected) < _TOLERANCE:
            raise ValueError(f"{predictions} has a {TASKS[task]} of {ap:.2f}, not {expected:.2f}")
    return percentile_interval(resampled_differences(*matches))


@lru_cache(maxsize=4)  # some 100 MB each for COCO's 5,000 images; a baseline's serve all of its arms
def load_matches(json_file: str, predictions: str, task: str) -> Matches:
    return match(load_coco(json_file), load_detections(predictions), task)
