"""The evaluator that fits a dataset."""

import os

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.evaluation import (
    CityscapesInstanceEvaluator,
    COCOPanopticEvaluator,
    DatasetEvaluator,
    DatasetEvaluators,
    PascalVOCDetectionEvaluator,
    SemSegEvaluator,
)

from rt_detectron.evaluation.coco import COCOEvaluator
from rt_detectron.evaluation.lvis import LVISEvaluator
from rt_detectron.utils.errors import InputError

# By the metadata's evaluator_type: functions from (dataset name, output folder) to an evaluator.
_EVALUATORS = {
    "coco": [lambda name, folder: COCOEvaluator(name, output_dir=folder)],
    "coco_panoptic_seg": [
        lambda name, folder: COCOEvaluator(name, output_dir=folder),
        lambda name, folder: SemSegEvaluator(name, output_dir=folder),
        lambda name, folder: COCOPanopticEvaluator(name, folder),
    ],
    "lvis": [lambda name, folder: LVISEvaluator(name, output_dir=folder)],
    "pascal_voc": [lambda name, folder: PascalVOCDetectionEvaluator(name)],
    "cityscapes_instance": [lambda name, folder: CityscapesInstanceEvaluator(name)],
    "sem_seg": [lambda name, folder: SemSegEvaluator(name, output_dir=folder)],
}


def inference_folder(cfg: CfgNode, dataset_name: str) -> str:
    """The folder for a test set's predictions: OUTPUT_DIR/inference, or below it for several sets."""
    folder = os.path.join(cfg.OUTPUT_DIR, "inference")
    return folder if len(cfg.DATASETS.TEST) == 1 else os.path.join(folder, dataset_name)


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
    evaluators = [build(dataset_name, folder) for build in _EVALUATORS[evaluator_type]]
    return evaluators[0] if len(evaluators) == 1 else DatasetEvaluators(evaluators)
