"""What trials find on single test images, read from their predictions: matches, and scores on resamples."""

import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from rt_detectron.study.bootstrap import (
    EXACT_DETECTIONS,
    RESAMPLES,
    Matches,
    average_precision,
    match,
    read_matches,
    resampled_accuracy,
    resampled_precision,
)
from rt_detectron.study.error_types import ERROR_TYPES, error_gains
from rt_detectron.study.record import Outcome, by_test_set
from rt_detectron.study.statistics import TASKS
from rt_detectron.utils.arrays import read_arrays, write_arrays
from rt_detectron.utils.numbers import is_number
from rt_detectron.visualization.coco import load_coco, load_detections

UNREADABLE = (OSError, ValueError, LookupError, TypeError)  # what missing or broken files raise
RESAMPLED, ERRORS = "resampled.npz", "errors.npz"  # each beside the file that it is made of
MATCHES = "matches.npz"
_TOLERANCE = 0.01  # of AP in percent, since results.json may be rounded

Metrics = Mapping[str, Mapping[str, Any]]
Resampled = dict[str, dict[str, np.ndarray]]  # task -> metric -> (B,) values, as results.json has numbers
_TESTED = ("bbox", "segm")


def clean_on_resamples(outcome: Outcome) -> Resampled:
    """The metrics of a trial on resampled test images. They are kept beside its predictions.

    Raises:
        UNREADABLE: predictions or annotations cannot be read, or belong to another evaluation.
    """
    metrics = by_test_set((outcome.results or {})["metrics"])[0]
    dataset = datasets_of(outcome)[0]
    if not dataset["predictions"]:
        raise ValueError("it kept no predictions")
    predictions = Path(dataset["predictions"])
    if "accuracy" in metrics:
        return _kept(predictions, lambda: _accuracy(dataset))
    tasks = [task for task in _TESTED if is_number(metrics.get(task, {}).get("AP"))]

    def resampled() -> Resampled:
        found = {task: load_matches(dataset["json_file"], str(predictions), task) for task in tasks}
        return _precision(found, metrics, str(predictions))

    source = predictions.with_name(MATCHES)
    return _kept(source if source.is_file() else predictions, resampled)


def errors_of(outcome: Outcome) -> dict[str, dict[str, float]]:
    """Task -> type of error -> the AP50 that mending it would gain, of boxes or else of masks; {} without.

    They are kept beside the trial's predictions.

    Raises:
        UNREADABLE: predictions or annotations cannot be read, or belong to another evaluation.
    """
    metrics = by_test_set((outcome.results or {})["metrics"])[0]
    task = next((task for task in _TESTED if task in metrics), None)
    if task is None:
        return {}
    dataset = datasets_of(outcome)[0]
    predictions = Path(dataset["predictions"] or "")

    def gains() -> Resampled:
        found = error_gains(load_coco(dataset["json_file"]), load_detections(predictions), task)
        _check("AP50", np.nan_to_num(found["AP50"]), metrics[task].get("AP50"), str(predictions), task)
        return {task: {kind: np.array(found[kind]) for kind in ERROR_TYPES}}

    found = _kept(predictions, gains, ERRORS)[task]
    return {task: {kind: float(found[kind]) for kind in ERROR_TYPES}}


def condition_on_resamples(
    outcome: Outcome, matches: str | None, metrics: Metrics, dataset: str = ""
) -> Resampled:
    """The same on changed images, from the matches that their evaluation kept; {} if it kept none.

    Args:
        matches: path of a matches.npz, relative to the trial's folder.
        metrics: as robustness.json has them. Those of single categories are not resampled.
        dataset: name of the images' set, if it is not the study's: equal image ids then are other images.
    """
    if not matches:
        return {}
    path = outcome.folder / matches

    def resampled() -> Resampled:
        read = read_matches(path, {})
        if dataset:
            read = {task: _in_set(dataset, matches) for task, matches in read.items()}
        found = _precision(read, metrics, str(path))
        # A study may have hundreds of conditions, and no report shows single categories of them.
        return {
            task: {metric: values for metric, values in by_metric.items() if not metric.startswith("AP-")}
            for task, by_metric in found.items()
        }

    return _kept(path, resampled)


def _in_set(dataset: str, matches: Matches) -> Matches:
    return replace(matches, image_ids=np.array([f"{dataset}/{image}" for image in matches.image_ids]))


def _precision(found: Mapping[str, Matches], metrics: Metrics, file: str) -> Resampled:
    known = {task: matches for task, matches in found.items() if is_number(metrics.get(task, {}).get("AP"))}
    for task, matches in known.items():
        check_ap(matches, metrics[task]["AP"], file, task)
    return {task: resampled_precision(matches) for task, matches in known.items()}


def check_ap(matches: Matches, expected: float, file: str, task: str) -> None:
    """Raises a ValueError if the matches have another AP than the results say."""
    once = np.ones((len(matches.image_ids), 1), dtype=np.int32)
    (ap,) = np.nan_to_num(average_precision(matches, once)["AP"])
    _check("AP", ap, expected, file, task)


def _check(metric: str, found: float, expected: float | None, file: str, task: str) -> None:
    expected = 0.0 if expected is None else expected  # undefined where nothing was found
    if not abs(found - expected) < _TOLERANCE:
        name = TASKS[task].replace("AP", metric)
        raise ValueError(f"{file} has a {name} of {found:.2f}, not {expected:.2f}")


def _accuracy(dataset: Mapping[str, Any]) -> Resampled:
    found = json.loads(Path(dataset["predictions"]).read_text(encoding="utf-8"))
    labels = np.asarray(found["labels"])
    resampled = resampled_accuracy(np.asarray(found["predicted"]) == labels, labels, found["keys"])
    return {"accuracy": {"accuracy": resampled[dataset["metric"]], **resampled}}


def _kept(source: Path, make: Callable[[], Resampled], name: str = RESAMPLED) -> Resampled:
    """What ``make`` gives, computed once for each state of the file ``source`` and kept beside it."""
    stamp = source.stat()
    key = json.dumps([source.name, stamp.st_size, stamp.st_mtime_ns, RESAMPLES, EXACT_DETECTIONS])
    path = source.with_name(name)
    found = _read(path, key)
    if found is None:
        found = make()
        _write(path, key, found)
    return found


def _read(path: Path, key: str) -> Resampled | None:
    try:
        arrays = read_arrays(path)
        if str(arrays.pop("key")) != key:
            return None
        found: Resampled = {}
        for name, values in arrays.items():
            task, metric = name.split("/", 1)
            found.setdefault(task, {})[metric] = values
        return found
    except UNREADABLE:
        return None


def _write(path: Path, key: str, found: Resampled) -> None:
    arrays = {
        f"{task}/{metric}": values.astype(np.float32)
        for task, by_metric in found.items()
        for metric, values in by_metric.items()
    }
    with suppress(OSError):  # a folder that can only be read: the next report computes them again
        write_arrays(path, {"key": np.array(key), **arrays})


def datasets_of(outcome: Outcome) -> list[dict[str, Any]]:
    """The test sets in a trial's results."""
    return (outcome.results or {})["datasets"]


def test_sets_of(outcome: Outcome, baseline: Outcome) -> tuple[dict[str, Any], dict[str, Any]]:
    """The first test set of the outcome, and the same set of the baseline, both with predictions."""
    ours = datasets_of(outcome)[0]
    theirs = next((item for item in datasets_of(baseline) if item["json_file"] == ours["json_file"]), None)
    if theirs is None:
        raise ValueError(f"{baseline.trial.name} was not evaluated on {ours['name']}")
    for trial, dataset in ((outcome.trial, ours), (baseline.trial, theirs)):
        if not dataset["predictions"]:
            raise ValueError(f"{trial.name} kept no predictions")
    return ours, theirs


@lru_cache(maxsize=4)  # about 100 MB each for COCO's 5,000 images
def load_matches(json_file: str, predictions: str, task: str) -> Matches:
    """Those that the evaluation kept beside its predictions; matched again if there are none."""
    coco = load_coco(json_file)
    kept = Path(predictions).with_name(MATCHES)
    if kept.is_file():
        return read_matches(kept, {number: each["name"] for number, each in coco.cats.items()})[task]
    return match(coco, load_detections(predictions), task)


def one_reason(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())
