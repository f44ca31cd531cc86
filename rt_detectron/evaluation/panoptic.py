"""Panoptic quality, as COCO's panopticapi computes it, which no package index has."""

import json
import os
from collections.abc import Sequence

import numpy as np
from detectron2.evaluation import COCOPanopticEvaluator as Detectron2COCOPanopticEvaluator
from detectron2.utils.file_io import PathManager
from PIL import Image

from rt_detectron.data.annotations import annotations_of
from rt_detectron.evaluation.counts import CountingEvaluator, Prediction, gathered
from rt_detectron.utils.errors import InputError

_VOID = 0  # the id of pixels without a label


class COCOPanopticEvaluator(CountingEvaluator, Detectron2COCOPanopticEvaluator):
    """Detectron2's COCOPanopticEvaluator, which matches segments itself, image by image.

    Results are the same; segments are not written to files.

    Raises:
        InputError: for annotations that cannot be used.
    """

    task = "panoptic_seg"

    def __init__(self, dataset_name: str, output_dir: str | None = None):
        super().__init__(dataset_name, output_dir)
        path = self._metadata.panoptic_json
        with annotations_of(path), PathManager.open(path, "r") as file:
            content = json.load(file)
            self._truth = {str(each["image_id"]): each for each in content["annotations"]}
            self._is_thing = {each["id"]: bool(each["isthing"]) for each in content["categories"]}
        self._number = {category: number for number, category in enumerate(self._is_thing)}

    def process(self, inputs: Sequence[dict], outputs: Sequence[dict]) -> None:
        for given, output in zip(inputs, outputs, strict=True):
            truth = self._truth.get(str(given["image_id"]))
            if truth is None:
                raise InputError(f"{self._metadata.panoptic_json}: no image {given['image_id']}")
            labels = read_ids(os.path.join(self._metadata.panoptic_root, truth["file_name"]))
            ids, segments = self._segments(output["panoptic_seg"])
            if ids.shape != labels.shape:
                raise InputError(
                    f"{truth['file_name']}: is {labels.shape[::-1]} pixels, its image {ids.shape[::-1]}"
                )
            counts = match_segments(labels, truth["segments_info"], ids, segments)
            self._predictions.append({"image_id": given["image_id"], "counts": counts})

    def _segments(self, found) -> tuple[np.ndarray, dict[int, int]]:
        """(H, W) ids of segments, and their categories by id; Panoptic-DeepLab has both in one number."""
        image, segments = found
        ids = image.cpu().numpy().astype(np.int64)
        if segments is None:
            ids = ids + 1  # -1 stands for no label
            present = np.unique(ids[ids != _VOID])
            things = self._metadata.thing_dataset_id_to_contiguous_id.values()
            segments = [
                {"id": int(one), "category_id": (int(one) - 1) // self._metadata.label_divisor}
                for one in present
            ]
            segments = [{**each, "isthing": each["category_id"] in things} for each in segments]
        converted = [self._convert_category_id(dict(each)) for each in segments]
        return ids, {each["id"]: each["category_id"] for each in converted}

    def evaluate(self, img_ids: Sequence | None = None) -> dict | None:
        self._predictions = gathered(self._predictions, img_ids)
        return {self.task: self.metrics_of(self._predictions)} if self._predictions else None

    def scored(self, predictions: Sequence[Prediction]) -> np.ndarray:
        """The sum of the IoUs of the matched segments, matches, false and missed segments."""
        found = np.zeros((len(predictions), 4, len(self._number)))
        for image, each in enumerate(predictions):
            for category, *counts in each["counts"]:
                found[image, :, self._number[category]] = counts
        return found

    def main_metric(self, counts: np.ndarray) -> np.ndarray:
        """PQ, over the categories with a segment."""
        return _quality(counts)[0]

    def metrics_of(self, predictions: Sequence[Prediction]) -> dict[str, float]:
        total = self.scored(predictions).sum(0)
        is_thing = np.array(list(self._is_thing.values()))
        metrics = {}
        for ending, chosen in (("", slice(None)), ("_th", is_thing), ("_st", ~is_thing)):
            for name, value in zip(("PQ", "SQ", "RQ"), _quality(total[:, chosen]), strict=True):
                metrics[f"{name}{ending}"] = 100 * float(value)
        return metrics


def match_segments(
    labels: np.ndarray, truth: Sequence[dict], ids: np.ndarray, segments: dict[int, int]
) -> list[list]:
    """What panoptic quality counts in an image (Kirillov et al. 2019, https://arxiv.org/abs/1801.00868).

    Segments of one category with an IoU above 0.5 match. Pixels without a label, and in a crowd of its
    category, do not count against a prediction.

    Args:
        labels, ids: (H, W) ids of the segments in the annotation and in the prediction; 0 stands for none.
        truth: of the annotation's segments "id", "category_id", "area" and "iscrowd".
        segments: the category of each predicted segment.

    Returns:
        For each category that has any: its id, the sum of the matches' IoUs, matches, false and missed
        segments.
    """
    pairs, areas = np.unique(np.stack([labels.ravel(), ids.ravel()]), axis=1, return_counts=True)
    overlap = {(int(a), int(b)): int(n) for (a, b), n in zip(pairs.T, areas, strict=True)}
    area: dict[int, int] = {}
    for (_, predicted), shared in overlap.items():
        area[predicted] = area.get(predicted, 0) + shared
    counts: dict[int, list] = {}

    def count(category: int, place: int, value: float = 1) -> None:
        counts.setdefault(category, [0.0, 0, 0, 0])[place] += value

    objects = {each["id"]: each for each in truth}
    crowds = {each["category_id"]: each["id"] for each in truth if each.get("iscrowd", 0)}
    matched_labels, matched = set(), set()
    for (label, predicted), shared in overlap.items():
        known = objects.get(label)
        if known is None or known.get("iscrowd", 0) or segments.get(predicted) != known["category_id"]:
            continue
        union = known["area"] + area[predicted] - shared - overlap.get((_VOID, predicted), 0)
        if shared / union > 0.5:
            count(known["category_id"], 0, shared / union)
            count(known["category_id"], 1)
            matched_labels.add(label)
            matched.add(predicted)
    for predicted, category in segments.items():
        if predicted in matched or predicted not in area:
            continue
        excused = overlap.get((_VOID, predicted), 0)
        if category in crowds:
            excused += overlap.get((crowds[category], predicted), 0)
        if excused / area[predicted] <= 0.5:
            count(category, 2)
    for each in truth:
        if each["id"] not in matched_labels and not each.get("iscrowd", 0):
            count(each["category_id"], 3)
    return [[category, *values] for category, values in sorted(counts.items())]


def read_ids(path: str) -> np.ndarray:
    """(H, W) the ids of an image's segments, from one of COCO's panoptic pictures."""
    with annotations_of(path), PathManager.open(path, "rb") as file:
        red, green, blue = np.moveaxis(np.asarray(Image.open(file).convert("RGB"), np.int64), -1, 0)
    return red + 256 * green + 256**2 * blue


def _quality(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """PQ, SQ and RQ of counts (..., 4, K), means over the categories that have a segment; 0 without any."""
    iou, hits, false, missed = np.moveaxis(counts, -2, 0)
    half = (false + missed) / 2
    present = hits + half > 0
    number = np.maximum(present.sum(-1), 1)
    pq = (iou / np.where(present, hits + half, 1)).sum(-1) / number
    sq = (iou / np.where(hits > 0, hits, 1)).sum(-1) / number
    rq = (hits / np.where(present, hits + half, 1)).sum(-1) / number
    return pq, sq, rq
