"""The images that a detector is evaluated on again and again, by Detectron2's own evaluation loop."""

import inspect
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetFromList, DatasetMapper, MapDataset
from detectron2.data.build import trivial_batch_collator
from detectron2.evaluation import DatasetEvaluator, inference_on_dataset
from detectron2.utils import comm
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from rt_detectron.attacks.detection import detect as detect_on
from rt_detectron.data import CheckedMapper
from rt_detectron.evaluation.build import parts_of
from rt_detectron.evaluation.coco import COCOEvaluator
from rt_detectron.evaluation.robustness.measurement import ImageByImage, Metrics
from rt_detectron.layers.frozen_norm import fixed_weights
from rt_detectron.utils.errors import InputError
from rt_detectron.utils.numbers import is_number

# Changes a batch of a detector's inputs before it sees them, as an attack does.
Perturb = Callable[[nn.Module, list[dict]], list[dict]]


def annotated_test_mapper(cfg: CfgNode) -> DatasetMapper:
    """Detectron2's test mapper, but the ground truth is kept as "instances", resized with the image."""
    return DatasetMapper(**{**DatasetMapper.from_config(cfg, is_train=False), "is_train": True})


def spread(items: Sequence, count: int) -> list:
    """``count`` items, evenly spread; all if there are fewer."""
    count = min(count, len(items))
    return [items[i * len(items) // count] for i in range(count)]


def with_image_ids(dicts: Sequence[dict]) -> list[dict]:
    """Dataset dicts that all have an "image_id".

    Sets for semantic segmentation have none: it is the file's path below the folder that all are in.
    """
    if all("image_id" in each for each in dicts):
        return list(dicts)
    folder = os.path.commonpath([os.path.dirname(each["file_name"]) for each in dicts])
    return [{"image_id": os.path.relpath(each["file_name"], folder), **each} for each in dicts]


@dataclass(frozen=True)
class DetectionTestSet:
    """A test set or a part of it.

    With several processes each one evaluates its share, and the first one has the results of all.

    Attributes:
        dicts: of a dataset in Detectron2's format.
        evaluator: of that dataset. If it has more images, only the objects in these count.
        mapper: from such a dict to a detector's input.
        whole: whether ``dicts`` are all images of the evaluator.
        num_workers: of the data loader.
        folder: where the evaluator writes its files.
        batch_size: images that are changed and evaluated at once, if they are of one size.
    """

    dicts: Sequence[dict]
    evaluator: DatasetEvaluator
    mapper: Callable[[dict], dict]
    whole: bool = True
    num_workers: int = 0
    folder: str = ""
    batch_size: int = 1

    def keep_matches(self) -> None:
        """Have the evaluator write ``matches.npz``, if it is one of COCO's."""
        for part in parts_of(self.evaluator):
            if isinstance(part, COCOEvaluator):
                part.keeps_matches = True

    @property
    def can_be_spread(self) -> bool:
        """Whether the evaluator can score only some of the images."""
        return "img_ids" in inspect.signature(self.evaluator.evaluate).parameters

    def spread(self, count: int) -> "DetectionTestSet":
        """``count`` of its images, evenly spread; the set itself if ``count`` is 0 or at least its size.

        Raises:
            InputError: if the evaluator cannot score only some images.
        """
        if count == 0 or count >= len(self.dicts):
            return self
        if not self.can_be_spread:
            raise InputError(
                f"{type(self.evaluator).__name__} only scores whole test sets: set MAX_IMAGES to 0 for "
                "all evaluations"
            )
        return replace(self, dicts=spread(self.dicts, count), whole=False)

    def evaluate(
        self,
        model: nn.Module,
        label: str = "",
        *,
        perturb: Perturb | None = None,
        mapper: Callable[[dict], dict] | None = None,
        clean: Metrics | None = None,
        kept: ImageByImage | None = None,
    ) -> Metrics:
        """The evaluator's metrics of a detector in eval mode. Its modes are restored afterwards.

        Args:
            model: a detector of Detectron2.
            label: of the progress bar.
            perturb: an attack with the detector's losses needs :func:`annotated_test_mapper`.
            mapper: replaces this set's own, to change images as they are loaded.
            clean: metrics on the same images without a change, see :func:`zero_where_nothing_is_found`.
            kept: the evaluator with the predictions of earlier runs, whose images are left out.

        Returns:
            In the first process the metrics, in the others {}.
        """
        evaluator = kept or self.evaluator
        done = kept.done if kept else ()
        loader = self._loader(
            [each for each in self.dicts if not done or each["image_id"] not in done], mapper
        )
        bar = tqdm(loader, label, unit="batch", leave=False, disable=None if comm.is_main_process() else True)

        def detect(inputs: list[dict]) -> list[dict]:
            if perturb is not None:
                inputs = perturb(model, inputs)
            if kept is not None:
                kept.note(inputs)
            return detect_on(model, inputs)

        if not self.whole:
            evaluator = _OfImages(evaluator, [image["image_id"] for image in self.dicts])
        with fixed_weights(model):
            metrics = inference_on_dataset(detect, bar, evaluator)
        if clean is None or not comm.is_main_process():
            return metrics
        return zero_where_nothing_is_found(metrics, clean)

    def _loader(self, dicts: list[dict], mapper: Callable[[dict], dict] | None) -> DataLoader:
        """The share of this process; images that lie side by side, and may be alike, go to different ones."""
        records = DatasetFromList(dicts, copy=False, serialize=bool(dicts))  # it cannot serialise none
        return DataLoader(
            MapDataset(records, CheckedMapper(mapper or self.mapper, skipping="")),
            batch_sampler=_batches(dicts, self.batch_size)[comm.get_rank() :: comm.get_world_size()],
            num_workers=self.num_workers,
            collate_fn=trivial_batch_collator,
        )


def _batches(dicts: Sequence[dict], size: int) -> list[list[int]]:
    """The indices of ``dicts`` in batches of images of one size, which need no padding to each other's."""
    if size == 1:
        return [[i] for i in range(len(dicts))]
    by_size: dict[Any, list[int]] = {}
    for i, each in enumerate(dicts):
        shape = (each["height"], each["width"]) if "height" in each and "width" in each else i
        by_size.setdefault(shape, []).append(i)
    return [alike[i : i + size] for alike in by_size.values() for i in range(0, len(alike), size)]


class _OfImages(DatasetEvaluator):
    """An evaluator that scores some images only. Otherwise objects in the others would count as missed."""

    def __init__(self, evaluator: DatasetEvaluator, image_ids: list):
        self.evaluator = evaluator
        self.image_ids = image_ids
        self.reset, self.process = evaluator.reset, evaluator.process

    def evaluate(self):
        return self.evaluator.evaluate(img_ids=self.image_ids)


def zero_where_nothing_is_found(metrics: Metrics, clean: Metrics) -> Metrics:
    """``metrics`` with 0 where they are undefined or missing but ``clean`` is defined.

    Whether AP is defined depends on the ground truth alone, which is the same for both. But evaluators leave
    all metrics undefined if there is no detection at all. That is AP 0, which the vanishing attack aims for.
    """
    tasks = {**clean, **metrics}
    return {task: _filled(metrics.get(task, {}), clean.get(task, {})) for task in tasks}


def _filled(values: dict[str, Any], clean: dict[str, Any]) -> dict[str, Any]:
    def filled(key: str) -> float | None:
        nothing_found = is_number(clean.get(key)) and not is_number(values.get(key))
        return 0.0 if nothing_found else values.get(key, math.nan)

    return {key: filled(key) for key in {**clean, **values}}
