"""Which detections of a test set hit which objects: what AP on resampled images and scores per image need."""

import contextlib
import io
from dataclasses import dataclass
from typing import Any

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

MAX_DETECTIONS = 100  # per image and category, as in COCO's AP
RECALL_THRESHOLDS = np.linspace(0.0, 1.0, 101)  # COCO's


@dataclass(frozen=True, eq=False)
class CategoryMatches:
    """The D detections of one category in all images, by falling score, matched at COCO's T IoU thresholds.

    Attributes:
        image: (D,) positions in ``Matches.image_ids``.
        score: (D,).
        hit: (T, D) bool, whether the detection matches an object at the threshold.
        ignored: (T, D) bool, whether it counts neither as a hit nor as a false alarm (crowd regions).
        objects: (I,) number of objects of the category in each image, without crowd regions.
    """

    image: np.ndarray
    score: np.ndarray
    hit: np.ndarray
    ignored: np.ndarray
    objects: np.ndarray


@dataclass(frozen=True, eq=False)
class Matches:
    """The matches of a whole test set. ``categories`` are those with a detection or an object."""

    image_ids: np.ndarray
    categories: list[CategoryMatches]


def match(coco: COCO, detections: list[dict[str, Any]], task: str) -> Matches:
    """pycocotools' matching over all areas.

    Args:
        coco: the ground truth.
        detections: as a COCO results file has them.
        task: "bbox" or "segm".
    """
    evaluator = _evaluated(coco, detections, task)
    images = len(evaluator.params.imgIds)
    cells = evaluator.evalImgs  # category by category, in each image by image
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
    order = np.argsort(-scores, kind="stable")  # of equal scores the earlier image's comes first, as in COCO
    return CategoryMatches(
        image=np.concatenate(image)[order],
        score=scores[order],
        hit=np.concatenate(hit, axis=1)[:, order],
        ignored=np.concatenate(ignored, axis=1)[:, order],
        objects=objects,
    )


def f1_per_image(matches: Matches, threshold: float) -> np.ndarray:
    """(I,) F1 of each image over all categories at IoU 0.5, from detections with a score of at least
    ``threshold``; NaN for an image with neither objects nor such detections."""
    images = len(matches.image_ids)
    hits, shown, objects = (np.zeros(images) for _ in range(3))
    for category in matches.categories:
        # Matching goes by falling score, so leaving out low scores changes no match of the others.
        kept = (category.score >= threshold) & ~category.ignored[0]
        shown += np.bincount(category.image[kept], minlength=images)
        hits += np.bincount(category.image[kept & category.hit[0]], minlength=images)
        objects += category.objects
    with np.errstate(invalid="ignore"):
        return 2 * hits / (shown + objects)
