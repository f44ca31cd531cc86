"""Accuracy as the transfer literature reports it, and the predictions it comes from."""

import os
from collections.abc import Sequence

import numpy as np
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm
from torch import Tensor

from rt_detectron.data.loader import in_order
from rt_detectron.utils.files import write_json


def accuracies(
    labels: Sequence[int], predicted: Sequence[int], classes: Sequence[str], metric: str
) -> dict[str, float]:
    """In percent: "top1" over all images, "mean_per_class" over the classes that have any, and as "accuracy"
    the one that ``metric`` names; "accuracy-CLASS" of each class, NaN without images.
    """
    indices = np.asarray(labels)
    right = np.equal(indices, np.asarray(predicted))
    images = np.bincount(indices, minlength=len(classes))
    with np.errstate(invalid="ignore"):
        per_class = 100 * np.bincount(indices, right, minlength=len(classes)) / images
    found = {"top1": 100 * right.mean(), "mean_per_class": np.nanmean(per_class)}
    found = {"accuracy": found[metric], **found}
    found |= {f"accuracy-{name}": value for name, value in zip(classes, per_class, strict=True)}
    return {name: float(value) for name, value in found.items()}


class TransferEvaluator(DatasetEvaluator):
    """:func:`accuracies` on the test images of a data set; predictions are written to ``predictions.json``.

    Args:
        dataset: the test images, with ``classes`` and ``metric``.
        folder: for the predictions.
    """

    def __init__(self, dataset, folder: str):
        self.dataset = dataset
        self.folder = folder
        self.reset()

    def reset(self):
        self.batches: list[tuple[np.ndarray, ...]] = []

    def process(self, inputs, outputs: Tensor):
        """``inputs``: a batch (images, labels, keys); ``outputs``: its logits (N, num_classes)."""
        _, labels, keys = inputs
        self.batches.append((np.array(keys), labels.cpu().numpy(), outputs.argmax(1).cpu().numpy()))

    def evaluate(self) -> dict:
        """{"accuracy": :func:`accuracies`}, in the first process."""
        gathered = comm.gather(self.batches)
        if not comm.is_main_process():
            return {}
        keys, labels, predicted = (
            in_order([[batch[i] for batch in batches] for batches in gathered]).tolist() for i in range(3)
        )
        content = {"keys": keys, "labels": labels, "predicted": predicted}
        write_json(predictions_file(self.folder), content)
        return {"accuracy": accuracies(labels, predicted, self.dataset.classes, self.dataset.metric)}


def predictions_file(folder: str) -> str:
    """The path of the predictions of the transfer in ``folder``."""
    return os.path.join(folder, "predictions.json")
