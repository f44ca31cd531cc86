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
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from tqdm import tqdm
from yaml import YAMLError

from rt_detectron.checkpoint.formats import read_classifier
from rt_detectron.errors import InputError, one_line
from rt_detectron.files import replaced_atomically
from rt_detectron.modeling.classifier import Classifier

from .strategies import Pretraining

logger = logging.getLogger(__name__)

KEYS = ("model", "dataloader", "optimizer", "lr_multiplier", "evaluator", "train")  # of a recipe


def build_model(cfg) -> Pretraining:
    """The model of ``cfg.model`` on ``cfg.train.device``."""
    return instantiate(cfg.model).to(cfg.train.device)


def load_weights(model: Pretraining, path: str) -> None:
    """Fill the classifier from the file at ``path``; one that does not fit is an :class:`InputError`."""
    classifier = model.classifier
    try:
        classifier.network.load_state_dict(read_classifier(path).state_dict)
    except RuntimeError as error:  # names the tensors
        raise InputError(
            f"{path} does not fit model.classifier.arch={classifier.arch} with "
            f"num_classes={classifier.num_classes}: {one_line(error)[:200]}"
        ) from None


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
    trainer = trainer_class(wrapped, _Replayed(loader, model.strategy.replays), optimizer)

    epoch = max(len(loader.dataset) // cfg.dataloader.train.total_batch_size, 1)  # in iterations
    epoch *= model.strategy.replays
    max_iter = max(round(cfg.train.epochs * epoch), 1)
    memory = {"strategy": model.strategy} if hasattr(model.strategy, "state_dict") else {}
    checkpointer = DetectionCheckpointer(
        model.classifier, cfg.train.output_dir, trainer=trainer, rt_detectron=_Metadata(model), **memory
    )
    is_main = comm.is_main_process()
    trainer.register_hooks(
        [
            hooks.IterationTimer(),
            _Progress(model),
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
    _share_buffers(model)
    cfg.evaluator.model = model
    results = inference_on_dataset(model, instantiate(cfg.dataloader.test), instantiate(cfg.evaluator))
    if comm.is_main_process():
        print_csv_format(results)
    return results


def _share_buffers(model: Pretraining) -> None:
    """Give every process the first one's BN statistics, which are those that are saved.

    Each process has gathered its own; evaluation shares the images among them.
    """
    if comm.get_world_size() > 1:
        for buffer in model.buffers():
            torch.distributed.broadcast(buffer, 0)


def classifier_metadata(model: Pretraining) -> dict:
    """What later tools must know of a pretrained classifier; written beside its tensors."""
    threat_model = model.strategy.threat_model
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


class _Replayed:
    """A loader whose batches come several times in a row."""

    def __init__(self, loader, times: int):
        self.loader = loader
        self.times = times

    def __iter__(self):
        for batch in self.loader:
            for _ in range(self.times):
                yield batch


class _Progress(HookBase):
    """Tells the model which share of the training is done; schedules of eps go by it."""

    def __init__(self, model: Pretraining):
        self.model = model

    def before_step(self):
        self.model.progress = self.trainer.iter / self.trainer.max_iter


class _Metadata:
    """Has the checkpointer write :func:`classifier_metadata` into each file; resuming has no use for it."""

    def __init__(self, model: Pretraining):
        self.model = model

    def state_dict(self) -> dict:
        return classifier_metadata(self.model)

    def load_state_dict(self, state: dict) -> None:
        pass


def export_classifier(model: Pretraining, path: str) -> str:
    """Write the network under torchvision's names with its metadata, atomically; returns ``path``."""
    content = {"model": model.classifier.network.state_dict(), "rt_detectron": classifier_metadata(model)}
    with replaced_atomically(path) as temporary:
        torch.save(content, temporary)
    return path


def load_config(path: str, overrides: list[str]):
    """The LazyConfig at ``path`` with ``key=value`` overrides.

    Where there is no GPU, train.device becomes "cpu", with a warning.

    Raises:
        InputError: for a missing or broken file, an unknown key, or an override that cannot be parsed.
    """
    if not os.path.isfile(path):
        raise InputError(
            f"--config-file {path or '(none)'}: no such file; configs/pretrain/ holds the recipes"
        )
    try:
        cfg = LazyConfig.load(path)
    except (SyntaxError, ImportError, AssertionError, YAMLError) as error:
        raise InputError(f"--config-file {path}: not a LazyConfig file ({one_line(error)[:200]})") from None
    missing = [key for key in KEYS if key not in cfg]
    if missing:
        raise InputError(
            f"--config-file {path}: no pretraining recipe, it lacks {', '.join(missing)}; "
            "configs/pretrain/ holds the recipes"
        )
    for override in overrides:
        key, equals, _ = override.partition("=")
        if not equals:
            raise InputError(f"{override!r} is not of the form key=value, e.g. train.epochs=10")
        if not _has_key(cfg, key):
            raise InputError(f"unknown configuration key {key!r}; {path} shows the keys")
    try:
        cfg = LazyConfig.apply_overrides(cfg, overrides)
    except (HydraException, OmegaConfBaseException) as error:
        raise InputError(f"{' '.join(overrides)}: {one_line(error)[:200]}") from None
    if cfg.train.device == "cuda" and not torch.cuda.is_available():
        if comm.is_main_process():
            logger.warning("No GPU found: running on the CPU (train.device=cpu)")
        cfg.train.device = "cpu"
        cfg.train.amp = False  # Detectron2's AMP is for GPUs only
    return cfg


def _has_key(cfg, key: str) -> bool:
    for part in key.split("."):
        if OmegaConf.is_list(cfg) and part.isdigit() and int(part) < len(cfg):
            cfg = cfg[int(part)]
        elif OmegaConf.is_dict(cfg) and part in cfg:
            cfg = cfg[part]
        else:
            return False
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
