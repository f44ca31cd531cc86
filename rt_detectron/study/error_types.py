"""What a detector does wrong: the AP50 that mending each of six types of error would gain.

TIDE, Bolya et al. 2020, https://arxiv.org/abs/2008.08115, as its package tidecv computes it, but with the
mean over the categories that have objects, as in COCO's AP. A false positive has the first type that fits:

- localisation: overlaps an object of its class by an IoU of 0.1 to 0.5. Mended, it hits that object.
- class: would hit an object of another class. Mended, it has that class.
- duplicate: hits an object that a surer detection has hit. Mended, it is not there.
- background: overlaps nothing by more than 0.1. Mended, it is not there.
- both: the rest, of another class and badly placed. Mended, it is not there.

and missed: objects that no detection hits, nor would hit if its place or class were mended. Mended, they do
not count. Of several detections that would hit one object when mended the surest does, and the others are not
there. Gains overlap, so they do not add up to 100.
"""

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import numpy as np
from pycocotools import mask as rle_masks
from pycocotools.coco import COCO

from rt_detectron.study.bootstrap import MAX_DETECTIONS, interpolated_precision

ERROR_TYPES = CLASS, LOCALISATION, BOTH, DUPLICATE, BACKGROUND, MISSED = (
    "class", "localisation", "both", "duplicate", "background", "missed",
)  # fmt: skip
_HIT, _IGNORED = "hit", ""
_FOREGROUND, _BACKGROUND = 0.5, 0.1  # IoU


def error_gains(coco: COCO, detections: list[dict[str, Any]], task: str) -> dict[str, float]:
    """AP50 in percent, and what mending each of ERROR_TYPES would add to it; NaN without objects.

    Crowd regions are no objects; a detection of their class in one is neither right nor wrong.

    Args:
        detections: the entries of a COCO results file.
        task: "bbox" or "segm".

    Returns:
        "AP50" and each of ERROR_TYPES.
    """
    by_image = defaultdict(list)
    for detection in detections:
        by_image[detection["image_id"]].append(detection)
    rows: list[tuple] = []
    objects: dict[int, int] = defaultdict(int)
    missed: dict[int, int] = defaultdict(int)
    for image in sorted(coco.imgs):
        annotations = coco.imgToAnns.get(image, [])
        of_image, left = _image(coco, annotations, by_image.get(image, []), task)
        rows += of_image
        for annotation in annotations:
            objects[annotation["category_id"]] += not annotation.get("iscrowd")
        for number in left:
            missed[number] += 1
    types = np.array([row[0] for row in rows], object)
    score, category = (np.array([row[column] for row in rows], float) for column in (1, 2))
    mended = np.array([np.nan if row[3] is None else row[3] for row in rows], float)

    def ap(mend: str) -> float:
        """With the errors of one type mended; of none if it is empty."""
        chosen = (types == mend) if mend else np.zeros(len(rows), bool)
        hit = (types == _HIT) | (chosen & ~np.isnan(mended))
        kept = (types != _IGNORED) & ~(chosen & ~hit)
        counts = {k: n - missed[k] * (mend == MISSED) for k, n in objects.items() if n}
        now = np.where(chosen & hit, mended, category)
        return _mean_ap(now[kept], score[kept], hit[kept], counts)

    before = ap("")
    # Below 0 only because AP takes precision at 101 recalls.
    return {"AP50": before, **{kind: float(np.maximum(ap(kind) - before, 0.0)) for kind in ERROR_TYPES}}


def _mean_ap(category: np.ndarray, score: np.ndarray, hit: np.ndarray, objects: Mapping[int, int]) -> float:
    """COCO's AP at one IoU, the mean over categories with objects, in percent.

    Args:
        category, score, hit: (D,) of each detection.
        objects: category -> its number of objects.
    """
    order = np.argsort(-score, kind="stable")
    category, hit = category[order], hit[order]
    found = []
    for number, count in objects.items():
        of_category = hit[category == number]
        if count:
            counted = np.ones(len(of_category), bool)
            found.append(interpolated_precision(of_category, counted, count).mean())
        else:  # all its objects were missed; what is found is wrong
            found.append(0.0 if len(of_category) else 1.0)
    return 100 * float(np.mean(found)) if found else np.nan


def _image(
    coco: COCO, annotations: list[dict[str, Any]], detections: list[dict[str, Any]], task: str
) -> tuple[list[tuple], list[int]]:
    """The detections of one image, and the categories of its missed objects.

    Returns:
        Of each detection its type, score, category, and the category in which it hits if its error is mended,
        else None.
    """
    found = _surest(detections)
    objects = [annotation for annotation in annotations if not annotation.get("iscrowd")]
    crowds = [annotation for annotation in annotations if annotation.get("iscrowd")]
    if not found:
        return [], [one["category_id"] for one in objects]
    of_found, of_objects, of_crowds = (
        np.array([one["category_id"] for one in several], int) for several in (found, objects, crowds)
    )
    iou, in_crowd = _overlap(coco, found, objects, task), _overlap(coco, found, crowds, task)
    same = of_found[:, None] == of_objects
    hit, used = _hits(np.where(same, iou, 0.0))
    ignored = ~hit & ((in_crowd >= _FOREGROUND) & (of_found[:, None] == of_crowds)).any(axis=1)
    types: list[str] = []
    mends: dict[int, int] = {}  # object -> the surest detection that hits it when mended
    for row in range(len(found)):
        if hit[row] or ignored[row]:
            types.append(_HIT if hit[row] else _IGNORED)
            continue
        kind, thing = _error(iou[row], same[row], used)
        types.append(kind)
        if thing is not None and not used[thing]:
            mends.setdefault(thing, row)  # found is sorted by score
    by_row = {row: int(of_objects[thing]) for thing, row in mends.items()}
    rows = [
        (kind, one["score"], its_class, by_row.get(row))
        for row, (kind, one, its_class) in enumerate(zip(types, found, of_found, strict=True))
    ]
    return rows, [int(of_objects[thing]) for thing in np.flatnonzero(~used) if thing not in mends]


def _surest(detections: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """By falling score, at most MAX_DETECTIONS of each category."""
    counts: dict[int, int] = defaultdict(int)
    kept = []
    for one in sorted(detections, key=lambda one: -one["score"]):
        counts[one["category_id"]] += 1
        if counts[one["category_id"]] <= MAX_DETECTIONS:
            kept.append(one)
    return kept


def _overlap(coco: COCO, found: list[dict], wanted: list[dict], task: str) -> np.ndarray:
    """(D, G) IoU; with crowd regions the part of a detection that lies within."""
    if not wanted:
        return np.zeros((len(found), 0))
    if task == "segm":
        shapes = [one["segmentation"] for one in found], [coco.annToRLE(one) for one in wanted]
    else:
        shapes = [one["bbox"] for one in found], [one["bbox"] for one in wanted]
    return rle_masks.iou(*shapes, [int(one.get("iscrowd", 0)) for one in wanted])


def _hits(iou: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which detections, by falling score, hit an object, and which objects are hit, as in COCO's AP.

    Args:
        iou: (D, G), 0 where the classes differ.
    """
    hit, used = np.zeros(len(iou), bool), np.zeros(iou.shape[1], bool)
    for row in np.flatnonzero((iou >= _FOREGROUND).any(axis=1)):
        free = np.where(used, 0.0, iou[row])
        best = int(free.argmax())
        if free[best] >= _FOREGROUND:
            hit[row] = used[best] = True
    return hit, used


def _error(iou: np.ndarray, same: np.ndarray, used: np.ndarray) -> tuple[str, int | None]:
    """The type of a false positive, and the object that it would hit if it were mended.

    Args:
        iou: (G,) with the objects of its image.
        same: (G,) bool, whether these are of its class.
        used: (G,) bool, whether these are hit.
    """
    if not len(iou):
        return BACKGROUND, None
    own, other = np.where(same, iou, 0.0), np.where(same, 0.0, iou)
    if _BACKGROUND <= own.max() <= _FOREGROUND:
        return LOCALISATION, int(own.argmax())
    if other.max() >= _FOREGROUND:
        return CLASS, int(other.argmax())
    if np.where(used, own, 0.0).max() >= _FOREGROUND:
        return DUPLICATE, None
    return (BACKGROUND if iou.max() <= _BACKGROUND else BOTH), None
