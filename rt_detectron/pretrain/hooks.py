"""What happens around a training step."""

import numpy as np
import torch
from detectron2.engine import HookBase
from detectron2.utils import comm
from tqdm import tqdm

from rt_detectron.pretrain.strategies import Pretraining


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
