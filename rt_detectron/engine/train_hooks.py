"""Hooks of Detectron2's trainers, for classifiers and detectors."""

import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from detectron2.engine import HookBase, hooks
from detectron2.utils import comm
from torch.optim.swa_utils import AveragedModel
from tqdm import tqdm

from rt_detectron.checkpoint.checkpointer import AtomicCheckpointer, periodic_checkpoints
from rt_detectron.utils.errors import InputError

logger = logging.getLogger(__name__)


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


class SafeCheckpointing(hooks.PeriodicCheckpointer):
    """Saves periodically, at the end, and when the process is told to stop.

    - Before anything is saved, the trainer says in all processes whether it has broken; if so, the training
      ends, and what was saved before stays.
    - SIGTERM, which clusters send ahead of a preemption, and Ctrl-C let the current step finish, save, and
      leave: with exit status 0 and with a KeyboardInterrupt. A second Ctrl-C leaves at once.

    Register it in all processes, with a trainer that has ``has_broken(wait: bool) -> bool``; the first
    process saves.

    Args:
        checkpointer: of the training.
        periods: save after every so many iterations, by each of these.
        max_to_keep: delete all but so many of the periodic checkpoints; None keeps all.
        broken: what to tell the user, "the loss ...", once the trainer has broken; "{}" is the iteration.
        way_out: what a broken training should go on with, as "a smaller learning rate".
    """

    def __init__(
        self,
        checkpointer: AtomicCheckpointer,
        periods: list[int],
        max_to_keep: int | None,
        broken: str,
        way_out: str,
    ):
        super().__init__(checkpointer, periods[0], max_to_keep=max_to_keep)
        self.periods = periods
        self.broken = broken
        self.way_out = way_out
        self.signal: int | None = None
        self.evaluating = self.ended = False
        self.saved: int | None = None  # iterations behind the newest checkpoint of this training
        self._flags_group = None

    def before_train(self):
        super().before_train()
        if comm.get_world_size() > 1:
            self._flags_group = torch.distributed.new_group(backend="gloo")
        self.saved = self.trainer.start_iter or None
        if comm.is_main_process():
            self.recent_checkpoints = periodic_checkpoints(self.checkpointer.save_dir)

    @contextmanager
    def heeding_signals(self) -> Iterator[None]:
        """Within this a signal to stop is heeded as described above."""
        is_main = threading.current_thread() is threading.main_thread()  # which alone may handle signals
        signums = (signal.SIGTERM, signal.SIGINT) if is_main else ()
        previous = {signum: signal.signal(signum, self._on_signal) for signum in signums}
        try:
            yield
        finally:
            for signum, handler in previous.items():
                signal.signal(signum, handler)

    def after_step(self):
        iteration = self.trainer.iter + 1
        stop, broken = self._in_any_process(self.signal is not None, self.trainer.has_broken())
        due = iteration == self.max_iter or any(iteration % period == 0 for period in self.periods)
        if (due or stop) and not broken:
            (broken,) = self._in_any_process(self.trainer.has_broken(wait=True))
        if broken:
            self._give_up()
        if due or stop:
            self._save(iteration)
        if stop:
            logger.info("Stopped after iteration %d of %d; --resume goes on", iteration, self.max_iter)
            self._leave()

    def evaluate(self, function: Callable[[], dict]) -> dict:
        """Call ``function``; a signal to stop interrupts it, once all is saved."""
        if self.ended or self.signal is not None:  # after the last step
            return {}
        self.evaluating = True
        try:
            return function()
        except (SystemExit, KeyboardInterrupt):
            iteration = min(self.trainer.iter + 1, self.max_iter)
            if self.saved != iteration:
                self._save(iteration)
            raise
        finally:
            self.evaluating = False

    def _save(self, iteration: int) -> None:
        self.saved = iteration
        if not comm.is_main_process():
            return
        name = "model_final" if iteration == self.max_iter else f"model_{iteration - 1:07d}"
        self.checkpointer.save(name, iteration=iteration - 1)
        if iteration < self.max_iter:
            self.recent_checkpoints.append(self.checkpointer.get_checkpoint_file())
        while self.max_to_keep is not None and len(self.recent_checkpoints) > self.max_to_keep:
            oldest = self.recent_checkpoints.pop(0)
            if os.path.exists(oldest):
                os.remove(oldest)

    def _in_any_process(self, *flags: bool) -> list[bool]:
        if self._flags_group is None:
            return list(flags)
        agreed = torch.tensor(flags, dtype=torch.uint8)
        torch.distributed.all_reduce(agreed, torch.distributed.ReduceOp.MAX, group=self._flags_group)
        return agreed.bool().tolist()

    def _give_up(self) -> None:
        self.ended = True
        last = self.checkpointer.get_checkpoint_file() if self.saved else ""
        raise InputError(
            f"{self.broken.format(self.trainer.iter)}. "
            + (
                f"{last} is from before that: go on from it with --resume and "
                if last
                else "Start again with "
            )
            + self.way_out
        )

    def _on_signal(self, signum, frame) -> None:
        repeated = self.signal is not None and signum == signal.SIGINT
        self.signal = signum
        if self.evaluating or repeated:
            self._leave()

    def _leave(self) -> None:
        self.ended = True
        if self.signal == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(0)


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
