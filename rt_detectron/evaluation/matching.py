"""Matching of detections with annotations, for COCO's and LVIS's AP.

The matching itself is faster-coco-eval's C++ code. Its Python loop is replaced: that one holds the matches of
all images times all categories in memory, this one those of a single category, with the same result.

What was matched is kept as :class:`Matches`: from it AP can be computed again on any choice of the images, as
intervals over test images need it.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from itertools import chain
from types import SimpleNamespace
from typing import Any

import numpy as np
from faster_coco_eval import faster_eval_api_cpp as cpp
from pycocotools import mask as rle_masks

from rt_detectron.utils.files import replaced_atomically

# From shapes of detections, shapes of annotations, and which of these are crowds: (detections, annotations).
Overlap = Callable[[np.ndarray, np.ndarray, list[bool]], np.ndarray]


@dataclass(frozen=True)
class Matches:
    """Which of D detections hit which of G objects, on I images and K categories, as COCO's AP counts it.

    A file, ``matches.npz``, holds one of each task ("bbox", "segm", "keypoints"): the array ``FIELD`` of a
    task is ``TASK/FIELD`` there. Beside them are ``image_ids`` (I,) and ``category_ids`` (K,), as in the
    annotation file, ``iou_thrs`` (T,), the thresholds of the overlap, and ``area_rng`` (A, 2), the ranges of
    the area in pixels, of which the first is all areas. Nothing in it is pickled.

    Categories without an object are left out: their AP is undefined. Crowd regions, and objects of another
    size than the area range's, are ignored.

    Attributes:
        image: (D,) index into ``image_ids``, ascending within a category.
        category: (D,) index into ``category_ids``, ascending.
        score: (D,) falling within an image and category, the limit of detections already applied.
        hit: (A, T, D) bool, whether the detection is a true positive.
        ignored: (A, T, D) bool, whether it counts as neither a true nor a false positive.
        object_image: (G,) as ``image``.
        object_category: (G,) as ``category``.
        object_ignored: (A, G) bool, whether the object does not count.
    """

    image: np.ndarray
    category: np.ndarray
    score: np.ndarray
    hit: np.ndarray
    ignored: np.ndarray
    object_image: np.ndarray
    object_category: np.ndarray
    object_ignored: np.ndarray

    @classmethod
    def joined(cls, parts: Sequence["Matches"], areas: int, thresholds: int) -> "Matches":
        """Those of several categories, in their order; with none, of nothing at all."""
        integers, reals = np.zeros(0, np.int64), np.zeros(0)
        flags = np.zeros((areas, thresholds, 0), bool)
        nothing = cls(integers, integers, reals, flags, flags, integers, integers, flags[:, 0])
        return cls(
            *(
                np.concatenate([getattr(part, field.name) for part in (nothing, *parts)], axis=-1)
                for field in fields(cls)
            )
        )

    def of_images(self, images: Sequence[int]) -> "Matches":
        """Those of some images, by their indices."""
        objects = np.isin(self.object_image, images)
        return replace(
            self._of_detections(np.isin(self.image, images)),
            object_image=self.object_image[objects],
            object_category=self.object_category[objects],
            object_ignored=self.object_ignored[:, objects],
        )

    def image_by_image(self, images: int) -> Iterator["Matches"]:
        """Those of each of ``images`` images, for objects of any size; :meth:`of_images` for all at once."""
        found, objects = (np.argsort(which, kind="stable") for which in (self.image, self.object_image))
        whole = replace(
            self, hit=self.hit[:1], ignored=self.ignored[:1], object_ignored=self.object_ignored[:1]
        )
        ends = [
            np.searchsorted(which[order], np.arange(images + 1))
            for which, order in ((self.image, found), (self.object_image, objects))
        ]
        for image in range(images):
            rows, shown = (
                order[end[image] : end[image + 1]] for order, end in zip((found, objects), ends, strict=True)
            )
            yield replace(
                whole._of_detections(rows),
                object_image=self.object_image[shown],
                object_category=self.object_category[shown],
                object_ignored=whole.object_ignored[:, shown],
            )

    def without_detections(self) -> "Matches":
        """The same objects, of which none is found."""
        return self._of_detections(np.zeros(0, int))

    def _of_detections(self, rows: np.ndarray) -> "Matches":
        return replace(
            self,
            image=self.image[rows],
            category=self.category[rows],
            score=self.score[rows],
            hit=self.hit[..., rows],
            ignored=self.ignored[..., rows],
        )


def write_matches(path: str, matches: dict[str, Matches], **common: np.ndarray) -> None:
    """Write ``matches.npz``, see :class:`Matches`; ``common`` are the arrays that its tasks share."""
    arrays = {
        f"{task}/{field.name}": getattr(found, field.name)
        for task, found in matches.items()
        for field in fields(Matches)
    }
    with replaced_atomically(path) as temporary, open(temporary, "wb") as file:
        np.savez_compressed(file, allow_pickle=False, **common, **arrays)


def read_matches(path: str) -> tuple[dict[str, Matches], dict[str, np.ndarray]]:
    """The matches of each task in ``matches.npz``, and the arrays that they share."""
    with np.load(path, allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    tasks = dict.fromkeys(name.partition("/")[0] for name in arrays if "/" in name)
    matches = {
        task: Matches(**{field.name: arrays[f"{task}/{field.name}"] for field in fields(Matches)})
        for task in tasks
    }
    return matches, {name: array for name, array in arrays.items() if "/" not in name}


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
    keep_matches: bool = False,
) -> dict[str, Any]:
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
        keep_matches: whether to give the matches, too, which takes about twice as long.

    Returns:
        "precision" and "scores" of shape (T, R, K, A, M), "recall" of shape (T, K, A, M), and "matches" if
        they are asked for.
    """
    settings = SimpleNamespace(  # as the C++ code names them
        iouThrs=list(iou_thrs),
        recThrs=list(rec_thrs),
        areaRng=[tuple(map(float, limits)) for limits in area_rng],
        maxDets=list(map(int, max_dets)),
        catIds=[0],
        useCats=1,
    )
    t, r, a, m = map(len, (settings.iouThrs, settings.recThrs, settings.areaRng, settings.maxDets))
    precision, scores = (np.full((t, r, num_categories, a, m), -1.0) for _ in range(2))
    recall = np.full((t, num_categories, a, m), -1.0)
    matches: list[Matches] = []
    annotations, detections = annotations.grouped(), detections.grouped(max_dets[-1])
    for k in np.unique(annotations.category):
        wanted, found = (
            o[slice(*np.searchsorted(o.category, [k, k + 1]))] for o in (annotations, detections)
        )
        curves, matched = _match(wanted, found, overlap, settings, keep_matches)
        precision[:, :, k], scores[:, :, k] = curves["precision"][:, :, 0], curves["scores"][:, :, 0]
        recall[:, k] = curves["recall"][:, 0]
        matches += matched
    found_curves = {"precision": precision, "recall": recall, "scores": scores}
    return found_curves | ({"matches": Matches.joined(matches, a, t)} if keep_matches else {})


def curves_of(
    matches: Matches, num_categories: int, rec_thrs: Sequence[float]
) -> tuple[np.ndarray, np.ndarray]:
    """Precision and recall as pycocotools' COCOeval.accumulate() computes them, from what was matched.

    Returns:
        Precision (T, R, K, A) and recall (T, K, A), at the largest limit of detections. -1 where a category
        has no object.
    """
    areas, thresholds = matches.hit.shape[:2]
    precision = np.full((thresholds, len(rec_thrs), num_categories, areas), -1.0)
    recall = np.full((thresholds, num_categories, areas), -1.0)
    for k in np.unique(matches.object_category):
        rows = np.flatnonzero(matches.category == k)
        # Equal scores are ranked by the image.
        rows = rows[np.lexsort((matches.image[rows], -matches.score[rows]))]
        for a in range(areas):
            objects = np.count_nonzero(~matches.object_ignored[a, matches.object_category == k])
            if not objects:
                continue
            hit = matches.hit[a][:, rows]
            true = np.cumsum(hit, axis=1)
            false = np.cumsum(~hit & ~matches.ignored[a][:, rows], axis=1)
            best = np.maximum.accumulate((true / np.maximum(true + false, 1))[:, ::-1], axis=1)[:, ::-1]
            found = true / objects
            recall[:, k, a] = found[:, -1] if len(rows) else 0
            for t in range(thresholds):
                reached = np.searchsorted(found[t], rec_thrs)
                precision[t, :, k, a] = np.append(best[t], 0)[reached]
    return precision, recall


def average_precision(matches: Matches, num_categories: int, rec_thrs: Sequence[float]) -> float:
    """COCO's AP in percent, over all sizes of objects; NaN without any object."""
    precision = curves_of(matches, num_categories, rec_thrs)[0][..., 0]
    defined = precision[precision > -1]
    return 100 * float(defined.mean()) if defined.size else math.nan


def chosen_matches(parts: Sequence[Matches], choice: np.ndarray) -> Matches:
    """Of several sets of detections of the same objects, in each image one.

    Args:
        choice: (I,) for each image an index into ``parts``.
    """
    kept = [part._of_detections(np.flatnonzero(choice[part.image] == i)) for i, part in enumerate(parts)]
    joined = {
        name: np.concatenate([getattr(part, name) for part in kept], axis=-1)
        for name in ("image", "category", "score", "hit", "ignored")
    }
    order = np.lexsort((joined["image"], joined["category"]))  # stable
    return replace(parts[0], **{name: values[..., order] for name, values in joined.items()})


def _match(
    annotations: Objects,
    detections: Objects,
    overlap: Callable,
    settings: SimpleNamespace,
    keep_matches: bool,
) -> tuple[dict[str, Any], list[Matches]]:
    """Precision, recall and scores of one category, and what matched if it is asked for."""
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
    images_and_category = (list(range(len(images))), settings.catIds)
    settings = SimpleNamespace(**vars(settings), imgIds=images_and_category[0])
    if not keep_matches:
        inputs = (overlaps, *datasets, *images_and_category)
        return cpp.COCOevalEvaluateAccumulate(settings, *inputs, True), []
    evaluated = cpp.COCOevalEvaluateImages(
        settings.areaRng, settings.maxDets[-1], settings.iouThrs, overlaps, *datasets,
        *images_and_category, True,
    )  # fmt: skip
    curves = cpp.COCOevalAccumulate(settings, evaluated)
    return curves, [_matches(annotations, detections, evaluated, settings)]


def _matches(
    annotations: Objects, detections: Objects, evaluated: list, settings: SimpleNamespace
) -> Matches:
    """From the C++ code's results of all images at the first area range, then at the next."""
    areas, thresholds = len(settings.areaRng), len(settings.iouThrs)
    # For each image: whether each detection matched at each threshold, of each object whether it is ignored,
    # and of each detection at each threshold. (The rest of the state is not needed.)
    states = [one.__getstate__() for one in evaluated]
    found, objects = len(detections.image), len(annotations.image)
    places = _places(detections.image, thresholds)
    matched, ignored = (
        np.fromiter(
            chain.from_iterable(state[part] for state in states), bool, areas * thresholds * found
        ).reshape(areas, thresholds * found)[:, places]
        for part in (0, 4)
    )
    ignored_objects = np.fromiter(chain.from_iterable(state[3] for state in states), bool, areas * objects)
    return Matches(
        image=detections.image,
        category=detections.category,
        score=detections.score,
        hit=matched & ~ignored,
        ignored=ignored,
        # In each image the C++ code puts the objects that do not count last.
        object_image=annotations.image,
        object_category=annotations.category,
        object_ignored=ignored_objects.reshape(areas, objects),
    )


def _places(image: np.ndarray, thresholds: int) -> np.ndarray:
    """(T, D): where the value of a threshold and a detection is, if those of an image lie side by side.

    Args:
        image: (D,) of each detection, ascending.
    """
    _, first, which, counts = np.unique(image, return_index=True, return_inverse=True, return_counts=True)
    within = np.arange(len(image)) - first[which]
    return thresholds * first[which] + np.arange(thresholds)[:, None] * counts[which] + within
