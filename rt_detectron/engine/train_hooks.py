"""Hooks of Detectron2's trainers, for classifiers and detectors."""

import torch
from detectron2.engine import HookBase
from torch.optim.swa_utils import AveragedModel
from tqdm import tqdm


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
