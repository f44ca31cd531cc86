"""What happens around a training step."""

import numpy as np
import torch
from detectron2.engine import HookBase
from detectron2.utils import comm
from torch.optim.swa_utils import AveragedModel
from tqdm import tqdm

from .strategies import Pretraining


class StepState(HookBase):
    """Everything that a step depends on beside weights and batch: the share of training done, and the seed.

    The random numbers of a step follow from the training's seed, the iteration and the process, so a resumed
    training draws those that an uninterrupted one does.
    """

    def __init__(self, model: Pretraining, seed: int):
        self.model = model
        self.seed = seed

    def before_step(self):
        iteration = self.trainer.iter
        self.model.progress = iteration / self.trainer.max_iter
        sequence = np.random.SeedSequence([self.seed, iteration, comm.get_rank()])
        torch.manual_seed(int(sequence.generate_state(1, np.uint64)[0] >> 1))


class ExponentialMovingAverage(HookBase):
    """Follows weights and BN statistics: after each step, ``average = decay*average + (1 - decay)*weights``.

    At first the decay is (1 + t) / (10 + t) after t steps, until that exceeds ``decay``, as in TensorFlow's
    ExponentialMovingAverage(num_updates), so that the random initial weights are soon forgotten.

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
    """A bar over the iterations, with the time left."""

    def before_train(self):
        self.bar = tqdm(
            total=self.trainer.max_iter, initial=self.trainer.start_iter, unit="it", desc="training"
        )

    def after_step(self):
        self.bar.update()

    def after_train(self):
        self.bar.close()
