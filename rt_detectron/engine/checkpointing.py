"""When a training saves and when it ends: periodically, on divergence and on signals."""

import logging
import os
from collections.abc import Callable

import torch
from detectron2.engine import HookBase
from detectron2.utils import comm

from rt_detectron.checkpoint.checkpointer import AtomicCheckpointer, periodic_checkpoints
from rt_detectron.engine.signals import StopSignals
from rt_detectron.utils.errors import InputError

logger = logging.getLogger(__name__)


class Checkpoints:
    """The checkpoints of one training: when they are due, and which are kept. The first process saves.

    Args:
        checkpointer: of the training.
        periods: save after every so many iterations, for each of these numbers, and at the end.
        max_to_keep: number of periodic checkpoints to keep; older ones are deleted. None keeps all.
        state_of_process: gives what else a process needs to go on, as torch saves it. All of them are saved,
            as a list "processes".
    """

    def __init__(
        self,
        checkpointer: AtomicCheckpointer,
        periods: list[int],
        max_to_keep: int | None = None,
        state_of_process: Callable[[], dict] = dict,
    ):
        self.checkpointer = checkpointer
        self.periods = periods
        self.max_to_keep = max_to_keep
        self.state_of_process = state_of_process
        self.saved: int | None = None  # iterations behind the newest checkpoint of this training

    def start(self, start_iter: int, max_iter: int) -> None:
        self.max_iter = max_iter
        self.saved = start_iter or None
        self.recent = periodic_checkpoints(self.checkpointer.save_dir) if comm.is_main_process() else []

    def is_due(self, iteration: int) -> bool:
        """Whether to save after so many iterations."""
        return iteration == self.max_iter or any(iteration % period == 0 for period in self.periods)

    def save(self, iteration: int) -> None:
        """Save what there is after ``iteration`` iterations, unless that is saved already.

        Call it in all processes.
        """
        if iteration == self.saved:
            return
        self.saved = iteration
        processes = comm.gather(self.state_of_process())
        if not comm.is_main_process():
            return
        is_last = iteration == self.max_iter
        name = "model_final" if is_last else f"model_{iteration - 1:07d}"
        self.checkpointer.save(name, iteration=iteration - 1, processes=processes)
        if not is_last:
            self.recent.append(self.checkpointer.get_checkpoint_file())
        while self.max_to_keep is not None and len(self.recent) > self.max_to_keep:
            oldest = self.recent.pop(0)
            if os.path.exists(oldest):
                os.remove(oldest)

    def last_file(self) -> str:
        """The newest checkpoint of this training; "" before the first."""
        return self.checkpointer.get_checkpoint_file() if self.saved else ""


class Agreement:
    """Lets all processes take the same decision. Make it in all of them."""

    def __init__(self):
        self._group = torch.distributed.new_group(backend="gloo") if comm.get_world_size() > 1 else None

    def any(self, *flags: bool) -> list[bool]:
        """Of each flag, whether it is set in any process."""
        if self._group is None:
            return list(flags)
        agreed = torch.tensor(flags, dtype=torch.uint8)
        torch.distributed.all_reduce(agreed, torch.distributed.ReduceOp.MAX, group=self._group)
        return agreed.bool().tolist()


class SafeCheckpointing(HookBase):
    """Saves checkpoints that are worth resuming, and ends a training that has diverged or is told to stop.

    - Before anything is saved, all processes are asked whether the training has diverged. If it has, it ends
      with an :class:`InputError`, and the earlier checkpoints stay.
    - After a signal to stop, the current step finishes and is saved; then the process ends.

    Register it in all processes, with a trainer that has ``has_diverged(wait: bool) -> bool``.

    Args:
        checkpoints: what is saved.
        signals: those that ask the training to stop.
        diverged: the message for a training that has diverged; "{}" stands for the iteration.
        advice: what to change then, such as "a smaller learning rate".
    """

    def __init__(self, checkpoints: Checkpoints, signals: StopSignals, diverged: str, advice: str):
        self.checkpoints = checkpoints
        self.signals = signals
        self.diverged = diverged
        self.advice = advice
        self.ended = False

    def before_train(self):
        self.agreement = Agreement()
        self.checkpoints.start(self.trainer.start_iter, self.trainer.max_iter)

    def after_step(self):
        iteration = self.trainer.iter + 1
        stop, diverged = self.agreement.any(self.signals.received is not None, self.trainer.has_diverged())
        save = stop or self.checkpoints.is_due(iteration)
        if save and not diverged:  # now wait for the losses that are still being computed
            (diverged,) = self.agreement.any(self.trainer.has_diverged(wait=True))
        if diverged:
            self.ended = True
            raise InputError(self._message())
        if save:
            self.checkpoints.save(iteration)
        if stop:
            logger.info(
                "Stopped after iteration %d of %d; --resume goes on", iteration, self.trainer.max_iter
            )
            self.ended = True
            self.signals.stop()

    def evaluate(self, function: Callable[[], dict]) -> dict:
        """Call ``function``, unless the training was ended; a signal to stop saves and interrupts it."""
        if self.ended or self.signals.received is not None:
            return {}
        try:
            with self.signals.stopping_at_once():
                return function()
        except (SystemExit, KeyboardInterrupt):
            self.ended = True
            self.checkpoints.save(min(self.trainer.iter + 1, self.trainer.max_iter))
            raise

    def _message(self) -> str:
        last = self.checkpoints.last_file()
        way_out = (
            f"{last} is from before that: go on from it with --resume and" if last else "Start again with"
        )
        return f"{self.diverged.format(self.trainer.iter)}. {way_out} {self.advice}"
