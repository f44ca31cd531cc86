"""Bootstrap over test images: COCO AP and accuracy on resampled images.

AP is not a mean over images, so it is computed again on each resample (Efron and Tibshirani, "An Introduction
to the Bootstrap", 1993). Each image is drawn as often as a number of the Poisson distribution with mean 1
says, which its name determines: an image counts equally often for all models and in all test sets that have
it, so that their values on a resample can be compared. An image drawn m times counts as m images. Detections
are matched to objects once, since matching does not depend on other images.

On a test set with many detections AP on a resample is taken to first order in how often each image is drawn
(the infinitesimal jackknife, as in their chapter 21): one pass over the detections gives the slopes. With so
many images both have the same spread.
"""

import contextlib
import hashlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from scipy.sparse import csr_array

from rt_detectron.utils.arrays import read_arrays

MAX_DETECTIONS = 100  # per image and category, as in COCO's AP
IOU_THRESHOLDS = [0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95]
RECALL_THRESHOLDS = np.linspace(0.0, 1.0, 101)  # COCO's
RESAMPLES = 200  # the random error of a variance is then about 10 %, which its degrees of freedom account for
EXACT_DETECTIONS = 50_000  # with more detections in a test set, resamples are to first order
_BATCH_CELLS = 4_000_000  # detections x resamples at a time: about 100 MB


@dataclass(frozen=True, eq=False)
class CategoryMatches:
    """The D detections of one category in all I images, by descending score.

    Attributes:
        name: of the category.
        image: (D,) positions in ``Matches.image_ids``.
        score: (D,).
        hit: (T, D) bool, true positives at each of COCO's T IoU thresholds.
        ignored: (T, D) bool, detections that count as neither true nor false positives (crowd regions).
        objects: (I,) number of objects of the category in each image, without crowd regions.
    """

    name: str
    image: np.ndarray
    score: np.ndarray
    hit: np.ndarray
    ignored: np.ndarray
    objects: np.ndarray


@dataclass(frozen=True, eq=False)
class Matches:
    """The matches of a test set. ``categories`` are those with at least one detection or object."""

    image_ids: np.ndarray
    categories: list[CategoryMatches]


def match(coco: COCO, detections: list[dict[str, Any]], task: str) -> Matches:
    """Match detections to objects as pycocotools does, over all areas.

    Args:
        coco: the ground truth.
        detections: the entries of a COCO results file.
        task: "bbox" or "segm".
    """
    evaluator = _evaluated(coco, detections, task)
    images = len(evaluator.params.imgIds)
    cells = evaluator.evalImgs  # all images of the first category, then of the next
    categories = [
        _category(coco.cats[category]["name"], cells[start : start + images], len(evaluator.params.iouThrs))
        for category, start in zip(evaluator.params.catIds, range(0, len(cells), images), strict=True)
    ]
    return Matches(
        image_ids=np.asarray(evaluator.params.imgIds),
        categories=[c for c in categories if len(c.image) or c.objects.any()],
    )


def read_matches(path: str | Path, names: Mapping[int, str]) -> dict[str, Matches]:
    """The matches that an evaluation kept, by task, over all areas.

    Args:
        path: of a matches.npz of :mod:`rt_detectron.evaluation.matching`, which says what is in it.
        names: category id -> its name. Those of other categories are their ids.
    """
    arrays = read_arrays(path)
    found = {}
    for task in dict.fromkeys(name.partition("/")[0] for name in arrays if "/" in name):
        of_task = {name.partition("/")[2]: array for name, array in arrays.items() if name.startswith(task)}
        categories = [
            _kept_category(names.get(int(number), str(number)), of_task, position, len(arrays["image_ids"]))
            for position, number in enumerate(arrays["category_ids"])
        ]
        known = [category for category in categories if len(category.image) or category.objects.any()]
        found[task] = Matches(arrays["image_ids"], known)
    return found


def _kept_category(
    name: str, arrays: Mapping[str, np.ndarray], position: int, images: int
) -> CategoryMatches:
    rows = np.flatnonzero(arrays["category"] == position)
    order = rows[np.argsort(-arrays["score"][rows], kind="stable")]
    counted = (arrays["object_category"] == position) & ~arrays["object_ignored"][0]
    return CategoryMatches(
        name=name,
        image=arrays["image"][order],
        score=arrays["score"][order],
        hit=arrays["hit"][0][:, order],
        ignored=arrays["ignored"][0][:, order],
        objects=np.bincount(arrays["object_image"][counted], minlength=images),
    )


def _evaluated(coco: COCO, detections: list[dict[str, Any]], task: str) -> COCOeval:
    with contextlib.redirect_stdout(io.StringIO()):
        results = coco.loadRes(detections) if detections else COCO()
        evaluator = COCOeval(coco, results, task)
        evaluator.params.areaRng, evaluator.params.areaRngLbl = [[0, 1e10]], ["all"]
        evaluator.params.maxDets = [MAX_DETECTIONS]
        evaluator.evaluate()
    return evaluator


def _category(name: str, cells: list[dict[str, Any] | None], thresholds: int) -> CategoryMatches:
    images = len(cells)
    objects = np.zeros(images, dtype=np.int64)
    image, score = [np.zeros(0, dtype=np.int64)], [np.zeros(0)]
    hit, ignored = [np.zeros((thresholds, 0), dtype=bool)], [np.zeros((thresholds, 0), dtype=bool)]
    for position, cell in enumerate(cells):
        if cell is None:
            continue
        objects[position] = np.count_nonzero(np.asarray(cell["gtIgnore"]) == 0)
        found = np.asarray(cell["dtMatches"]) > 0
        ignore = np.asarray(cell["dtIgnore"]).astype(bool)
        image.append(np.full(found.shape[1], position))
        score.append(np.asarray(cell["dtScores"], dtype=float))
        hit.append(found & ~ignore)
        ignored.append(ignore)
    scores = np.concatenate(score)
    order = np.argsort(-scores, kind="stable")  # equal scores stay in the order of images, as in COCO
    return CategoryMatches(
        name=name,
        image=np.concatenate(image)[order],
        score=scores[order],
        hit=np.concatenate(hit, axis=1)[:, order],
        ignored=np.concatenate(ignored, axis=1)[:, order],
        objects=objects,
    )


def f1_per_image(matches: Matches, threshold: float) -> np.ndarray:
    """F1 score of each image at IoU 0.5, over all categories.

    Args:
        threshold: detections with a lower score are left out.

    Returns:
        (I,) in 0..1; NaN for an image without objects and detections.
    """
    images = len(matches.image_ids)
    hits, shown, objects = (np.zeros(images) for _ in range(3))
    for category in matches.categories:
        # Matching goes by descending score, so leaving out low scores does not change other matches.
        kept = (category.score >= threshold) & ~category.ignored[0]
        shown += np.bincount(category.image[kept], minlength=images)
        hits += np.bincount(category.image[kept & category.hit[0]], minlength=images)
        objects += category.objects
    with np.errstate(invalid="ignore"):
        return 2 * hits / (shown + objects)


def precision_at_recall(matches: Matches) -> np.ndarray:
    """(101,) COCO's precision at RECALL_THRESHOLDS and IoU 0.5, the mean over categories, in 0..1.

    NaN without objects. Its mean is AP50.
    """
    curves = [
        interpolated_precision(category.hit[0], ~category.ignored[0], objects)
        for category in matches.categories
        if (objects := category.objects.sum())
    ]
    return np.mean(curves, axis=0) if curves else np.full(len(RECALL_THRESHOLDS), np.nan)


def interpolated_precision(hit: np.ndarray, counted: np.ndarray, objects: int) -> np.ndarray:
    """(101,) precision of one category at RECALL_THRESHOLDS, in 0..1.

    Args:
        hit: (D,) bool, whether each detection is right, by falling score.
        counted: (D,) bool, whether it is right or wrong, and not ignored.
        objects: their number, at least 1.
    """
    hits = np.cumsum(hit)
    precision = hits / np.maximum(np.cumsum(counted), 1)
    precision = np.maximum.accumulate(precision[::-1])[::-1]
    at = np.searchsorted(hits / objects, RECALL_THRESHOLDS, side="left")
    return np.append(precision, 0.0)[np.minimum(at, len(precision))]


def image_counts(names: Sequence[Any], resamples: int = RESAMPLES) -> np.ndarray:
    """(I, B) int32: how often each image is in each resample. An image's name determines its row."""
    return _image_counts(tuple(map(str, names)), resamples)


@lru_cache(maxsize=4)
def _image_counts(names: tuple[str, ...], resamples: int) -> np.ndarray:
    counts = np.empty((len(names), resamples), np.int32)
    for row, name in zip(counts, names, strict=True):
        digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
        row[:] = np.random.default_rng(int.from_bytes(digest)).poisson(1.0, resamples)
    return counts


def average_precision(matches: Matches, counts: np.ndarray) -> dict[str, np.ndarray]:
    """COCO AP on resampled images: "AP", "AP50", "AP75", and "AP-NAME" of each category.

    Args:
        matches: of a test set of I images.
        counts: (I, B) how often each image is in each of B resamples.

    Returns:
        metric -> (B,) in percent; NaN for a resample without objects.
    """
    total, present = np.zeros((len(IOU_THRESHOLDS), counts.shape[1])), np.zeros(counts.shape[1])
    found = {}
    for category in matches.categories:
        objects = category.objects @ counts
        precision = np.where(objects > 0, _category_ap(category, counts, objects), np.nan)  # (T, B)
        total += np.nan_to_num(precision)
        present += objects > 0
        found[f"AP-{category.name}"] = 100 * precision.mean(axis=0)
    with np.errstate(invalid="ignore"):
        mean = 100 * total / present
    at = {f"AP{round(100 * iou)}": mean[IOU_THRESHOLDS.index(iou)] for iou in (0.5, 0.75)}
    return {"AP": mean.mean(axis=0), **at, **found}


def resampled_precision(matches: Matches, resamples: int = RESAMPLES) -> dict[str, np.ndarray]:
    """:func:`average_precision` on resampled images: to first order if there are many detections."""
    if sum(len(category.image) for category in matches.categories) > EXACT_DETECTIONS:
        return first_order_precision(matches, resamples)
    return exact_precision(matches, resamples)


def exact_precision(matches: Matches, resamples: int = RESAMPLES) -> dict[str, np.ndarray]:
    """:func:`average_precision` on resampled images, so many at a time as fit into memory."""
    counts = image_counts(matches.image_ids.tolist(), resamples)
    largest = max((len(category.image) for category in matches.categories), default=0)
    batch = max(1, _BATCH_CELLS // max(largest, len(counts)))
    parts = [
        average_precision(matches, np.ascontiguousarray(counts[:, start : start + batch]))
        for start in range(0, resamples, batch)
    ]
    return {metric: np.concatenate([part[metric] for part in parts]) for metric in parts[0]}


def first_order_precision(matches: Matches, resamples: int = RESAMPLES) -> dict[str, np.ndarray]:
    """:func:`average_precision` on resampled images, to first order in how often each of them is drawn."""
    images = len(matches.image_ids)
    drawn = image_counts(matches.image_ids.tolist(), resamples).astype(np.float32) - 1
    whole = average_precision(matches, np.ones((images, 1), np.int32))
    known = [category for category in matches.categories if category.objects.any()]
    total = np.zeros((len(IOU_THRESHOLDS), images))
    slopes = {}
    for category in known:
        of_category = _slopes(category)
        total += of_category / len(known)
        slopes[f"AP-{category.name}"] = of_category.mean(axis=0)
    at = {f"AP{round(100 * iou)}": total[IOU_THRESHOLDS.index(iou)] for iou in (0.5, 0.75)}
    slopes = {"AP": total.mean(axis=0), **at, **slopes}
    moved = 100 * np.stack(list(slopes.values())).astype(np.float32) @ drawn
    found = dict(zip(slopes, moved.astype(float), strict=True))
    return {metric: whole[metric] + found.get(metric, np.zeros(resamples)) for metric in whole}


def _slopes(category: CategoryMatches) -> np.ndarray:
    """(T, I): how AP (0..1) at each IoU threshold changes with the number of times that an image is drawn.

    AP is the area under interpolated precision: the sum over true positives of the largest precision at or
    behind their rank, divided by the number of objects. Each of the three depends on the draw. The largest
    precision is at a rank j, with p_j = hits_j / shown_j, so an image that is drawn more often moves it by
    (its hits - p_j its shown) / shown_j, of its detections up to j.
    """
    images, objects = len(category.objects), category.objects.sum()
    slopes = np.zeros((len(category.hit), images))
    for number, (hit, ignored) in enumerate(zip(category.hit, category.ignored, strict=True)):
        at = np.flatnonzero(hit)
        if not len(at):
            continue
        shown = np.maximum(np.cumsum(~ignored), 1)
        precision = np.arange(1, len(at) + 1) / shown[at]
        largest = np.maximum.accumulate(precision[::-1])[::-1]
        # Of each true positive the first rank behind it, or its own, that has the largest precision.
        peaks = np.flatnonzero(precision == largest)
        peak = peaks[np.searchsorted(peaks, np.arange(len(at)))]
        of_peak = np.bincount(peak, minlength=len(at)) / shown[at]
        behind = np.zeros((2, len(hit)))  # at a rank: the sum over all peaks at it or behind it
        behind[:, at] = of_peak, of_peak * precision
        gain, loss = np.cumsum(behind[:, ::-1], axis=1)[:, ::-1]
        by_detection = hit * gain - ~ignored * loss
        by_detection[at] += largest
        slopes[number] = np.bincount(category.image, by_detection, minlength=images)
        slopes[number] -= largest.sum() / objects * category.objects
    return slopes / objects


def _category_ap(category: CategoryMatches, counts: np.ndarray, objects: np.ndarray) -> np.ndarray:
    """(T, B) AP in 0..1 of one category, for each IoU threshold."""
    weights = counts[category.image]  # (D, B)
    shown = np.cumsum(weights, axis=0, dtype=counts.dtype)
    ap = np.zeros((len(category.hit), counts.shape[1]))
    for number, (hit, ignored) in enumerate(zip(category.hit, category.ignored, strict=True)):
        # Interpolated precision only changes at true positives: at a false positive recall stays the same
        # and precision falls. For the same reason a true positive that counts m times is one step.
        at = np.flatnonzero(hit)
        if not len(at):
            continue
        hits = np.cumsum(weights[at], axis=0, dtype=counts.dtype)
        precision = hits / np.maximum(shown[at] - _before(at, np.flatnonzero(ignored), weights), 1)
        precision = np.maximum.accumulate(precision[::-1], axis=0)[::-1]
        recall = hits / np.maximum(objects, 1)
        reached = np.searchsorted(RECALL_THRESHOLDS, recall, side="right")
        ap[number] = (precision * np.diff(reached, axis=0, prepend=0)).sum(axis=0)
    return ap / len(RECALL_THRESHOLDS)


def _before(at: np.ndarray, chosen: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Total weight of the ``chosen`` rows before each row of ``at``. Both are ascending."""
    totals = np.zeros((len(chosen) + 1, weights.shape[1]), dtype=weights.dtype)
    np.cumsum(weights[chosen], axis=0, out=totals[1:])
    return totals[np.searchsorted(chosen, at)]


def resampled_accuracy(
    correct: np.ndarray, labels: np.ndarray, names: Sequence[Any], resamples: int = RESAMPLES
) -> dict[str, np.ndarray]:
    """Accuracy of a classifier on resampled images: "top1" and "mean_per_class".

    Args:
        correct: (I,) bool, whether the classifier is right on each image.
        labels: (I,) class indices.
        names: of the images.

    Returns:
        metric -> (resamples,) in percent.
    """
    counts = image_counts(names, resamples)
    groups = np.unique(labels, return_inverse=True)[1]
    of_group = csr_array((np.ones(len(groups), np.int32), (groups, np.arange(len(groups)))))
    images, right = of_group @ counts, of_group @ (counts * correct[:, None].astype(np.int32))
    with np.errstate(invalid="ignore"):
        per_class = np.nanmean(right / images, axis=0)
        return {"top1": 100 * right.sum(axis=0) / images.sum(axis=0), "mean_per_class": 100 * per_class}
