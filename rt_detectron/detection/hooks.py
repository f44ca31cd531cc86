"""Hooks of a detector's training, for yacs and lazy configs alike."""

import logging
import os

import torch
from detectron2.engine import HookBase, hooks
from detectron2.utils import comm
from torch import nn

from rt_detectron.checkpoint.checkpointer import RobustCheckpointer
from rt_detectron.engine.checkpointing import SafeCheckpointing
from rt_detectron.engine.processes import SameStart, first_ones_buffers
from rt_detectron.engine.train_hooks import (
    EvalHook,
    ExponentialMovingAverage,
    LRScheduler,
    StepSeed,
    as_after,
)
from rt_detectron.utils.errors import InputError

logger = logging.getLogger(__name__)

LOG_PERIOD = 20  # iterations, as in Detectron2


class AveragedWeights(ExponentialMovingAverage):
    """The average is evaluated, and saved as ``model`` in the checkpoints.

    So a checkpoint holds the weights that were evaluated. The weights that the optimiser updates are saved
    in this hook's state, for resuming. Load pretrained weights into ``averaged.module``.
    """

    def __init__(self, model: nn.Module, decay: float):
        super().__init__(model, decay)
        self.resumed = False

    def before_train(self):
        if not self.resumed:
            self.model.load_state_dict(self.averaged.module.state_dict())

    def state_dict(self) -> dict:
        return {"weights": self.model.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        self.model.load_state_dict(state["weights"])
        self.averaged.n_averaged.fill_(1)  # or its next update would copy the weights
        self.resumed = True


def build_average(model: nn.Module, decay: float) -> AveragedWeights | None:
    """The hook that averages with ``decay``; None for a decay of 0.

    Raises:
        InputError: for a decay outside [0, 1).
    """
    if not 0 <= decay < 1:
        raise InputError(f"the EMA's decay is {decay}; it must be from 0 (none) to below 1, e.g. 0.999")
    return AveragedWeights(model, decay) if decay else None


class BestCheckpointer(hooks.BestCheckpointer):
    """Keeps the weights with the best metric in ``model_best.pth``, also across resumed trainings.

    Detectron2's own forgets the best value when a training is resumed, and resumes from ``model_best``. Here
    the file holds only the weights and ``best``: metric, value and iteration.

    Args:
        eval_period: of the EvalHook.
        model: whose weights are kept.
        checkpointer: of the training; its folder and metadata are used.
        metric: such as "bbox/AP"; higher is better.
    """

    def __init__(self, eval_period: int, model: nn.Module, checkpointer: RobustCheckpointer, metric: str):
        super().__init__(eval_period, _Untagged(model, checkpointer.save_dir), metric)
        self.training = checkpointer

    def before_train(self):
        path = os.path.join(self.training.save_dir, f"{self._file_prefix}.pth")
        if self.trainer.start_iter and os.path.isfile(path):
            best = torch.load(path, map_location="cpu", weights_only=True, mmap=True).get("best", {})
            if best.get("metric") == self._val_metric:
                self.best_metric, self.best_iter = best["value"], best["iteration"]
        if self._val_metric in self.trainer.storage.latest():  # of an evaluation that was interrupted
            with as_after(self.trainer, self.trainer.start_iter - 1):
                self._best_checking()

    def _best_checking(self):
        value, _ = self.trainer.storage.latest().get(self._val_metric, (None, None))
        self._checkpointer.metadata = self.training.metadata
        self._checkpointer.best = {
            "metric": self._val_metric,
            "value": value,
            "iteration": self.trainer.iter,
        }
        super()._best_checking()


class PreciseBN(hooks.PreciseBN):
    """Detectron2's; each time on the same images, so that a resumed training gets the same statistics."""

    def update_stats(self):
        self._data_iter = None
        super().update_stats()

    def state_dict(self) -> dict:
        return getattr(self._data_loader, "state_dict", dict)()

    def load_state_dict(self, state: dict) -> None:
        self._data_loader.load_state_dict(state)


class _Untagged(RobustCheckpointer):
    """Does not become the checkpoint to resume from."""

    best: dict

    def save(self, name: str, **kwargs) -> None:
        super().save(name, **kwargs, best=self.best)

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        pass


def training_hooks(
    *,
    checkpointing: SafeCheckpointing,
    model: nn.Module,
    evaluated: nn.Module,
    evaluate,
    eval_period: int,
    best_metric: str = "",
    scheduler=None,
    average: AveragedWeights | None = None,
    precise_bn: PreciseBN | None = None,
    build_writers,
    log_period: int = LOG_PERIOD,
) -> list[HookBase | None]:
    """The hooks of a training, in Detectron2's order.

    Args:
        checkpointing: saves; its checkpointer also keeps the best.
        model: the model that is trained, without DistributedDataParallel.
        evaluated: the model that ``evaluate`` evaluates: ``model`` or its average.
        evaluate: returns the nested dict of metrics.
        eval_period: iterations between two evaluations; 0 evaluates only at the end.
        best_metric: see :class:`BestCheckpointer`; "" keeps none.
        scheduler: None for the trainer's own.
        build_writers: gives the event writers of the first process.
    """
    is_main = comm.is_main_process()

    def evaluate_what_is_saved() -> dict:
        with first_ones_buffers(evaluated):
            return evaluate()

    return [
        hooks.IterationTimer(),
        StepSeed(),
        average,
        SameStart(model, evaluated),
        LRScheduler(scheduler=scheduler),
        precise_bn,
        checkpointing,
        EvalHook(
            eval_period,
            lambda: checkpointing.evaluate(evaluate_what_is_saved),
            checkpointing.checkpoints.checkpointer.save_dir,
        ),
        BestCheckpointer(eval_period, evaluated, checkpointing.checkpoints.checkpointer, best_metric)
        if is_main and eval_period and best_metric
        else None,
        hooks.PeriodicWriter(build_writers(), log_period) if is_main else None,
    ]
