"""The training loop shared by pretraining and linear probing."""

import copy
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from detectron2.engine import HookBase, SimpleTrainer, default_writers, hooks
from detectron2.utils import comm
from filelock import FileLock, Timeout
from torch import nn

from rt_detectron.checkpoint.checkpointer import TO_KEEP, TrainingCheckpointer, periodic_checkpoints
from rt_detectron.engine.checkpointing import Checkpoints, SafeCheckpointing
from rt_detectron.engine.lazy_config import build, save_lazy_config
from rt_detectron.engine.signals import StopSignals
from rt_detectron.engine.train_hooks import EvalHook, LRScheduler, ProgressBar
from rt_detectron.utils.errors import InputError

logger = logging.getLogger(__name__)


def refuse_other_training(folder: str, resume: bool, key: str = "train.output_dir") -> None:
    """Raise :class:`InputError` if ``folder`` holds a training, finished or not, and ``resume`` is False.

    Call it in all processes; the first one's folder counts.

    Args:
        folder: for the output.
        resume: whether to go on with what is there.
        key: the folder's key in the configuration.
    """
    if resume:
        return
    if comm.all_gather(_has_training(folder))[0]:
        raise InputError(f"{folder} holds a training: add --resume to go on with it, or choose another {key}")


def folder_of_evaluation(folder: str) -> str:
    """Where an evaluation into ``folder`` puts its files: below it, in "evaluation", if it is a training's.

    So the training keeps its results, configuration and predictions. Call it in all processes; the first
    one's folder counts.
    """
    is_trainings = comm.all_gather(_has_training(folder))[0]
    return os.path.join(folder, "evaluation") if is_trainings else folder


def _has_training(folder: str) -> bool:
    return os.path.isdir(folder) and bool(periodic_checkpoints(folder) or has_model(folder))


def has_model(folder: str) -> bool:
    """Whether ``folder`` holds the outcome of a finished training."""
    return os.path.isfile(os.path.join(folder, "model_final.pth"))


def build_optimizer(cfg, model: nn.Module) -> torch.optim.Optimizer:
    """The optimiser of ``cfg.optimizer`` over the parameters of ``model``."""
    lazy_optimizer = copy.deepcopy(cfg.optimizer)  # cfg is written to files, so it must hold no objects
    lazy_optimizer.params.model = model
    return build(lazy_optimizer, "optimizer")


def run(
    cfg,
    trainer: SimpleTrainer,
    checkpointer: TrainingCheckpointer,
    epoch: int,
    evaluate: Callable[[], dict],
    finish: Callable[[dict], None],
    resume: bool = False,
    first_hooks: Sequence[HookBase | None] = (),
) -> None:
    """Run ``trainer`` with schedule, checkpoints, evaluation and writers; it can be stopped by a signal.

    Args:
        cfg: a LazyConfig with ``lr_multiplier`` and ``train``.
        trainer: has ``has_diverged`` for :class:`SafeCheckpointing`, its message in ``diverged``, and
            ``state_of_process`` and ``load_state_of_process`` for what each process keeps for itself.
        checkpointer: of the training.
        epoch: iterations in each of ``cfg.train.epochs``.
        evaluate: gives Detectron2's evaluation results.
        finish: called once at the end, in the first process, with the last results.
        resume: go on from the last checkpoint of ``cfg.train.output_dir``, where there is one.
        first_hooks: hooks that run before those made here.
    """
    start = time.perf_counter()
    train = cfg.train
    max_iter = max(round(train.epochs * epoch), 1)
    eval_period = max(round(train.eval_epochs * epoch), 1)
    trainer.gather_metric_period = train.log_period
    is_main = comm.is_main_process()
    signals = StopSignals()
    checkpoint_period = max(round(train.checkpoint_epochs * epoch), 1)
    checkpointing = SafeCheckpointing(
        Checkpoints(
            checkpointer, [checkpoint_period, eval_period], TO_KEEP, state_of_process=trainer.state_of_process
        ),
        signals,
        trainer.diverged,
        advice="a smaller optimizer.lr, or without train.amp",
    )
    results = {}

    def evaluate_safely() -> dict:
        results.update(checkpointing.evaluate(evaluate))
        return results

    trainer.register_hooks(
        [
            hooks.IterationTimer(),
            *first_hooks,
            LRScheduler(scheduler=build(cfg.lr_multiplier, "lr_multiplier")),
            checkpointing,
            EvalHook(eval_period, evaluate_safely, train.output_dir),
            hooks.PeriodicWriter(default_writers(train.output_dir, max_iter), train.log_period)
            if is_main
            else None,
            ProgressBar() if is_main and sys.stderr.isatty() else None,
        ]
    )
    start_iter = 0
    if resume and checkpointer.resume():
        start_iter = trainer.iter + 1
        trainer.load_state_of_process(checkpointer.processes)
    save_lazy_config(cfg, train.output_dir)
    with checkpointing.running():
        trainer.train(start_iter, max_iter)
        if is_main:
            finish(results)
            logger.info("Done after %.0f s", time.perf_counter() - start)


@contextmanager
def sole_run(folder: str, key: str = "train.output_dir") -> Iterator[None]:
    """Keep other trainings and evaluations out of ``folder``, whose files would mix with those of this one.

    The lock ends with the process, even if that is killed.

    Raises:
        InputError: in all processes, if another run holds the lock.
    """
    lock = FileLock(os.path.join(folder, ".lock"))
    is_taken = False
    if comm.is_main_process():
        os.makedirs(folder, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            is_taken = True
    try:
        if any(comm.all_gather(is_taken)):
            raise InputError(f"another process writes to {folder}: wait for its end, or choose another {key}")
        yield
    finally:
        lock.release()
