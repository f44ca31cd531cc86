"""Paired bootstrap over test images: COCO AP and accuracy on resampled images.

It gives a confidence interval of the difference between two trials when each arm has a single seed. AP is not
a mean over images, so each resample draws as many images as the set has, with replacement, and computes AP
again. Both detectors see the same resamples (Efron and Tibshirani, "An Introduction to the Bootstrap", 1993).
An image drawn m times counts as m images. Detections are matched to objects once, since matching does not
depend on other images.
"""

import contextlib
import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from scipy.sparse import csr_array
from tqdm import tqdm

MAX_DETECTIONS = 100  # per image and category, as in COCO's AP
RECALL_THRESHOLDS = np.linspace(0.0, 1.0, 101)  # COCO's
RESAMPLES = 1000  # the random error of an interval's end is then about a tenth of a standard error
_BATCH_CELLS = 4_000_000  # detections x resamples at a time: about 100 MB


@dataclass(frozen=True, eq=False)
class CategoryMatches:
    """The D detections of one category in all I images, by descending score.

    Attributes:
        image: (D,) positions in ``Matches.image_ids``.
        score: (D,).
        hit: (T, D) bool, true positives at each of COCO's T IoU thresholds.
        ignored: (T, D) bool, detections that count as neither true nor false positives (crowd regions).
        objects: (I,) number of objects of the category in each image, without crowd regions.
    """

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
        _category(cells[start : start + images], images, len(evaluator.params.iouThrs))
        for start in range(0, len(cells), images)
    ]
    return Matches(
        image_ids=np.asarray(evaluator.params.imgIds),
        categories=[c for c in categories if len(c.image) or c.objects.any()],
    )


def _evaluated(coco: COCO, detections: list[dict[str, Any]], task: str) -> COCOeval:
    with contextlib.redirect_stdout(io.StringIO()):
        results = coco.loadRes(detections) if detections else COCO()
        evaluator = COCOeval(coco, results, task)
        evaluator.params.areaRng, evaluator.params.areaRngLbl = [[0, 1e10]], ["all"]
        evaluator.params.maxDets = [MAX_DETECTIONS]
        evaluator.evaluate()
    return evaluator


def _category(cells: list[dict[str, Any] | None], images: int, thresholds: int) -> CategoryMatches:
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


def average_precision(matches: Matches, counts: np.ndarray) -> np.ndarray:
    """COCO AP on resampled images, averaged over IoU thresholds and categories.

    Args:
        matches: of a test set of I images.
        counts: (I, B) how often each image is in each of B resamples.

    Returns:
        (B,) AP in percent; NaN for a resample without objects.
    """
    total, present = np.zeros(counts.shape[1]), np.zeros(counts.shape[1])
    for category in matches.categories:
        objects = category.objects @ counts
        total += np.where(objects > 0, _category_ap(category, counts, objects), 0.0)
        present += objects > 0
    with np.errstate(invalid="ignore"):
        return 100 * total / present


def _category_ap(category: CategoryMatches, counts: np.ndarray, objects: np.ndarray) -> np.ndarray:
    """(B,) AP in 0..1 of one category, averaged over IoU thresholds."""
    weights = counts[category.image]  # (D, B)
    shown = np.cumsum(weights, axis=0, dtype=counts.dtype)
    ap = np.zeros(counts.shape[1])
    for hit, ignored in zip(category.hit, category.ignored, strict=True):
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
        ap += (precision * np.diff(reached, axis=0, prepend=0)).sum(axis=0)
    return ap / (len(category.hit) * len(RECALL_THRESHOLDS))


def _before(at: np.ndarray, chosen: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Total weight of the ``chosen`` rows before each row of ``at``. Both are ascending."""
    totals = np.zeros((len(chosen) + 1, weights.shape[1]), dtype=weights.dtype)
    np.cumsum(weights[chosen], axis=0, out=totals[1:])
    return totals[np.searchsorted(chosen, at)]


def resampled_differences(
    matches: Matches, baseline: Matches, resamples: int = RESAMPLES, seed: int = 0
) -> np.ndarray:
    """AP of ``matches`` minus AP of ``baseline`` on the same resampled images.

    Returns:
        (resamples,) differences in percentage points; undefined ones are left out.

    Raises:
        ValueError: the two were not evaluated on the same images.
    """
    if not np.array_equal(matches.image_ids, baseline.image_ids):
        raise ValueError("the two detectors were evaluated on different images")
    largest = max((len(c.image) for c in matches.categories + baseline.categories), default=0)
    return _resampled(
        lambda counts: average_precision(matches, counts) - average_precision(baseline, counts),
        len(matches.image_ids),
        largest,
        resamples,
        seed,
    )


def resampled_accuracy_differences(
    correct: np.ndarray,
    baseline: np.ndarray,
    labels: np.ndarray,
    per_class: bool,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> np.ndarray:
    """Accuracy of a classifier minus that of a baseline on the same resampled images.

    Args:
        correct: (I,) bool, whether the classifier is right on each image.
        baseline: (I,) bool, the same for the baseline.
        labels: (I,) class indices.
        per_class: mean accuracy of the classes in the resample instead of top-1 accuracy.

    Returns:
        (resamples,) differences in percentage points.
    """
    gain = correct.astype(np.int32) - baseline.astype(np.int32)
    groups = np.unique(labels, return_inverse=True)[1] if per_class else np.zeros(len(labels), dtype=int)
    of_group = csr_array((np.ones(len(groups), np.int32), (groups, np.arange(len(groups)))))

    def difference(counts: np.ndarray) -> np.ndarray:
        images, gained = of_group @ counts, of_group @ (counts * gain[:, None])
        with np.errstate(invalid="ignore"):
            return 100 * np.nanmean(gained / images, axis=0)

    return _resampled(difference, len(labels), 0, resamples, seed)


def _resampled(
    difference: Callable[[np.ndarray], np.ndarray], images: int, largest: int, resamples: int, seed: int
) -> np.ndarray:
    """``difference`` of all resamples, in batches of (images, B) counts. Undefined values are left out."""
    generator = np.random.default_rng(seed)
    batch = max(1, _BATCH_CELLS // max(largest, images))
    differences = []
    with tqdm(total=resamples, desc="bootstrap over images", unit="resample", disable=None) as bar:
        for start in range(0, resamples, batch):
            size = min(batch, resamples - start)
            counts = generator.multinomial(images, np.full(images, 1 / images), size=size).T
            counts = np.ascontiguousarray(counts, dtype=np.int32)
            differences.append(difference(counts))
            bar.update(size)
    found = np.concatenate(differences)
    return found[np.isfinite(found)]
