"""The evaluator that fits a dataset."""

import logging
import os
from collections.abc import Callable, Sequence

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.evaluation import (
    CityscapesInstanceEvaluator,
    DatasetEvaluator,
    DatasetEvaluators,
    PascalVOCDetectionEvaluator,
)
from detectron2.utils.logger import log_first_n

from rt_detectron.data import folder_name, load_test_set
from rt_detectron.evaluation.coco import COCOEvaluator
from rt_detectron.evaluation.lvis import LVISEvaluator
from rt_detectron.evaluation.panoptic import COCOPanopticEvaluator
from rt_detectron.evaluation.sem_seg import SemSegEvaluator
from rt_detectron.utils.errors import InputError

logger = logging.getLogger(__name__)

_COCO_MAX_DETS = 100


def _coco(cfg: CfgNode, name: str, folder: str) -> COCOEvaluator:
    limit = cfg.TEST.COCO_MAX_DETS or max(_COCO_MAX_DETS, cfg.TEST.DETECTIONS_PER_IMAGE)
    if limit != _COCO_MAX_DETS:
        log_first_n(
            logging.WARNING,
            f"AP counts up to {limit} detections of a category in an image, not {_COCO_MAX_DETS} as COCO's: "
            f"for that set TEST.COCO_MAX_DETS {_COCO_MAX_DETS}",
            name=__name__,
            key="message",
        )
    return COCOEvaluator(
        name,
        output_dir=folder,
        max_dets_per_image=limit,
        kpt_oks_sigmas=cfg.TEST.KEYPOINT_OKS_SIGMAS,
    )


def _sem_seg(cfg: CfgNode, name: str, folder: str) -> SemSegEvaluator:
    return SemSegEvaluator(name, output_dir=folder)


# By the metadata's evaluator_type: functions from (config, dataset name, output folder) to an evaluator.
_EVALUATORS: dict[str, list[Callable[[CfgNode, str, str], DatasetEvaluator]]] = {
    "coco": [_coco],
    "coco_panoptic_seg": [_coco, _sem_seg, lambda cfg, name, folder: COCOPanopticEvaluator(name, folder)],
    "lvis": [lambda cfg, name, folder: LVISEvaluator(name, output_dir=folder)],
    "pascal_voc": [lambda cfg, name, folder: PascalVOCDetectionEvaluator(name)],
    "cityscapes_instance": [lambda cfg, name, folder: CityscapesInstanceEvaluator(name)],
    "sem_seg": [_sem_seg],
}


def inference_folder(cfg: CfgNode, dataset_name: str) -> str:
    """The folder for a test set's predictions: OUTPUT_DIR/inference, or below it for several sets."""
    folder = os.path.join(cfg.OUTPUT_DIR, "inference")
    return folder if len(cfg.DATASETS.TEST) == 1 else os.path.join(folder, folder_name(dataset_name))


def check_test_sets(cfg: CfgNode) -> None:
    """Check that each of ``cfg.DATASETS.TEST`` can be evaluated, by all that needs no detector.

    Raises:
        InputError: as :func:`rt_detectron.data.load_test_set` and :func:`build_evaluator`, and for
            annotations that the evaluators could not score.
    """
    for name in cfg.DATASETS.TEST:
        records = load_test_set(cfg, name)
        if isinstance(records, list):  # not a torch Dataset of the user's
            _warn_of_counts(cfg, name, records)
        evaluator = build_evaluator(cfg, name)
        for each in parts_of(evaluator):
            if isinstance(each, COCOEvaluator | LVISEvaluator):
                each.check_shapes(masks=cfg.MODEL.MASK_ON, keypoints=cfg.MODEL.KEYPOINT_ON)


def _warn_of_counts(cfg: CfgNode, name: str, records: list[dict]) -> None:
    counts = [len(record["annotations"]) for record in records if "annotations" in record]
    if not counts:  # a set for semantic segmentation
        return
    most = max(counts)
    if not most:
        logger.warning("%s has no annotated object: its AP is undefined", name)
    if most > cfg.TEST.DETECTIONS_PER_IMAGE:
        logger.warning(
            "%s has an image with %d objects, but TEST.DETECTIONS_PER_IMAGE is %d: no more are found",
            name, most, cfg.TEST.DETECTIONS_PER_IMAGE,
        )  # fmt: skip


def build_evaluator(cfg: CfgNode, dataset_name: str, folder: str | None = None) -> DatasetEvaluator:
    """The evaluator for the dataset's ``evaluator_type``. It writes to ``folder``, or OUTPUT_DIR/inference.

    Raises:
        InputError: for a dataset of another type.
    """
    evaluator_type = MetadataCatalog.get(dataset_name).get("evaluator_type")
    if evaluator_type not in _EVALUATORS:
        raise InputError(
            f"dataset {dataset_name} has evaluator_type {evaluator_type!r}; "
            f"known are {', '.join(_EVALUATORS)}"
        )
    folder = folder or inference_folder(cfg, dataset_name)
    evaluators = [build(cfg, dataset_name, folder) for build in _EVALUATORS[evaluator_type]]
    return evaluators[0] if len(evaluators) == 1 else SeveralEvaluators(evaluators)


class SeveralEvaluators(DatasetEvaluators):
    """Detectron2's DatasetEvaluators, of such that can all score some images only."""

    def evaluate(self, img_ids: Sequence | None = None) -> dict | None:
        found = [evaluator.evaluate(img_ids=img_ids) for evaluator in self._evaluators]
        return {task: metrics for each in found if each for task, metrics in each.items()}


def parts_of(evaluator: DatasetEvaluator) -> list[DatasetEvaluator]:
    """The evaluators of the tasks of a test set."""
    return getattr(evaluator, "_evaluators", [evaluator])
