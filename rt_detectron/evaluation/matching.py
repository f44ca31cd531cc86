"""Matching of detections with annotations, for COCO's and LVIS's AP.

The matching itself is faster-coco-eval's C++ code. Its Python loop is replaced: that one holds the matches of
all images times all categories in memory, this one those of a single category, with the same result.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from types import SimpleNamespace
from typing import Any

import numpy as np
from faster_coco_eval import faster_eval_api_cpp as cpp
from pycocotools import mask as rle_masks

# From shapes of detections, shapes of annotations, and which of these are crowds: (detections, annotations).
Overlap = Callable[[np.ndarray, np.ndarray, list[bool]], np.ndarray]


@dataclass(frozen=True)
class Objects:
    """n annotations or n detections, by column.

    Attributes:
        image: (n,) index of the image among those evaluated, -1 for others. Equal scores are ranked by it.
        category: (n,) index of the category, -1 for others.
        shape: (n, ...) what the overlap function takes: boxes, masks or keypoints.
        record: n dicts for the C++ code. For an annotation: "id" (0: never matched, else 1), "area" in
            pixels, "iscrowd", "ignore". For a detection: "id" (1), "score", "area" and, for LVIS, "lvis_mark"
            (ignored unless it matches).
    """

    image: np.ndarray
    category: np.ndarray
    shape: np.ndarray
    record: np.ndarray

    def __getitem__(self, rows) -> "Objects":
        return Objects(self.image[rows], self.category[rows], self.shape[rows], self.record[rows])

    @cached_property
    def score(self) -> np.ndarray:
        return np.array([record.get("score", 0) for record in self.record], float)

    def grouped(self, limit: int | None = None) -> "Objects":
        """Sorted by category, image and falling score; at most ``limit`` for each image and category."""
        known = self[(self.image >= 0) & (self.category >= 0)]
        known = known[np.lexsort((-known.score, known.image, known.category))]  # stable
        if limit is None:
            return known
        row = np.arange(len(known.record))
        first = np.ones(len(row), bool)
        first[1:] = (np.diff(known.image) != 0) | (np.diff(known.category) != 0)
        return known[row - np.maximum.accumulate(np.where(first, row, 0)) < limit]


def column(values: Sequence[Any]) -> np.ndarray:
    """(n,) Python objects."""
    result = np.empty(len(values), object)
    result[:] = values
    return result


def box_iou(found: np.ndarray, wanted: np.ndarray, crowd: list[bool]) -> np.ndarray:
    """IoU of boxes (x, y, width, height), by pycocotools; (detections, annotations)."""
    return rle_masks.iou(found, wanted, crowd)


def mask_iou(found: np.ndarray, wanted: np.ndarray, crowd: list[bool]) -> np.ndarray:
    """IoU of compressed run-length encodings, by pycocotools; (detections, annotations)."""
    return rle_masks.iou(list(found), list(wanted), crowd)


def keypoint_similarity(found: np.ndarray, wanted: np.ndarray, crowd: list[bool], *, sigmas) -> np.ndarray:
    """OKS as pycocotools computes it, all detections at once; (detections, annotations).

    If no keypoint of an annotation is visible, what counts is how far a detection's keypoints lie outside the
    annotation's box, enlarged to three times its sides.

    Args:
        found: (D, 3 k): x, y and a score of each keypoint.
        wanted: (G, 3 k + 5): x, y and visibility of each, the box (x, y, width, height), and the area.
        crowd: not used.
        sigmas: k standard deviations, https://cocodataset.org/#keypoints-eval.
    """
    variances = (2 * np.asarray(sigmas)) ** 2
    points = found.reshape(len(found), -1, 3)[..., :2]
    similarity = np.empty((len(found), len(wanted)))
    for number, annotation in enumerate(wanted):
        truth, corner, size = annotation[:-5].reshape(-1, 3), annotation[-5:-3], annotation[-3:-1]
        counted = truth[:, 2] > 0
        if counted.any():
            offsets = points - truth[:, :2]
        else:
            offsets = np.maximum(corner - size - points, 0) + np.maximum(points - (corner + 2 * size), 0)
            counted[:] = True
        errors = (offsets**2).sum(-1) / variances / (annotation[-1] + np.spacing(1)) / 2
        similarity[:, number] = np.exp(-errors[:, counted]).sum(-1) / counted.sum()
    return similarity


def precision_and_recall(
    annotations: Objects,
    detections: Objects,
    overlap: Overlap,
    *,
    num_categories: int,
    iou_thrs: Sequence[float],
    rec_thrs: Sequence[float],
    area_rng: Sequence[Sequence[float]],
    max_dets: Sequence[int],
) -> dict[str, np.ndarray]:
    """The arrays of pycocotools' COCOeval.accumulate(); -1 where a category has no annotation.

    Each of the K categories is matched by itself, on the images where it was annotated or detected.

    Args:
        annotations: in any order.
        detections: in any order; equal scores in an image keep theirs.
        overlap: function from the shapes of detections, the shapes of annotations, and which annotations are
            crowds, to an array (detections, annotations).
        num_categories: K.
        iou_thrs: T thresholds of the overlap.
        rec_thrs: R recall levels at which precision is sampled.
        area_rng: A ranges (smallest, largest) of the area in pixels.
        max_dets: M limits on the number of detections of a category in an image, ascending.

    Returns:
        "precision" and "scores" of shape (T, R, K, A, M), "recall" of shape (T, K, A, M).
    """
    settings: dict[str, list] = {
        "iouThrs": list(iou_thrs),
        "recThrs": list(rec_thrs),
        "areaRng": [tuple(map(float, limits)) for limits in area_rng],
        "maxDets": list(map(int, max_dets)),
    }
    t, r, a, m = map(len, settings.values())
    precision, scores = (np.full((t, r, num_categories, a, m), -1.0) for _ in range(2))
    recall = np.full((t, num_categories, a, m), -1.0)
    annotations, detections = annotations.grouped(), detections.grouped(max_dets[-1])
    for k in np.unique(annotations.category):
        wanted, found = (
            o[slice(*np.searchsorted(o.category, [k, k + 1]))] for o in (annotations, detections)
        )
        curves = _match(wanted, found, overlap, settings)
        precision[:, :, k], scores[:, :, k] = curves["precision"][:, :, 0], curves["scores"][:, :, 0]
        recall[:, k] = curves["recall"][:, 0]
    return {"precision": precision, "recall": recall, "scores": scores}


def _match(annotations: Objects, detections: Objects, overlap: Callable, settings: dict) -> dict[str, Any]:
    """Precision, recall and scores of one category."""
    images = np.union1d(annotations.image, detections.image)
    datasets, bounds = [], []
    for objects in (annotations, detections):
        dataset = cpp.Dataset()
        numbers = np.searchsorted(images, objects.image).tolist()
        for image, record in zip(numbers, objects.record, strict=True):
            dataset.append_ref(image, 0, record)
        datasets.append(dataset)
        bounds += [np.searchsorted(objects.image, images + step).tolist() for step in (0, 1)]
    overlaps: list = []
    crowd = [record["iscrowd"] for record in annotations.record]
    for first, last, best, worst in zip(*bounds, strict=True):
        table = []
        if first < last and best < worst:
            found, wanted = detections.shape[best:worst], annotations.shape[first:last]
            table = overlap(found, wanted, crowd[first:last]).tolist()
        overlaps.append([table])
    numbers = list(range(len(images)))
    parameters = SimpleNamespace(imgIds=numbers, catIds=[0], useCats=1, **settings)
    return cpp.COCOevalEvaluateAccumulate(parameters, overlaps, *datasets, numbers, [0], True)
