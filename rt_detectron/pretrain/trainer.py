"""Pretraining on Detectron2's engine: its trainers, hooks, checkpointer and writers."""

import logging
import os
import sys
import time

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import LazyConfig, instantiate
from detectron2.engine import AMPTrainer, HookBase, SimpleTrainer, create_ddp_model, default_writers, hooks
from detectron2.evaluation import inference_on_dataset, print_csv_format
from detectron2.utils import comm
from tqdm import tqdm

from rt_detectron.attacks import PGD
from rt_detectron.errors import InputError

from .strategies import Classifier, Pretraining

logger = logging.getLogger(__name__)


def build_model(cfg) -> Pretraining:
    """The model of ``cfg.model`` on ``cfg.train.device``."""
    return instantiate(cfg.model).to(cfg.train.device)


def do_train(cfg, resume: bool = False) -> None:
    """Train as ``cfg`` says, evaluate, and write ``classifier.pth`` to ``cfg.train.output_dir``.

    Args:
        cfg: a LazyConfig with ``model``, ``dataloader``, ``optimizer``, ``lr_multiplier``, ``evaluator``
            and ``train``; configs/pretrain/common/train.py explains the keys of the last.
        resume: go on from the last checkpoint of the output folder, where there is one.
    """
    start = time.perf_counter()
    model = build_model(cfg)
    loader = instantiate(cfg.dataloader.train)
    cfg.optimizer.params.model = model
    optimizer = instantiate(cfg.optimizer)

    # device_ids=None: the model's own device, CPU or this process's GPU.
    wrapped = create_ddp_model(model, device_ids=None, broadcast_buffers=False)
    trainer_class = AMPTrainer if cfg.train.amp else SimpleTrainer
    trainer = trainer_class(wrapped, loader, optimizer)

    epoch = max(len(loader.dataset) // cfg.dataloader.train.total_batch_size, 1)  # in iterations
    max_iter = max(round(cfg.train.epochs * epoch), 1)
    checkpointer = DetectionCheckpointer(model.classifier, cfg.train.output_dir, trainer=trainer)
    is_main = comm.is_main_process()
    trainer.register_hooks(
        [
            hooks.IterationTimer(),
            hooks.LRScheduler(scheduler=instantiate(cfg.lr_multiplier)),
            hooks.PeriodicCheckpointer(
                checkpointer, max(round(cfg.train.checkpoint_epochs * epoch), 1), max_to_keep=2
            )
            if is_main
            else None,
            hooks.EvalHook(max(round(cfg.train.eval_epochs * epoch), 1), lambda: do_eval(cfg, model)),
            hooks.PeriodicWriter(default_writers(cfg.train.output_dir, max_iter), cfg.train.log_period)
            if is_main
            else None,
            ProgressBar() if is_main and sys.stderr.isatty() else None,
        ]
    )
    checkpointer.resume_or_load("", resume=resume)
    start_iter = trainer.iter + 1 if resume and checkpointer.has_checkpoint() else 0
    logger.info(
        "%d epochs of %d iterations on %d images; output in %s",
        cfg.train.epochs, epoch, len(loader.dataset), cfg.train.output_dir,
    )  # fmt: skip
    trainer.train(start_iter, max_iter)
    if is_main:
        path = export_classifier(model, os.path.join(cfg.train.output_dir, "classifier.pth"))
        logger.info("Wrote %s after %.0f s", path, time.perf_counter() - start)


def do_eval(cfg, model: Pretraining) -> dict:
    """Clean and robust accuracy of ``model`` on ``cfg.dataloader.test``, printed and returned."""
    cfg.evaluator.model = model
    results = inference_on_dataset(model, instantiate(cfg.dataloader.test), instantiate(cfg.evaluator))
    if comm.is_main_process():
        print_csv_format(results)
    return results


def classifier_metadata(model: Pretraining) -> dict:
    """What later tools must know of a pretrained classifier; written beside its tensors."""
    threat_model = model.attack.threat_model if isinstance(model.attack, PGD) else None
    classifier: Classifier = model.classifier
    return {
        "arch": classifier.arch,
        "norm": threat_model.norm if threat_model else None,
        "eps": float(threat_model.eps) if threat_model else 0.0,
        "input_format": "RGB",
        "pixel_mean": classifier.pixel_mean,
        "pixel_std": classifier.pixel_std,
        "stride_in_1x1": False,
        "source": "rt_detectron pretraining",
    }


def export_classifier(model: Pretraining, path: str) -> str:
    """Write the network under torchvision's names with its metadata, atomically; returns ``path``."""
    content = {"model": model.classifier.network.state_dict(), "rt_detectron": classifier_metadata(model)}
    temporary = f"{path}.tmp{os.getpid()}"
    torch.save(content, temporary)
    os.replace(temporary, path)
    return path


def load_config(path: str, overrides: list[str]):
    """The LazyConfig at ``path`` with ``key=value`` overrides; an unknown key is an :class:`InputError`."""
    if not os.path.isfile(path):
        raise InputError(f"--config-file {path}: no such file; configs/pretrain/ holds the recipes")
    cfg = LazyConfig.load(path)
    for override in overrides:
        key, equals, _ = override.partition("=")
        if not equals:
            raise InputError(f"{override!r} is not of the form key=value, e.g. train.epochs=10")
        if not _has_key(cfg, key):
            raise InputError(f"unknown configuration key {key!r}; {path} shows the keys")
    return LazyConfig.apply_overrides(cfg, overrides)


def _has_key(cfg, key: str) -> bool:
    for part in key.split("."):
        if not hasattr(cfg, "keys") or part not in cfg:
            return False
        cfg = cfg[part]
    return True


class ProgressBar(HookBase):
    """A bar over the iterations, with the time left."""

    def before_train(self):
        self.bar = tqdm(
            total=self.trainer.max_iter, initial=self.trainer.start_iter, unit="it", desc="training"
        )

    def after_step(self):
        self.bar.update()

    def after_train(self):
        self.bar.close()
