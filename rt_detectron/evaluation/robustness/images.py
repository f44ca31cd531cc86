"""AP of a detector on images that were attacked or corrupted, by Detectron2's own evaluation loop."""

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from detectron2.config import CfgNode
from detectron2.data import DatasetMapper, build_detection_test_loader
from detectron2.evaluation import DatasetEvaluator, inference_on_dataset
from detectron2.utils import comm
from torch import nn
from tqdm import tqdm

from rt_detectron.attacks import DetectorAttack, RandomNoise
from rt_detectron.utils.errors import InputError
from rt_detectron.utils.modes import eval_mode

Metrics = dict[str, dict[str, float]]  # {"bbox": {"AP": 38.6, ...}, "segm": {...}}, in percent
# Called after each batch with the detector's inputs and its outputs.
Watcher = Callable[[list[dict], list[dict]], None]


def annotated_test_mapper(cfg: CfgNode) -> DatasetMapper:
    """Detectron2's mapper for tests, but the ground truth stays, resized with the image, as "instances"."""
    return DatasetMapper(**{**DatasetMapper.from_config(cfg, is_train=False), "is_train": True})


def spread(items: Sequence, count: int) -> list:
    """``count`` of the items, or all if there are fewer, evenly spread."""
    count = min(count, len(items))
    return [items[i * len(items) // count] for i in range(count)]


@dataclass(frozen=True)
class TestImages:
    """The images that a detector is measured on again and again, whole or a part of a test set.

    In several processes each has its share, and results are those of all in the first, {} in the others.

    Attributes:
        dicts: of a dataset in Detectron2's format.
        evaluator: of that dataset. It may have more images: only the objects of these count.
        mapper: from such a dict to a detector's input.
        whole: whether ``dicts`` is all that the evaluator has.
        num_workers: of the data loader.
    """

    dicts: Sequence[dict]
    evaluator: DatasetEvaluator
    mapper: Callable[[dict], dict]
    whole: bool = True
    num_workers: int = 0

    __test__ = False  # no test, whatever pytest makes of the name

    def spread(self, count: int) -> "TestImages":
        """So many of the images, evenly spread; these themselves if ``count`` is 0 or not less than all.

        Raises:
            InputError: where the evaluator cannot restrict itself to some images.
        """
        if count == 0 or count >= len(self.dicts):
            return self
        if not _takes_image_ids(self.evaluator):
            raise InputError(
                f"{type(self.evaluator).__name__} only scores whole test sets: set TEST.ATTACK.MAX_IMAGES "
                "and TEST.CORRUPTION.MAX_IMAGES to 0"
            )
        return replace(self, dicts=spread(self.dicts, count), whole=False)

    def evaluate(
        self,
        model: nn.Module,
        label: str = "",
        perturb: Callable[[nn.Module, list[dict]], list[dict]] | None = None,
        mapper: Callable[[dict], dict] | None = None,
        watch: Watcher | None = None,
    ) -> Metrics:
        """The evaluator's metrics of ``model`` in eval mode; it gets its modes back.

        Args:
            model: a detector of Detectron2.
            label: what the progress bar says.
            perturb: changes a batch of inputs before the detector sees them.
            mapper: instead of this set's own.
            watch: called after each batch.
        """
        loader = build_detection_test_loader(
            self.dicts, mapper=mapper or self.mapper, num_workers=self.num_workers
        )
        bar = tqdm(loader, label, unit="batch", leave=False, disable=None if comm.is_main_process() else True)

        def detect(inputs: list[dict]) -> list[dict]:
            if perturb is not None:
                inputs = perturb(model, inputs)
            outputs = model(inputs)
            if watch is not None:
                watch(inputs, outputs)
            return outputs

        with eval_mode(model):
            return inference_on_dataset(detect, bar, self._restricted_evaluator())

    def _restricted_evaluator(self) -> DatasetEvaluator:
        if self.whole:
            return self.evaluator
        return _OfImages(self.evaluator, [image["image_id"] for image in self.dicts])


class _OfImages(DatasetEvaluator):
    """An evaluator that scores some images only: without it, objects of the others would count as missed."""

    def __init__(self, evaluator: DatasetEvaluator, image_ids: list):
        self.evaluator = evaluator
        self.image_ids = image_ids
        self.reset, self.process = evaluator.reset, evaluator.process

    def evaluate(self):
        return self.evaluator.evaluate(img_ids=self.image_ids)


def _takes_image_ids(evaluator: DatasetEvaluator) -> bool:
    return "img_ids" in inspect.signature(evaluator.evaluate).parameters


def evaluate_under_attack(
    model: nn.Module,
    images: TestImages,
    attack: DetectorAttack | RandomNoise,
    clean: Metrics,
    label: str = "attack",
    watch: Watcher | None = None,
) -> Metrics:
    """AP on images that each were attacked before; ``images.mapper`` must be :func:`annotated_test_mapper`.

    Args:
        clean: of the same images without attack, see :func:`zero_where_nothing_is_found`.
    """
    found = images.evaluate(model, label, perturb=attack, watch=watch)
    return zero_where_nothing_is_found(found, clean)


def evaluate_under_corruption(
    model: nn.Module,
    images: TestImages,
    mapper: Callable[[dict], dict],
    clean: Metrics,
    label: str = "corruption",
    watch: Watcher | None = None,
) -> Metrics:
    """AP on images that ``mapper``, a :class:`rt_detectron.data.corruptions.CorruptionMapper`, corrupts."""
    found = images.evaluate(model, label, mapper=mapper, watch=watch)
    return zero_where_nothing_is_found(found, clean)


def zero_where_nothing_is_found(metrics: Metrics, clean: Metrics) -> Metrics:
    """``metrics`` with 0 for what is undefined or missing there, but defined in ``clean``.

    Whether an AP is defined is a matter of the ground truth, which is the same. Evaluators leave everything
    undefined, though, if there is no detection at all: what the vanishing attack wants is AP 0.
    """
    if not comm.is_main_process():
        return metrics
    tasks = {**clean, **metrics}
    return {task: _filled(metrics.get(task, {}), clean.get(task, {})) for task in tasks}


def _filled(values: dict[str, float], clean: dict[str, float]) -> dict[str, float]:
    def filled(key: str) -> float:
        nothing_found = _is_defined(clean.get(key)) and not _is_defined(values.get(key))
        return 0.0 if nothing_found else values.get(key, math.nan)

    return {key: filled(key) for key in {**clean, **values}}


def _is_defined(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def performance_under_corruption(
    clean: Metrics, results: Sequence[Metrics]
) -> tuple[dict[str, float | None], dict[str, float | None]]:
    """mPC, the mean AP over corruptions and severities, and rPC, that in percent of the clean AP, by task.

    Of Michaelis et al. (2019), https://arxiv.org/abs/1907.07484, equations 1 and 2. None where undefined.
    """
    mean, relative = {}, {}
    for task, metrics in clean.items():
        values = [result.get(task, {}).get("AP") for result in results]
        defined = bool(values) and all(map(_is_defined, values)) and _is_defined(metrics.get("AP"))
        mean[task] = sum(values) / len(values) if defined else None
        relative[task] = 100 * mean[task] / metrics["AP"] if defined and metrics["AP"] > 0 else None
    return mean, relative
