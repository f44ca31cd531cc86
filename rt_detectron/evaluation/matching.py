"""Matching of detections with annotations, for COCO's and LVIS's AP.

pycocotools visits each image, category, size and threshold in Python. Here all images are matched at once,
with NumPy, and only pairs are looked at that overlap by the lowest threshold or more. Most detections have no
such object, and most others have one.

What was matched is kept as :class:`Matches`: from it AP can be computed again on any choice of the images, as
intervals over test images need it.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
from pycocotools import mask as rle_masks

from rt_detectron.utils.arrays import read_arrays, write_arrays
from rt_detectron.utils.errors import InputError

# Detections that are matched at once, and pairs that are compared at once: they bound the memory.
BLOCK, PAIRS = 100_000, 1_000_000
# Overlaps that are computed by one call. It takes as long as many of them, so that several images share one,
# though only what is of the same image is used of it.
TABLE = 128


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
    write_arrays(path, {**common, **arrays}, compressed=True)


def read_matches(path: str) -> tuple[dict[str, Matches], dict[str, np.ndarray]]:
    """The matches of each task in ``matches.npz``, and the arrays that they share.

    Raises:
        InputError: the file is damaged.
    """
    try:
        arrays = read_arrays(path)
    except InputError as error:
        raise InputError(f"{error}: delete its folder, which is then measured again") from None
    tasks = dict.fromkeys(name.partition("/")[0] for name in arrays if "/" in name)
    matches = {
        task: Matches(**{field.name: arrays[f"{task}/{field.name}"] for field in fields(Matches)})
        for task in tasks
    }
    return matches, {name: array for name, array in arrays.items() if "/" not in name}


@dataclass(frozen=True)
class _Columns:
    """What is known of n objects, one array of n for each field.

    Attributes:
        image: index of the image among those evaluated, -1 for others. Equal scores are ranked by it.
        category: index of the category, -1 for others.
        shape: (n, ...) what the overlap function takes: boxes, masks or keypoints.
        area: in pixels.
        ignored: bool. An annotation does not count, a detection does not count unless it matches.
    """

    image: np.ndarray
    category: np.ndarray
    shape: np.ndarray
    area: np.ndarray
    ignored: np.ndarray

    def __getitem__(self, rows):
        return type(self)(*(getattr(self, field.name)[rows] for field in fields(self)))

    @property
    def rank(self) -> np.ndarray:
        """(n,) 0, 1, ... in each image and category, if they are sorted by these."""
        return _rank((np.diff(self.image, prepend=-1) != 0) | (np.diff(self.category, prepend=-1) != 0))

    def of(self, categories: np.ndarray):
        """Those of these categories, in the images evaluated."""
        return self[(self.image >= 0) & np.isin(self.category, categories)]


@dataclass(frozen=True)
class Annotations(_Columns):
    """Annotations by column.

    Attributes:
        crowd: (n,) bool, whether it may match any number of detections. Then it must be ignored, too.
    """

    crowd: np.ndarray

    def grouped(self) -> "Annotations":
        """Sorted by category and image."""
        return self[np.lexsort((self.image, self.category))]


@dataclass(frozen=True)
class Detections(_Columns):
    """Detections by column.

    Attributes:
        score: (n,).
    """

    score: np.ndarray

    def grouped(self) -> "Detections":
        """Sorted by category, image and falling score."""
        return self[np.lexsort((-self.score, self.image, self.category))]  # stable


def _rank(first: np.ndarray) -> np.ndarray:
    """0, 1, ... from each True on."""
    row = np.arange(len(first))
    return row - np.maximum.accumulate(np.where(first, row, 0))


# From the detections, the annotations, and the indices of P pairs of them, sorted by detection and then by
# annotation, to (P,) overlaps. Those under the number given last cannot match, and may be any such number.
Overlap = Callable[[Detections, Annotations, np.ndarray, np.ndarray, float], np.ndarray]


def column(values: Sequence[Any]) -> np.ndarray:
    """(n,) Python objects."""
    result = np.empty(len(values), object)
    result[:] = values
    return result


def box_iou(
    found: Detections, wanted: Annotations, d: np.ndarray, g: np.ndarray, least: float = 0
) -> np.ndarray:
    """IoU of boxes (x, y, width, height), as pycocotools computes it; an :data:`Overlap`."""
    both = _intersection(found.shape[d], wanted.shape[g])
    size_found, size_wanted = (objects.shape[:, 2] * objects.shape[:, 3] for objects in (found, wanted))
    return _iou(both, size_found[d], size_wanted[g], wanted.crowd[g])


def _intersection(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Its area in pixels, for (P, 4) boxes (x, y, width, height) each."""
    sides = []
    for corner, side in ((0, 2), (1, 3)):
        ends = (each[:, corner] + each[:, side] for each in (boxes, others))
        sides.append(np.minimum(*ends) - np.maximum(boxes[:, corner], others[:, corner]))
    return np.where((sides[0] > 0) & (sides[1] > 0), sides[0] * sides[1], 0.0)


def _iou(both: np.ndarray, found: np.ndarray, wanted: np.ndarray, crowd: np.ndarray) -> np.ndarray:
    """From areas; of a crowd, the part of the detection that it covers."""
    union = np.where(crowd, found, found + wanted - both)
    return np.divide(both, union, out=np.zeros(len(both)), where=both > 0)


def mask_iou(
    found: Detections, wanted: Annotations, d: np.ndarray, g: np.ndarray, least: float = 0
) -> np.ndarray:
    """IoU of compressed run-length encodings, by pycocotools; an :data:`Overlap`.

    Masks are compared only where their areas and boxes leave an IoU of ``least`` possible. A detection's area
    must be its mask's.
    """
    # First by the areas alone, for which no mask has to be decoded.
    used, rows = np.unique(g, return_inverse=True)
    wanted_areas = mask_areas(wanted.shape[used].tolist())[rows]
    smaller = np.minimum(found.area[d], wanted_areas)
    iou = _iou(smaller, found.area[d], wanted_areas, wanted.crowd[g])
    near = np.flatnonzero((iou >= least) & (iou > 0))
    boxes = []
    for objects, indices in ((found, d[near]), (wanted, g[near])):
        used, rows = np.unique(indices, return_inverse=True)
        boxes.append(np.reshape(rle_masks.toBbox(objects.shape[used].tolist()), (-1, 4))[rows])
    both = np.minimum(_intersection(*boxes), smaller[near])
    iou[near] = _iou(both, found.area[d[near]], wanted_areas[near], wanted.crowd[g[near]])
    near = near[(iou[near] >= least) & (iou[near] > 0)]
    iou[near] = _image_by_image(_mask_table, found, wanted, d[near], g[near])
    return iou


def _mask_table(found: np.ndarray, wanted: np.ndarray, crowd: np.ndarray) -> np.ndarray:
    return rle_masks.iou(found.tolist(), wanted.tolist(), crowd.tolist())


def mask_areas(masks: Sequence[dict]) -> np.ndarray:
    """(n,) pixels of compressed run-length encodings, as floats."""
    step = 255  # pycocotools 2.0.11 fails on longer lists
    parts = [rle_masks.area(masks[start : start + step]) for start in range(0, len(masks), step)]
    return np.concatenate([np.zeros(0), *parts])


def _image_by_image(
    table: Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray],
    found: Detections,
    wanted: Annotations,
    d: np.ndarray,
    g: np.ndarray,
) -> np.ndarray:
    """(P,) overlaps.

    Args:
        table: from the shapes of detections, the shapes of annotations, and which of these are crowds, to
            (detections, annotations).
    """
    used, d = np.unique(d, return_inverse=True)
    found = found[used]
    used, g = np.unique(g, return_inverse=True)
    wanted = wanted[used]
    starts = [np.append(np.flatnonzero(objects.rank == 0), len(objects.image)) for objects in (found, wanted)]
    calls = [0]  # where each begins, as the number of an image and category
    for number in range(1, len(starts[0]) - 1):
        rows, columns = (ends[number + 1] - ends[calls[-1]] for ends in starts)
        if rows * columns > TABLE:
            calls.append(number)
    starts = [ends[[*calls, -1]] for ends in starts]
    tables, offsets = [np.zeros(0)], [0]
    for (a, b), (c, e) in zip(*map(pairwise, starts), strict=True):
        tables.append(np.ravel(table(found.shape[a:b], wanted.shape[c:e], wanted.crowd[c:e])))
        offsets.append(offsets[-1] + tables[-1].size)
    call = np.searchsorted(starts[0], d, "right") - 1
    row, column = d - starts[0][call], g - starts[1][call]
    return np.concatenate(tables)[np.array(offsets)[call] + row * np.diff(starts[1])[call] + column]


def keypoint_similarity(
    found: Detections, wanted: Annotations, d: np.ndarray, g: np.ndarray, least: float = 0, *, sigmas
) -> np.ndarray:
    """OKS as pycocotools computes it; an :data:`Overlap`.

    Args:
        sigmas: k standard deviations, https://cocodataset.org/#keypoints-eval.
    """
    return _image_by_image(partial(_oks, sigmas), found, wanted, d, g)


def _oks(sigmas, found: np.ndarray, wanted: np.ndarray, crowd: np.ndarray) -> np.ndarray:
    """(detections, annotations).

    If no keypoint of an annotation is visible, what counts is how far a detection's keypoints lie outside the
    annotation's box, enlarged to three times its sides.

    Args:
        found: (D, 3 k): x, y and a score of each keypoint.
        wanted: (G, 3 k + 5): x, y and visibility of each, the box (x, y, width, height), and the area.
        crowd: not used.
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
    annotations: Annotations,
    detections: Detections,
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

    Args:
        annotations: in any order; equal overlaps go to the last.
        detections: in any order; equal scores in an image keep theirs.
        num_categories: K.
        iou_thrs: T thresholds of the overlap.
        rec_thrs: R recall levels at which precision is sampled.
        area_rng: A ranges (smallest, largest) of the area in pixels.
        max_dets: M limits on the number of detections of a category in an image, ascending.
        keep_matches: whether to give the matches, too.

    Returns:
        "precision" and "scores" of shape (T, R, K, A, M), "recall" of shape (T, K, A, M), and "matches" if
        they are asked for.
    """
    sizes = len(iou_thrs), len(rec_thrs), num_categories, len(area_rng), len(max_dets)
    precision, scores = np.full(sizes, -1.0), np.full(sizes, -1.0)
    recall = np.full((sizes[0], *sizes[2:]), -1.0)
    matches = []
    annotations = annotations.of(np.arange(num_categories)).grouped()
    detections = detections.of(np.unique(annotations.category)).grouped()
    detections = detections[detections.rank < max_dets[-1]]
    for wanted, found in _blocks(annotations, detections):
        matched = _match(wanted, found, overlap, np.asarray(iou_thrs), np.asarray(area_rng, float))
        rank, before = found.rank, -1
        for m, limit in enumerate(max_dets):
            rows = np.flatnonzero(rank < limit)
            if len(rows) == before:  # the same as with the smaller limit
                same = slice(wanted.category[0], wanted.category[-1] + 1)
                for array in (precision, scores, recall):
                    array[..., same, :, m] = array[..., same, :, m - 1]
                continue
            before = len(rows)
            for k, curves in _curves(matched._of_detections(rows), np.asarray(rec_thrs)):
                precision[:, :, k, :, m], recall[:, k, :, m], scores[:, :, k, :, m] = curves
        if keep_matches:
            matches.append(matched)
    found_curves: dict[str, Any] = {"precision": precision, "recall": recall, "scores": scores}
    if keep_matches:
        found_curves["matches"] = Matches.joined(matches, len(area_rng), len(iou_thrs))
    return found_curves


def _blocks(annotations: Annotations, detections: Detections) -> Iterator[tuple[Annotations, Detections]]:
    """Both, which are sorted by category, some whole categories at a time."""
    categories = np.unique(annotations.category)
    block = np.searchsorted(detections.category, categories, side="right") // BLOCK
    for number in np.unique(block):
        ends = categories[block == number][[0, -1]] + (0, 1)
        wanted, found = (
            objects[slice(*np.searchsorted(objects.category, ends))] for objects in (annotations, detections)
        )
        yield wanted, found


def _match(
    wanted: Annotations, found: Detections, overlap: Overlap, iou_thrs: np.ndarray, area_rng: np.ndarray
) -> Matches:
    """As pycocotools' COCOeval.evaluateImg(), of all images and categories; both are grouped.

    In each image and category the detections choose one after another, the best of the objects that are left.
    """
    # A: sizes, T: thresholds, D: detections, G: annotations.
    low, high = area_rng.T[:, :, None]
    others, unfound = (
        (o.area < low) | (o.area > high) | o.ignored for o in (wanted, found)
    )  # (A, G), (A, D)
    hit = np.zeros((len(area_rng), len(iou_thrs), len(found.image)), bool)
    ignored = np.repeat(unfound[:, None], len(iou_thrs), axis=1)
    taken = np.zeros((len(wanted.image), len(area_rng), len(iou_thrs)), bool)
    for d, g, iou in _rounds(found, *_near_pairs(wanted, found, overlap, iou_thrs.min())):
        reaches = iou[:, None] >= np.minimum(iou_thrs, 1 - 1e-10)
        able = reaches[:, None] & (~taken[g] | wanted.crowd[g][:, None, None])  # (pairs, A, T)
        # The best object is that of the last pair, but one that counts comes before all others.
        place = np.arange(len(d))
        value = np.where(others[:, g].T, place[:, None], place[:, None] + len(d))[:, :, None]
        first = np.flatnonzero(np.diff(d, prepend=-1))
        best = np.maximum.reduceat(np.where(able, value, -1), first)  # (detections of this round, A, T)
        matched, counts, rows = best >= 0, best >= len(d), d[first]
        _, a, t = np.nonzero(matched)
        taken[g[best[matched] % len(d)], a, t] = True
        hit[..., rows] = counts.transpose(1, 2, 0)
        ignored[..., rows] = np.where(matched, ~counts, unfound[:, rows].T[:, :, None]).transpose(1, 2, 0)
    return Matches(
        image=found.image,
        category=found.category,
        score=found.score,
        hit=hit,
        ignored=ignored,
        object_image=wanted.image,
        object_category=wanted.category,
        object_ignored=others,
    )


def _near_pairs(
    wanted: Annotations, found: Detections, overlap: Overlap, least: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The pairs of an image and category that overlap by ``least`` or more, and how much.

    Returns:
        Indices of detections, indices of annotations, overlaps. Sorted by detection, then by overlap, then by
        annotation.
    """
    images = max((o.image.max() + 1 for o in (wanted, found) if len(o.image)), default=0)
    groups = [o.category * images + o.image for o in (wanted, found)]
    first, last = (np.searchsorted(groups[0], groups[1], side) for side in ("left", "right"))
    counts = last - first
    block = np.cumsum(counts) // PAIRS
    parts = []
    for number in np.unique(block):
        rows = np.flatnonzero((block == number) & (counts > 0))
        if not len(rows):
            continue
        d = np.repeat(rows, counts[rows])
        g = first[d] + _rank(np.diff(d, prepend=-1) != 0)
        iou = overlap(found, wanted, d, g, least)
        near = np.flatnonzero(iou >= least)
        near = near[np.lexsort((iou[near], d[near]))]  # stable
        parts.append((d[near], g[near], iou[near]))
    nothing = np.zeros(0, int), np.zeros(0, int), np.zeros(0)
    d, g, iou = (np.concatenate(each) for each in zip(nothing, *parts, strict=True))
    return d, g, iou


def _rounds(
    found: Detections, d: np.ndarray, g: np.ndarray, iou: np.ndarray
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """The pairs of the first detection of each image and category, then of each one's second, and so on."""
    choosing, of_pair = np.unique(d, return_inverse=True)
    rank = found[choosing].rank[of_pair]
    order = np.argsort(rank, kind="stable")
    for rows in np.split(order, np.flatnonzero(np.diff(rank[order])) + 1):
        if len(rows):
            yield d[rows], g[rows], iou[rows]


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
    for k, curves in _curves(matches, np.asarray(rec_thrs)):
        precision[:, :, k], recall[:, k], _ = curves
    return precision, recall


def _curves(
    matches: Matches, rec_thrs: np.ndarray
) -> Iterator[tuple[int, tuple[np.ndarray, np.ndarray, np.ndarray]]]:
    """Each category with objects, its precision (T, R, A), recall (T, A) and scores (T, R, A)."""
    for k in np.unique(matches.object_category):
        first, last = np.searchsorted(matches.category, [k, k + 1])
        # Equal scores are ranked by the image.
        rows = first + np.argsort(-matches.score[first:last], kind="stable")
        counting = ~matches.object_ignored[:, slice(*np.searchsorted(matches.object_category, [k, k + 1]))]
        yield (
            k,
            _curve(
                matches.hit[..., rows],
                matches.ignored[..., rows],
                matches.score[rows],
                np.count_nonzero(counting, axis=1),
                rec_thrs,
            ),
        )


def _curve(
    hit: np.ndarray, ignored: np.ndarray, score: np.ndarray, objects: np.ndarray, rec_thrs: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of one category.

    Precision is only computed where a detection hits: between two hits it falls.

    Args:
        hit, ignored: (A, T, D) by falling score.
        objects: (A,) their number.
    """
    areas, thresholds, _ = hit.shape
    counted = np.cumsum(~ignored, axis=2, dtype=np.int32)
    a, t, place = np.nonzero(hit)
    n = _rank(np.diff(a * thresholds + t, prepend=-1) != 0)  # this hit is the n-th, from 0
    best, at_score = np.zeros((2, areas, thresholds, objects.max() + 1))
    best[a, t, n] = (n + 1) / (counted[a, t, place] + np.spacing(1))
    at_score[a, t, n] = score[place]
    best = np.maximum.accumulate(best[..., ::-1], axis=2)[..., ::-1]
    precision, scores = np.full((2, thresholds, len(rec_thrs), areas), -1.0)
    recall = np.full((thresholds, areas), -1.0)
    for area in np.flatnonzero(objects):
        needed = np.searchsorted(np.arange(1, objects[area] + 1) / objects[area], rec_thrs)
        precision[..., area] = best[area][:, needed]
        recall[:, area] = np.count_nonzero(hit[area], axis=1) / objects[area]
        scores[..., area] = at_score[area][:, needed]
        scores[:, rec_thrs <= 0, area] = score[0] if len(score) else 0
    return precision, recall, scores


def average_precision(matches: Matches, num_categories: int, rec_thrs: Sequence[float]) -> float:
    """COCO's AP in percent, over all sizes of objects; NaN without any object."""
    return mean_precision(curves_of(matches, num_categories, rec_thrs)[0][..., 0])


def mean_precision(precision: np.ndarray) -> float:
    """In percent, the mean of what :func:`curves_of` gives where it is defined; NaN if it is nowhere."""
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
