"""What tools/train_net.py wires: Detectron2's DefaultTrainer, and its configuration read with care."""

import logging
import os
import weakref

import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.data import MetadataCatalog, build_detection_train_loader
from detectron2.engine import AMPTrainer, DefaultTrainer, SimpleTrainer, TrainerBase, create_ddp_model
from detectron2.evaluation import (
    CityscapesInstanceEvaluator,
    COCOPanopticEvaluator,
    DatasetEvaluator,
    DatasetEvaluators,
    PascalVOCDetectionEvaluator,
    SemSegEvaluator,
)
from detectron2.utils import comm
from yaml import YAMLError

from rt_detectron.checkpoint.detection_checkpointer import RobustCheckpointer
from rt_detectron.config import add_robust_config
from rt_detectron.data import check_datasets, load_training_set
from rt_detectron.errors import InputError, one_line
from rt_detectron.evaluation import COCOEvaluator, LVISEvaluator

logger = logging.getLogger(__name__)

# By the metadata's evaluator_type: how each evaluator is made from (dataset name, output folder).
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


def load_config(path: str, opts: list[str]) -> CfgNode:
    """Detectron2's and our keys, the file at ``path``, then ``opts`` (``KEY VALUE ...``); frozen.

    Where there is no GPU, MODEL.DEVICE becomes "cpu", with a warning.

    Raises:
        InputError: for a missing file, an unknown key or a value of the wrong type.
    """
    if not os.path.isfile(path):
        raise InputError(f"--config-file {path or '(none)'}: no such file; configs/ holds the shipped ones")
    cfg = get_cfg()
    add_robust_config(cfg)
    try:
        cfg.merge_from_file(path)
        cfg.merge_from_list(opts)
    except (KeyError, ValueError, AssertionError, OSError, YAMLError, AttributeError, TypeError) as error:
        # yacs: KeyError for an unknown key, ValueError for a type, AssertionError for an odd list,
        # AttributeError or TypeError for a file that is no mapping. OSError: a missing _BASE_.
        raise InputError(f"configuration ({' '.join([path, *opts])}): {one_line(error)}") from None
    if cfg.MODEL.DEVICE == "cuda" and not torch.cuda.is_available():
        if comm.is_main_process():
            logger.warning("No GPU found: running on the CPU (MODEL.DEVICE cpu)")
        cfg.MODEL.DEVICE = "cpu"
        cfg.SOLVER.AMP.ENABLED = False  # Detectron2's AMP is for GPUs only
    cfg.freeze()
    return cfg


class Trainer(DefaultTrainer):
    """Detectron2's DefaultTrainer whose weights are checked against the config as they are loaded."""

    def __init__(self, cfg: CfgNode):
        # DefaultTrainer.__init__ with two differences: the checkpointer's class, and processes on CPUs,
        # for which DistributedDataParallel wants no device ids.
        TrainerBase.__init__(self)
        check_datasets([*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST])
        cfg = DefaultTrainer.auto_scale_workers(cfg, comm.get_world_size())
        model = self.build_model(cfg)
        optimizer = self.build_optimizer(cfg, model)
        data_loader = self.build_train_loader(cfg)
        ddp = {"device_ids": None} if cfg.MODEL.DEVICE == "cpu" else {}
        model = create_ddp_model(model, broadcast_buffers=False, **ddp)
        trainer = AMPTrainer if cfg.SOLVER.AMP.ENABLED else SimpleTrainer
        self._trainer = trainer(model, data_loader, optimizer)
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        self.checkpointer = RobustCheckpointer(model, cfg.OUTPUT_DIR, trainer=weakref.proxy(self))
        self.start_iter = 0
        self.max_iter = cfg.SOLVER.MAX_ITER
        self.cfg = cfg
        self.register_hooks(self.build_hooks())

    @classmethod
    def build_train_loader(cls, cfg: CfgNode):
        return build_detection_train_loader(cfg, dataset=load_training_set(cfg))

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> DatasetEvaluator:
        """What the dataset's ``evaluator_type`` asks for; files go to OUTPUT_DIR/inference."""
        kind = MetadataCatalog.get(dataset_name).get("evaluator_type")
        if kind not in _EVALUATORS:
            raise InputError(
                f"dataset {dataset_name} has evaluator_type {kind!r}; known are {', '.join(_EVALUATORS)}"
            )
        folder = inference_folder(cfg, dataset_name)
        evaluators = [build(dataset_name, folder) for build in _EVALUATORS[kind]]
        return evaluators[0] if len(evaluators) == 1 else DatasetEvaluators(evaluators)


def inference_folder(cfg: CfgNode, dataset_name: str) -> str:
    """Where a test set's predictions go: OUTPUT_DIR/inference, one folder each if there are several sets."""
    folder = os.path.join(cfg.OUTPUT_DIR, "inference")
    return folder if len(cfg.DATASETS.TEST) == 1 else os.path.join(folder, dataset_name)
