"""A detector's training from a LazyConfig, for tools/lazyconfig_train_net.py."""

import logging
import os

from detectron2.engine import default_writers
from detectron2.evaluation import inference_on_dataset, print_csv_format
from detectron2.utils import comm
from omegaconf import OmegaConf
from torch import nn

from rt_detectron.checkpoint.checkpointer import RobustCheckpointer
from rt_detectron.checkpoint.metadata import Metadata
from rt_detectron.checkpoint.preprocessing import check_preprocessing
from rt_detectron.data import check_datasets
from rt_detectron.detection.adversarial import AdversarialTraining, EvaluationUnderAttack
from rt_detectron.detection.hooks import build_average, training_hooks
from rt_detectron.detection.lazy_data import (
    attackable_test_set,
    build_lazy_loader,
    check_lazy_test_set,
    dataset_names,
    set_num_classes,
)
from rt_detectron.detection.loader import resumable
from rt_detectron.detection.steps import DIVERGED, build_trainer, check_batch_size, check_layers, fast
from rt_detectron.engine.checkpointing import Checkpoints, SafeCheckpointing
from rt_detectron.engine.lazy_config import build, lazy_config_sha256, read_lazy_config, save_lazy_config
from rt_detectron.engine.loop import build_optimizer
from rt_detectron.engine.signals import StopSignals
from rt_detectron.evaluation.results import describe_dataset
from rt_detectron.layers.frozen_norm import fixed_weights
from rt_detectron.utils.errors import InputError
from rt_detectron.utils.files import write_json
from rt_detectron.utils.numbers import finite
from rt_detectron.utils.versions import versions

logger = logging.getLogger(__name__)

KEYS = ("model", "dataloader", "optimizer", "lr_multiplier", "train")
ADVICE = "a lower optimizer.lr"


def load_lazy_config(path: str, overrides: list[str]):
    """The LazyConfig at ``path`` with ``key=value`` overrides; checks that its datasets are there.

    Detectron2's own configs work as well: keys of configs/lazy/common/train.py that they lack are off.
    A num_classes of 0 becomes the number of classes that the training set has. Where there is no GPU,
    train.device becomes "cpu", with a warning.

    Raises:
        InputError: as :func:`read_lazy_config`, for missing datasets, and for a colour order that differs
            between loader and model.
    """
    cfg = read_lazy_config(path, overrides, KEYS, "configs/lazy/")
    if "max_iter" not in cfg.train:
        raise InputError(f"--config-file {path}: train has no max_iter; tools/pretrain.py takes recipes")
    _check_counts(cfg.train)
    check_datasets([*dataset_names(cfg, "train"), *dataset_names(cfg, "test")])
    set_num_classes(cfg)
    _count_iterations(cfg)
    loaded = image_format(cfg)
    expected = OmegaConf.select(cfg, "model.input_format")
    if None not in (loaded, expected) and loaded != expected:
        raise InputError(
            f"dataloader.train.mapper.image_format is {loaded}, but model.input_format is {expected}; "
            "set both to what the weights were trained on"
        )
    return cfg


def _check_counts(train) -> None:
    """Numbers of iterations and checkpoints, with which a training would do nothing or lose something."""
    least = {"max_iter": 1, "eval_period": 0, "log_period": 1, "checkpointer.max_to_keep": 0}
    for key, number in least.items():
        value = OmegaConf.select(train, key)
        if value is not None and (not isinstance(value, int) or value < number):
            raise InputError(f"train.{key} is {value!r}; it must be a whole number >= {number}")


def _adversarial(cfg) -> AdversarialTraining:
    return AdversarialTraining.from_keys(dict(cfg.train.get("adversarial", {})))


def _count_iterations(cfg) -> None:
    """Have a schedule that counts batches (train.adversarial.count_batches) count iterations.

    lr_multiplier is in shares of the training.
    """
    train, factor = cfg.train, _adversarial(cfg).iterations
    if "adversarial" in train and train.adversarial.get("count_batches"):
        train.max_iter *= factor
        train.eval_period *= factor
        train.checkpointer.period *= factor
        train.adversarial.count_batches = False


def build_lazy_model(cfg) -> nn.Module:
    """The model of ``cfg.model`` on ``cfg.train.device``.

    Raises:
        InputError: if the weights of the backbone need another preprocessing than the model has.
    """
    model = build(cfg.model, "model").to(cfg.train.device)
    check_layers(model, "model")
    model = fast(model)
    metadata = _backbone_metadata(model)
    if metadata is not None:
        check_preprocessing(model, metadata, image_format(cfg))
    return model


def image_format(cfg) -> str | None:
    """The colour order that the loader gives, if it says."""
    return OmegaConf.select(cfg, "dataloader.train.mapper.image_format")


def _backbone_metadata(model: nn.Module) -> Metadata | None:
    """That of the weights that :func:`rt_detectron.load_backbone` loaded."""
    return getattr(getattr(model, "backbone", None), "metadata", None)


def do_test(cfg, model: nn.Module) -> dict:
    """The metrics of ``cfg.dataloader.evaluator`` on ``cfg.dataloader.test``, printed and returned."""
    if "evaluator" not in cfg.dataloader:
        return {}
    loader = build_lazy_loader(cfg, "test")
    evaluator = build(cfg.dataloader.evaluator, "dataloader.evaluator")
    with fixed_weights(model):
        results = inference_on_dataset(model, loader, evaluator)
    if comm.is_main_process():
        print_csv_format(results)
    return results


def do_train(cfg, resume: bool = False) -> dict:
    """Train as ``cfg`` says, with the checks of :class:`.Trainer`, and return the last metrics.

    Raises:
        InputError: for weights that do not fit, and if the training diverges.
    """
    key = "dataloader.train.total_batch_size"
    if (images := OmegaConf.select(cfg, key)) is not None:
        check_batch_size(images, key, comm.get_world_size())
    loader = resumable(build_lazy_loader(cfg, "train"))  # first, since here lie most mistakes
    check_lazy_test_set(cfg)
    model = build_lazy_model(cfg)
    optimizer = build_optimizer(cfg, model)
    train = cfg.train
    average = build_average(model, train.get("ema", 0.0))
    evaluated = average.averaged.module if average else model
    adversarial = _adversarial(cfg)
    loader = adversarial.batches(loader, model, train.max_iter, train.amp.enabled)
    under_attack = None
    if adversarial.eval_images and "evaluator" in cfg.dataloader:
        under_attack = EvaluationUnderAttack(attackable_test_set(cfg), adversarial)
    trainer = build_trainer(model, loader, optimizer, train.amp.enabled, train.log_period, **train.ddp)
    checkpointer = RobustCheckpointer(
        evaluated, train.output_dir, input_format=image_format(cfg), trainer=trainer
    )
    checkpointer.metadata = _backbone_metadata(model)
    checkpoints = Checkpoints(
        checkpointer,
        [train.checkpointer.period],
        train.checkpointer.max_to_keep or None,
        train.eval_period,
        trainer.state_of_process,
    )
    checkpointing = SafeCheckpointing(checkpoints, StopSignals(), DIVERGED, ADVICE)
    results = {}

    def evaluate() -> dict:
        clean = do_test(cfg, evaluated) or {}
        attacked = under_attack(evaluated, clean) if under_attack else {}
        results.update({**clean, **attacked})
        return results

    trainer.register_hooks(
        training_hooks(
            checkpointing=checkpointing,
            model=trainer.detector,
            evaluated=evaluated,
            evaluate=evaluate,
            eval_period=train.eval_period,
            best_metric=train.get("best_metric", ""),
            scheduler=build(cfg.lr_multiplier, "lr_multiplier"),
            average=average,
            build_writers=lambda: default_writers(train.output_dir, train.max_iter),
            log_period=train.log_period,
        )
    )
    rest = checkpointer.resume_or_load(train.init_checkpoint, resume=resume)
    if checkpointer.resumed:
        trainer.load_state_of_process(rest.get("processes", []))
    save_lazy_config(cfg, train.output_dir)
    with checkpointing.running():
        trainer.train(trainer.iter + 1 if checkpointer.resumed else 0, train.max_iter)
    return results


def write_lazy_results(cfg, results: dict, wall_time_s: float, iterations: int) -> str:
    """What :func:`rt_detectron.evaluation.results.write_results` writes, to train.output_dir."""
    path = os.path.join(cfg.train.output_dir, "results.json")
    folder = OmegaConf.select(cfg, "dataloader.evaluator.output_dir") or ""
    content = {
        "metrics": finite(results),
        "iterations": iterations,
        "seed": cfg.train.get("seed", -1),
        "wall_time_s": round(wall_time_s, 1),
        "config_sha256": lazy_config_sha256(cfg),
        "weights": cfg.train.init_checkpoint or OmegaConf.select(cfg, "model.backbone.name") or "",
        "versions": versions(),
        "datasets": [describe_dataset(name, folder) for name in dataset_names(cfg, "test")],
    }
    write_json(path, content)
    return path
