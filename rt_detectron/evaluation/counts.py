"""Evaluators whose metrics are computed from counts that add up over the images, such as those of pixels."""

import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import numpy as np
from detectron2.utils import comm

# "image_id" and the counts, as JSON values.
Prediction = dict[str, Any]


class CountingEvaluator(ABC):
    """What the robustness evaluation needs of such an evaluator.

    For Detectron2's evaluators, ahead of them among the bases; ``_predictions`` has one for each image.
    """

    task: ClassVar[str]
    _predictions: list[Prediction]

    @abstractmethod
    def evaluate(self, img_ids: Sequence | None = None) -> dict | None:
        """The metrics of the images with these ids; None is all."""

    @abstractmethod
    def metrics_of(self, predictions: Sequence[Prediction]) -> dict[str, float]:
        """The metrics of some images' counts."""

    @abstractmethod
    def scored(self, predictions: Sequence[Prediction]) -> np.ndarray:
        """(N, S, K) the counts that the main metric is computed from, of N images and K classes."""

    @abstractmethod
    def main_metric(self, counts: np.ndarray) -> np.ndarray:
        """(...) the main metric of counts (..., S, K) of all images together."""


def gathered(predictions: list[Prediction], img_ids: Iterable | None) -> list[Prediction]:
    """In the first process those of all processes, of the images with these ids; in the others []."""
    parts = comm.gather(predictions)
    found = {each["image_id"]: each for each in itertools.chain(*parts)}  # a sampler may repeat images
    chosen = found if img_ids is None else [each for each in img_ids if each in found]
    return [found[each] for each in sorted(chosen, key=str)]


def image_id(given: dict) -> Any:
    """Of an input: its "image_id", else its file's name."""
    return given.get("image_id", given["file_name"])


def worst_choice(counts: np.ndarray, metric) -> np.ndarray:
    """(N,) for each image the attack of A that leaves the least of a metric of all images together.

    Where the metric is no mean over images, none of them has a worst attack of its own. As Croce et al. do
    (see :mod:`rt_detectron.attacks.segmentation`), begin with the attack that leaves the least by itself, and
    go through the images as long as another attack on one of them leaves less.

    Args:
        counts: (A, N, S, K).
        metric: from (A, S, K), sums over the images, to (A,).
    """
    attacks, images = counts.shape[:2]
    single = np.nan_to_num(metric(counts.sum(1)), nan=np.inf)
    choice = np.full(images, int(single.argmin()))
    total = counts[choice[0]].sum(0)
    least, improved = single.min(), attacks > 1
    while improved:
        improved = False
        for image in range(images):
            tried = total - counts[choice[image], image] + counts[:, image]
            left = np.nan_to_num(metric(tried), nan=np.inf)
            best = int(left.argmin())
            if left[best] < least - 1e-12:
                choice[image], total, least, improved = best, tried[best], left[best], True
    return choice
