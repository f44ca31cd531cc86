"""Detectron2's DefaultTrainer with safe checkpoints, and its configuration, for tools/train_net.py."""

import ast
import functools
import importlib
import logging
import os
import re
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise

import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.data import (
    DatasetMapper,
    MetadataCatalog,
    build_detection_test_loader,
    build_detection_train_loader,
)
from detectron2.engine import DefaultTrainer, HookBase, TrainerBase
from detectron2.evaluation import (
    DatasetEvaluator,
)
from detectron2.modeling import GeneralizedRCNN, GeneralizedRCNNWithTTA
from detectron2.utils import comm
from fvcore.nn.precise_bn import get_bn_modules
from yaml import YAMLError

from rt_detectron.checkpoint.checkpointer import RobustCheckpointer
from rt_detectron.config import add_robust_config
from rt_detectron.data import (
    CheckedMapper,
    check_datasets,
    load_test_set,
    load_training_set,
    set_num_classes,
)
from rt_detectron.detection.adversarial import ATTACKED, AdversarialTraining, EvaluationUnderAttack
from rt_detectron.detection.frozen_features import cache_features
from rt_detectron.detection.hooks import LOG_PERIOD, PreciseBN, build_average, training_hooks
from rt_detectron.detection.loader import resumable
from rt_detectron.detection.steps import (
    DIVERGED,
    build_optimizer,
    build_trainer,
    check_batch_size,
    check_layers,
    fast,
)
from rt_detectron.engine.checkpointing import Checkpoints, SafeCheckpointing
from rt_detectron.engine.signals import StopSignals
from rt_detectron.evaluation.build import build_evaluator, check_test_sets, inference_folder
from rt_detectron.evaluation.robustness.test_set import DetectionTestSet, annotated_test_mapper
from rt_detectron.layers.frozen_norm import fixed_weights
from rt_detectron.utils.errors import InputError, building, did_you_mean, one_line
from rt_detectron.utils.files import find_config

logger = logging.getLogger(__name__)

ADVICE = "a lower SOLVER.BASE_LR, or with SOLVER.CLIP_GRADIENTS.ENABLED True"


def load_detector_config(path: str, opts: list[str]) -> CfgNode:
    """Detectron2's and our keys, the file at ``path``, then ``opts`` (``KEY VALUE ...``); frozen.

    DATASETS.TRAIN and DATASETS.TEST may be a single name. A NUM_CLASSES of 0 becomes the number of classes
    that the training set has. Where there is no GPU, MODEL.DEVICE becomes "cpu", with a warning.

    Raises:
        InputError: for a missing file, an unknown key, a value of the wrong type, or a NUM_CLASSES of 0
            without a training set.
    """
    path = find_config(path)
    if not os.path.isfile(path):
        raise InputError(f"--config-file {path or '(none)'}: no such file; configs/ holds the shipped ones")
    cfg = _default_keys()
    with _config_errors(path):
        _add_deeplab_keys(cfg, path)
        cfg.merge_from_file(path)
    if len(opts) % 2:
        raise InputError(f"options behind --config-file are KEY VALUE ...: {opts[-1]} has no value")
    opts, known = _names_as_tuples(opts), set(_keys_of(cfg))
    for key, value in zip(opts[::2], opts[1::2], strict=True):
        if key not in known:
            raise InputError(f"there is no key {key}{did_you_mean(key, known)}")
        with _config_errors(f"{key} {value}"):
            cfg.merge_from_list([key, value])
    if cfg.MODEL.DEVICE == "cuda" and not torch.cuda.is_available():
        if comm.is_main_process():
            without = ", SOLVER.AMP.ENABLED False" if cfg.SOLVER.AMP.ENABLED else ""
            logger.warning("No GPU found: running on the CPU (MODEL.DEVICE cpu%s)", without)
        cfg.MODEL.DEVICE = "cpu"
        cfg.SOLVER.AMP.ENABLED = False  # Detectron2's AMP is for GPUs only
    _check_values(cfg)
    set_num_classes(cfg)
    _count_iterations(cfg)
    cfg.freeze()
    return cfg


@contextmanager
def _config_errors(source: str) -> Iterator[None]:
    """Errors of yacs in one line: KeyError for an unknown key, ValueError or AssertionError for a value,
    AttributeError or TypeError for a file that is no mapping, OSError for a missing _BASE_."""
    try:
        yield
    except (KeyError, ValueError, AssertionError, OSError, YAMLError, AttributeError, TypeError) as error:
        raise InputError(f"{source}: {one_line(error)[:300]}") from None


def _keys_of(cfg: CfgNode, before: str = "") -> Iterator[str]:
    """All keys below, as in ``SOLVER.BASE_LR``."""
    for name, value in cfg.items():
        yield before + name
        if isinstance(value, CfgNode):
            yield from _keys_of(value, f"{before}{name}.")


def _add_deeplab_keys(cfg: CfgNode, path: str) -> None:
    """The keys of Detectron2's projects/DeepLab, if the file at ``path`` asks for one of its heads.

    Raises:
        InputError: if this install of Detectron2 is without its projects.
    """
    content = CfgNode.load_yaml_with_base(path) or {}
    head = ((content.get("MODEL") or {}).get("SEM_SEG_HEAD") or {}).get("NAME", "")
    if not str(head).startswith("DeepLab"):
        return
    try:
        deeplab = importlib.import_module("detectron2.projects.deeplab")
    except ImportError:
        raise InputError(
            f"{path}: {head} is in detectron2.projects.deeplab, which this install of Detectron2 lacks: "
            "install it from its repository"
        ) from None
    deeplab.add_deeplab_config(cfg)


def _default_keys() -> CfgNode:
    cfg = get_cfg()
    add_robust_config(cfg)
    return cfg


def _keys_of_none(cfg: CfgNode, defaults: CfgNode, parent: str = "") -> Iterator[str]:
    """The keys that are None in ``cfg`` but not by default."""
    for key, value in defaults.items():
        if isinstance(value, CfgNode):
            yield from _keys_of_none(cfg[key], value, f"{parent}{key}.")
        elif value is not None and cfg[key] is None:
            yield f"{parent}{key}"


def _check_values(cfg: CfgNode) -> None:
    """What Detectron2 would refuse late or without a name.

    yacs takes None for any key, whatever its type.
    """
    empty = sorted(_keys_of_none(cfg, _default_keys()))
    if empty:
        raise InputError(f"{empty[0]} is None; give it a value")
    for key in ("TRAIN", "TEST"):
        names = cfg.DATASETS[key]
        if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
            raise InputError(f"DATASETS.{key} is {names!r}; it must be names of data sets, such as ('coco',)")
    sizes = {
        "MIN_SIZE_TRAIN": 1,
        "MAX_SIZE_TRAIN": 1,
        "MIN_SIZE_TEST": 0,
        "MAX_SIZE_TEST": 1,
    }  # 0: not resized
    for key, least in sizes.items():
        values = cfg.INPUT[key] if isinstance(cfg.INPUT[key], list | tuple) else [cfg.INPUT[key]]
        if not values or not all(isinstance(value, int) and value >= least for value in values):
            raise InputError(f"INPUT.{key} is {cfg.INPUT[key]!r}; it must be in pixels, >= {least}")
    rpn = [f"MODEL.RPN.{when}_NMS_TOPK_{mode}" for when in ("PRE", "POST") for mode in ("TRAIN", "TEST")]
    counts = dict.fromkeys(("SOLVER.MAX_TO_KEEP", "DATALOADER.NUM_WORKERS", "TEST.COCO_MAX_DETS"), 0)
    for key, number in {**counts, **dict.fromkeys([*rpn, "SOLVER.MAX_ITER"], 1)}.items():
        if (value := functools.reduce(getattr, key.split("."), cfg)) < number:
            raise InputError(f"{key} is {value}; it must be >= {number}")
    if cfg.SOLVER.LR_SCHEDULER_NAME == "WarmupMultiStepLR":
        steps, end = cfg.SOLVER.STEPS, cfg.SOLVER.MAX_ITER
        rising = all(isinstance(step, int) for step in steps) and all(a < b for a, b in pairwise((0, *steps)))
        if not rising or end in steps:  # later ones are dropped, with a warning
            raise InputError(
                f"SOLVER.STEPS is {steps}; it must be rising, between 0 and SOLVER.MAX_ITER {end}"
            )
    for group in ("ATTACK", "CORRUPTION"):
        for key, value in cfg.TEST[group].items():
            values = value if isinstance(value, list | tuple) else ()
            if not all(isinstance(each, str | int | float) for each in values):
                raise InputError(f"TEST.{group}.{key} is {value!r}; it must be numbers or names, one by one")
    if cfg.TEST.DETECTIONS_PER_IMAGE == 0:
        raise InputError("TEST.DETECTIONS_PER_IMAGE is 0, with which AP is 0; it must be > 0, or -1 for all")
    if cfg.INPUT.MASK_FORMAT not in ("polygon", "bitmask"):
        raise InputError(f"INPUT.MASK_FORMAT is {cfg.INPUT.MASK_FORMAT!r}; it must be polygon or bitmask")


def _count_iterations(cfg: CfgNode) -> None:
    """Have a schedule that counts batches (SOLVER.ADVERSARIAL.COUNT_BATCHES) count iterations."""
    factor = AdversarialTraining.from_keys(cfg.SOLVER.ADVERSARIAL).iterations
    if not cfg.SOLVER.ADVERSARIAL.COUNT_BATCHES:
        return
    for key in ("MAX_ITER", "WARMUP_ITERS", "CHECKPOINT_PERIOD"):
        cfg.SOLVER[key] *= factor
    cfg.SOLVER.STEPS = tuple(factor * step for step in cfg.SOLVER.STEPS)
    cfg.TEST.EVAL_PERIOD *= factor
    cfg.SOLVER.ADVERSARIAL.COUNT_BATCHES = False
    logger.info(
        "%d batches of %d replays: SOLVER.MAX_ITER %d, STEPS %s, WARMUP_ITERS %d",
        cfg.SOLVER.MAX_ITER // factor, factor, cfg.SOLVER.MAX_ITER, cfg.SOLVER.STEPS, cfg.SOLVER.WARMUP_ITERS,
    )  # fmt: skip


def _names_as_tuples(opts: list[str]) -> list[str]:
    """``opts`` with a bare name of a dataset, such as coco_2017_val, as the tuple that Detectron2 takes."""
    opts = list(opts)
    for number, key in enumerate(opts[:-1:2]):
        if key in ("DATASETS.TRAIN", "DATASETS.TEST"):
            try:
                ast.literal_eval(opts[2 * number + 1])
            except (ValueError, SyntaxError):  # not a tuple, nor anything else of Python
                opts[2 * number + 1] = repr((opts[2 * number + 1],))
    return opts


class Trainer(DefaultTrainer):
    """Detectron2's DefaultTrainer with the keys of :mod:`rt_detectron.config`.

    - Weights are checked against the config when they are loaded; checkpoints are written atomically.
    - A training that diverges ends with a one-line error, and its diverged weights are not saved.
    - SIGTERM and Ctrl-C save a checkpoint before they end it.

    Raises:
        InputError: for datasets, weights and options that do not fit.
    """

    def __init__(self, cfg: CfgNode):
        # As DefaultTrainer.__init__, with some parts replaced.
        TrainerBase.__init__(self)
        check_datasets([*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST])
        reference = cfg.SOLVER.REFERENCE_WORLD_SIZE
        check_batch_size(cfg.SOLVER.IMS_PER_BATCH, "SOLVER.IMS_PER_BATCH", reference or comm.get_world_size())
        cfg = DefaultTrainer.auto_scale_workers(cfg, comm.get_world_size())
        data_loader = self.build_train_loader(cfg)  # first, since here lie most mistakes
        check_test_sets(cfg)
        model = self.build_model(cfg)
        if cfg.TEST.AUG.ENABLED:
            _check_tta(cfg, model)
        cache_features(model, cfg, data_loader)
        optimizer = self.build_optimizer(cfg, model)
        self.average = build_average(model, cfg.SOLVER.EMA)
        self.evaluated = self.average.averaged.module if self.average else model
        adversarial = AdversarialTraining.from_keys(cfg.SOLVER.ADVERSARIAL)
        self.under_attack = _under_attack(cfg, adversarial)
        data_loader = adversarial.batches(data_loader, model, cfg.SOLVER.MAX_ITER, cfg.SOLVER.AMP.ENABLED)
        self._trainer = build_trainer(
            model, data_loader, optimizer, cfg.SOLVER.AMP.ENABLED, LOG_PERIOD, broadcast_buffers=False
        )
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        self.checkpointer = RobustCheckpointer(
            self.evaluated, cfg.OUTPUT_DIR, input_format=cfg.INPUT.FORMAT, trainer=weakref.proxy(self)
        )
        self.signals = StopSignals()
        checkpoints = Checkpoints(
            self.checkpointer,
            [cfg.SOLVER.CHECKPOINT_PERIOD],
            cfg.SOLVER.MAX_TO_KEEP or None,
            eval_period=cfg.TEST.EVAL_PERIOD,
            state_of_process=self._trainer.state_of_process,
        )
        self.checkpointing = SafeCheckpointing(checkpoints, self.signals, DIVERGED, ADVICE)
        self.start_iter = 0
        self.max_iter = cfg.SOLVER.MAX_ITER
        self.cfg = cfg
        self._last_eval_results: dict = {}
        self.register_hooks(self.build_hooks())

    def build_hooks(self) -> list[HookBase | None]:
        cfg = self.cfg
        precise_bn = None
        if cfg.TEST.PRECISE_BN.ENABLED and get_bn_modules(self.evaluated):
            loader = self.build_train_loader(cfg)
            precise_bn = PreciseBN(cfg.TEST.EVAL_PERIOD, self.evaluated, loader, cfg.TEST.PRECISE_BN.NUM_ITER)
        return training_hooks(
            checkpointing=self.checkpointing,
            model=self._trainer.detector,
            evaluated=self.evaluated,
            evaluate=self._evaluate,
            eval_period=cfg.TEST.EVAL_PERIOD,
            best_metric=best_metric(cfg),
            average=self.average,
            precise_bn=precise_bn,
            build_writers=self.build_writers,
        )

    def _evaluate(self) -> dict:
        self._last_eval_results = self.test(self.cfg, self.evaluated)
        for name, attacked in self.under_attack.items():
            results = self._last_eval_results
            results = results if len(self.cfg.DATASETS.TEST) == 1 else results.setdefault(name, {})
            results.update(attacked(self.evaluated, dict(results)))
        if self.cfg.TEST.AUG.ENABLED and self.iter >= self.max_iter:
            self._last_eval_results.update(self.test_with_tta(self.cfg, self.evaluated))
        return self._last_eval_results

    def resume_or_load(self, resume: bool = True) -> None:
        """As Detectron2's; all processes go on from the checkpoint that the first one chooses."""
        rest = self.checkpointer.resume_or_load(self.cfg.MODEL.WEIGHTS, resume=resume)
        if self.checkpointer.resumed:
            self.start_iter = self.iter + 1
            self._trainer.load_state_of_process(rest.get("processes", []))

    def train(self):
        with self.checkpointing.running():
            return super().train()

    def has_diverged(self, wait: bool = False) -> bool:
        return self._trainer.has_diverged(wait)

    @classmethod
    def build_model(cls, cfg: CfgNode) -> torch.nn.Module:
        with building("the detector", "MODEL"):
            model = super().build_model(cfg)
            check_layers(model)
            return fast(model)

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: torch.nn.Module) -> torch.optim.Optimizer:
        with building("the optimiser", "SOLVER"):
            return build_optimizer(cfg, model)

    @classmethod
    def build_lr_scheduler(cls, cfg: CfgNode, optimizer: torch.optim.Optimizer):
        with building("the schedule of the learning rate", "SOLVER"):
            return super().build_lr_scheduler(cfg, optimizer)

    @classmethod
    def build_train_loader(cls, cfg: CfgNode):
        with building("the loader of the training images", "INPUT, DATASETS and DATALOADER"):
            mapper = CheckedMapper(DatasetMapper(cfg, is_train=True), cfg.INPUT.ON_CORRUPT)
            loader = build_detection_train_loader(cfg, mapper=mapper, dataset=load_training_set(cfg))
        return resumable(loader)

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str):
        with building("the loader of the test images", "INPUT, DATASETS and DATALOADER"):
            mapper = CheckedMapper(DatasetMapper(cfg, is_train=False), skipping="")
            return build_detection_test_loader(cfg, dataset_name, mapper=mapper)

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str, folder: str | None = None) -> DatasetEvaluator:
        return build_evaluator(cfg, dataset_name, folder)

    @classmethod
    def test(cls, cfg: CfgNode, model: torch.nn.Module, evaluators=None) -> dict:
        with fixed_weights(model):
            return super().test(cfg, model, evaluators)

    @classmethod
    def test_with_tta(cls, cfg: CfgNode, model: torch.nn.Module) -> dict:
        """:meth:`test` under the augmentations of TEST.AUG; "bbox" becomes "bbox_TTA", as in Detectron2.

        Raises:
            InputError: for a detector without test-time augmentation in Detectron2.
        """
        _check_tta(cfg, model)
        logger.info("Evaluating under test-time augmentation")
        evaluators = [
            cls.build_evaluator(cfg, name, inference_folder(cfg, name) + "_TTA") for name in cfg.DATASETS.TEST
        ]
        results = cls.test(cfg, GeneralizedRCNNWithTTA(cfg, model), evaluators)
        return {f"{name}_TTA": metrics for name, metrics in results.items()}


def best_metric(cfg: CfgNode) -> str:
    """TEST.BEST_METRIC as it is called in the results: of several test sets, the first one's counts.

    Raises:
        InputError: for a metric that COCO's evaluation of that set does not have.
    """
    metric = cfg.TEST.BEST_METRIC
    if not (metric and cfg.TEST.EVAL_PERIOD and cfg.DATASETS.TEST):
        return metric
    named = [name for name in cfg.DATASETS.TEST if metric.startswith(f"{name}/")]
    name = named[0] if named else cfg.DATASETS.TEST[0]
    metric = metric.removeprefix(f"{name}/")
    tasks = {"bbox": True, "segm": cfg.MODEL.MASK_ON, "keypoints": cfg.MODEL.KEYPOINT_ON}
    if cfg.SOLVER.ADVERSARIAL.EVAL_IMAGES:
        tasks |= {f"{task}{ATTACKED}": is_on for task, is_on in tasks.items()}
    if MetadataCatalog.get(name).get("evaluator_type") == "coco" and (
        not tasks.get(metric.partition("/")[0]) or not re.fullmatch(r"\w+/AP(50|75|s|m|l|-.+)?", metric)
    ):
        known = ", ".join(f"{task}/AP" for task, is_on in tasks.items() if is_on)
        raise InputError(f"TEST.BEST_METRIC: {name} has no {metric}; it has {known}, and AP50, AP75, ...")
    if len(cfg.DATASETS.TEST) == 1:
        return metric
    if not named:
        logger.info("TEST.BEST_METRIC: %s of the first test set, %s", metric, name)
    return f"{name}/{metric}"


def _under_attack(cfg: CfgNode, settings: AdversarialTraining) -> dict[str, EvaluationUnderAttack]:
    """By test set, if SOLVER.ADVERSARIAL.EVAL_IMAGES asks for it."""
    if not settings.eval_images:
        return {}
    found = {}
    for name in cfg.DATASETS.TEST:
        images = DetectionTestSet(
            load_test_set(cfg, name, with_objects=True),
            build_evaluator(cfg, name, inference_folder(cfg, name) + ATTACKED),
            annotated_test_mapper(cfg),
            num_workers=cfg.DATALOADER.NUM_WORKERS,
        )
        found[name] = EvaluationUnderAttack(images, settings)
    return found


def _check_tta(cfg: CfgNode, model: torch.nn.Module) -> None:
    if not isinstance(model, GeneralizedRCNN) or cfg.MODEL.KEYPOINT_ON or cfg.MODEL.LOAD_PROPOSALS:
        raise InputError(
            "test-time augmentation is for R-CNN boxes and masks: set TEST.AUG.ENABLED False for "
            f"{cfg.MODEL.META_ARCHITECTURE}{' with keypoints' if cfg.MODEL.KEYPOINT_ON else ''}"
        )
