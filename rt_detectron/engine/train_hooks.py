"""Hooks of Detectron2's trainers, for classifiers and detectors."""

import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import torch
from detectron2.engine import HookBase, TrainerBase, hooks
from detectron2.solver import LRMultiplier
from detectron2.utils import comm
from torch.optim.swa_utils import AveragedModel
from tqdm import tqdm

from rt_detectron.utils.files import json_lines
from rt_detectron.utils.seeds import seed_all

logger = logging.getLogger(__name__)


class LRScheduler(hooks.LRScheduler):
    """Detectron2's hook; a resumed training has the learning rate of its config, not of its checkpoint."""

    def before_train(self):
        super().before_train()
        scheduler = self.scheduler
        if isinstance(scheduler, LRMultiplier):
            scheduler.last_epoch = self.trainer.start_iter
            for group, rate in zip(self._optimizer.param_groups, scheduler.get_lr(), strict=True):
                group["lr"] = rate

    def state_dict(self) -> dict:
        return {} if isinstance(self.scheduler, LRMultiplier) else super().state_dict()

    def load_state_dict(self, state: dict) -> None:
        if not isinstance(self.scheduler, LRMultiplier):
            super().load_state_dict(state)


@contextmanager
def as_after(trainer: TrainerBase, iteration: int) -> Iterator[None]:
    """Within this, the trainer is at ``iteration``, for what belongs to it but was interrupted."""
    now = trainer.iter
    trainer.iter = trainer.storage.iter = iteration
    try:
        yield
    finally:
        trainer.iter = trainer.storage.iter = now


class EvalHook(hooks.EvalHook):
    """Detectron2's; a resumed training first makes the evaluation that its checkpoint was saved ahead of.

    It does so unless metrics.json has that one, which leaves its duration there, ``eval_time`` in seconds.

    Args:
        folder: of metrics.json.
    """

    def __init__(self, eval_period: int, eval_function: Callable[[], dict], folder: str):
        super().__init__(eval_period, eval_function)
        self.folder = folder

    def before_train(self):
        done = self.trainer.start_iter
        if not (done and self._period and done % self._period == 0 and done != self.trainer.max_iter):
            return
        if not comm.all_gather(self._is_recorded(done))[0]:
            logger.info("The evaluation after iteration %d was interrupted: it is made now", done)
            with as_after(self.trainer, done - 1):
                self._do_eval()

    def _do_eval(self):
        start = time.perf_counter()
        super()._do_eval()
        self.trainer.storage.put_scalar("eval_time", time.perf_counter() - start, smoothing_hint=False)

    def _is_recorded(self, done: int) -> bool:
        with suppress(OSError):
            records = json_lines(os.path.join(self.folder, "metrics.json"))
            # Detectron2 counts from 0, but the evaluation at the end of a training from 1.
            return any("eval_time" in each and each["iteration"] in (done - 1, done) for each in records)
        return False


class StepSeed(HookBase):
    """Has the random numbers of a step follow from a seed, the iteration and the process.

    So a resumed training draws the same ones as an uninterrupted one. The seed itself follows from Numpy's
    random numbers of the first process, and is kept with the training.
    """

    def __init__(self):
        self.seed = comm.shared_random_seed()

    def before_step(self):
        seed_all(self.seed, self.trainer.iter, comm.get_rank())

    def state_dict(self) -> dict:
        return {"seed": self.seed}

    def load_state_dict(self, state: dict) -> None:
        self.seed = state["seed"]


class ExponentialMovingAverage(HookBase):
    """Averages weights and BN statistics: after each step, ``average = decay*average + (1-decay)*weights``.

    At first the decay is (1 + t) / (10 + t) after t steps, until that exceeds ``decay``, so that the initial
    weights are soon forgotten. TensorFlow's ExponentialMovingAverage(num_updates) does the same.

    Args:
        model: what is averaged.
        decay: in (0, 1).

    Attributes:
        averaged: torch's AveragedModel of ``model``.
    """

    def __init__(self, model: torch.nn.Module, decay: float):
        self.model = model
        self.decay = decay
        self.averaged = AveragedModel(model, multi_avg_fn=self._update, use_buffers=True)

    def after_step(self):
        self.averaged.update_parameters(self.model)

    @torch.no_grad()
    def _update(self, averaged: list, current: list, count) -> None:
        steps = self.trainer.iter
        if averaged[0].is_floating_point():
            torch._foreach_lerp_(averaged, current, 1 - min(self.decay, (1 + steps) / (10 + steps)))
        else:  # BN's counters
            torch._foreach_copy_(averaged, current)


class ProgressBar(HookBase):
    """A progress bar over the iterations, with the remaining time."""

    def before_train(self):
        self.bar = tqdm(
            total=self.trainer.max_iter, initial=self.trainer.start_iter, unit="it", desc="training"
        )

    def after_step(self):
        self.bar.update()

    def after_train(self):
        self.bar.close()
