"""Detectron2's SemSegEvaluator, image by image."""

import copy
from collections.abc import Sequence

import numpy as np
from detectron2.data import MetadataCatalog
from detectron2.evaluation import SemSegEvaluator as Detectron2SemSegEvaluator
from detectron2.utils.file_io import PathManager
from PIL import Image

from rt_detectron.data.annotations import annotations_of
from rt_detectron.evaluation.counts import CountingEvaluator, Prediction, gathered, image_id
from rt_detectron.utils.errors import InputError


class SemSegEvaluator(CountingEvaluator, Detectron2SemSegEvaluator):
    """Detectron2's SemSegEvaluator, whose confusion matrices are kept image by image.

    So it can score some images only, and the worst of several attacks be chosen for each of them. Files and
    results are the same.

    Raises:
        InputError: for a test set without the files of its segmentation, or without classes.
    """

    task = "sem_seg"

    def __init__(self, dataset_name: str, distributed: bool = True, output_dir: str | None = None):
        metadata = MetadataCatalog.get(dataset_name)
        for key in ("stuff_classes", "ignore_label"):
            if metadata.get(key) is None:
                raise InputError(f"dataset {dataset_name} has no {key} in its metadata, which mIoU needs")
        with annotations_of(dataset_name):
            # Detectron2's own reader of label files does not work with numpy 2.
            super().__init__(dataset_name, distributed, output_dir, sem_seg_loading_fn=read_labels)

    def process(self, inputs: Sequence[dict], outputs: Sequence[dict]) -> None:
        for given, output in zip(inputs, outputs, strict=True):
            before = self._predictions
            self._predictions = []
            self._conf_matrix[:], self._b_conf_matrix[:] = 0, 0
            super().process([given], [output])
            one = {
                "image_id": image_id(given),
                "confusion": _sparse(self._conf_matrix),
                "boundary": _sparse(self._b_conf_matrix),
                "segments": self._predictions,
            }
            before.append(one)
            self._predictions = before

    def evaluate(self, img_ids: Sequence | None = None) -> dict | None:
        self._predictions = gathered(self._predictions, img_ids)
        if not self._predictions:
            return None
        return {self.task: self._metrics(self._predictions, self._output_dir)}

    def metrics_of(self, predictions: Sequence[Prediction]) -> dict[str, float]:
        return self._metrics(predictions, None)

    def scored(self, predictions: Sequence[Prediction]) -> np.ndarray:
        """True positives, and pixels in the labels and in the predictions, without those to be ignored."""
        found = [self._matrix([each], "confusion")[:-1, :-1] for each in predictions]
        return np.array([[one.diagonal(), one.sum(0), one.sum(1)] for one in found], float)

    def main_metric(self, counts: np.ndarray) -> np.ndarray:
        """mIoU, over the classes in the labels."""
        hits, labelled, predicted = np.moveaxis(counts, -2, 0)
        with np.errstate(invalid="ignore", divide="ignore"):
            iou = np.where(labelled > 0, hits / (labelled + predicted - hits), np.nan)
        return np.nanmean(iou, -1) if (labelled > 0).any() else np.full(iou.shape[:-1], np.nan)

    def _metrics(self, predictions: Sequence[Prediction], output_dir: str | None) -> dict[str, float]:
        whole = copy.copy(self)
        whole._distributed, whole._output_dir = False, output_dir
        whole._conf_matrix = self._matrix(predictions, "confusion")
        whole._b_conf_matrix = self._matrix(predictions, "boundary")
        whole._predictions = [segment for each in predictions for segment in each.get("segments", ())]
        with np.errstate(invalid="ignore", divide="ignore"):
            return Detectron2SemSegEvaluator.evaluate(whole)[self.task]

    def _matrix(self, predictions: Sequence[Prediction], kind: str) -> np.ndarray:
        """(K + 1, K + 1) predictions by labels, summed over the images."""
        side = self._num_classes + 1
        total = np.zeros(side * side, np.int64)
        for each in predictions:
            total[each[kind]["cells"]] += each[kind]["pixels"]
        return total.reshape(side, side)


def read_labels(path: str, dtype: type = int) -> np.ndarray:
    """(H, W) the labels of an image's pixels, from a file as Detectron2 reads them."""
    with PathManager.open(path, "rb") as file:
        return np.asarray(Image.open(file)).astype(dtype)


def _sparse(matrix: np.ndarray) -> dict[str, list[int]]:
    cells = np.flatnonzero(matrix)
    return {"cells": cells.tolist(), "pixels": matrix.ravel()[cells].tolist()}
