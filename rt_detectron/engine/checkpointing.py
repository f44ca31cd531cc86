"""When a training saves and when it ends: periodically, on divergence and on signals."""

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from detectron2.engine import HookBase
from detectron2.utils import comm

from rt_detectron.checkpoint.checkpointer import (
    TO_KEEP,
    AtomicCheckpointer,
    checkpoint_number,
    periodic_checkpoints,
)
from rt_detectron.engine.processes import Agreement
from rt_detectron.engine.signals import StopSignals
from rt_detectron.utils.errors import InputError

logger = logging.getLogger(__name__)


class Checkpoints:
    """The checkpoints of one training: when they are due, and which are kept. The first process saves.

    Args:
        checkpointer: of the training.
        periods: save after every so many iterations, for each of these numbers > 0, and at the end.
        max_to_keep: number of periodic checkpoints to keep; older ones are deleted. None keeps all.
        eval_period: save ahead of evaluations, too. Such a checkpoint, and that of a signal, is deleted when
            two newer ones are there.
        state_of_process: gives what else a process needs to go on, as torch saves it. All of them are saved,
            as a list "processes".
    """

    def __init__(
        self,
        checkpointer: AtomicCheckpointer,
        periods: list[int],
        max_to_keep: int | None = None,
        eval_period: int = 0,
        state_of_process: Callable[[], dict] = dict,
    ):
        self.checkpointer = checkpointer
        self.periods = [period for period in periods if period > 0]
        self.max_to_keep = max_to_keep
        self.eval_period = eval_period
        self.state_of_process = state_of_process
        self.saved: int | None = None  # iterations behind the newest checkpoint of this training

    def start(self, start_iter: int, max_iter: int) -> None:
        self.max_iter = max_iter
        self.saved = start_iter or None
        self.recent: list[str] = []
        self.passing: set[str] = set()  # those of `recent` outside the periods
        if comm.is_main_process():
            # Later ones are damaged or given up: the training has gone back behind them.
            files = periodic_checkpoints(self.checkpointer.save_dir)
            self.recent = [path for path in files if checkpoint_number(path) < start_iter]

    def is_due(self, iteration: int) -> bool:
        """Whether to save after so many iterations."""
        return (
            iteration == self.max_iter
            or self._stays(iteration)
            or (self.eval_period > 0 and iteration % self.eval_period == 0)
        )

    def _stays(self, iteration: int) -> bool:
        return any(iteration % period == 0 for period in self.periods)

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
            path = self.checkpointer.get_checkpoint_file()
            self.recent.append(path)
            if not self._stays(iteration):
                self.passing.add(path)
        self._delete_old()

    def _delete_old(self) -> None:
        surplus = len(self.recent) - self.max_to_keep if self.max_to_keep is not None else 0
        old = [path for path in self.recent[:-TO_KEEP] if path in self.passing]
        for path in {*self.recent[: max(surplus, 0)], *old}:
            self.recent.remove(path)
            if os.path.exists(path):
                os.remove(path)

    def last_file(self) -> str:
        """The newest checkpoint of this training; "" before the first."""
        return self.checkpointer.get_checkpoint_file() if self.saved else ""


class SafeCheckpointing(HookBase):
    """Saves checkpoints that are worth resuming, and ends a training that has diverged or is told to stop.

    - Before anything is saved, all processes are asked whether the training has diverged. If it has, it ends
      with an :class:`InputError`, and the earlier checkpoints stay.
    - After a signal to stop, the current step finishes and is saved; then the process ends.
    - What is evaluated is saved first, so that an evaluation can break off at any time.

    Register it in all processes, with a trainer that has ``has_diverged(wait: bool) -> bool``, and train
    within :meth:`running`.

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
        self._done = -1  # iterations; below 0 if the training has broken off, or has not begun

    @contextmanager
    def running(self) -> Iterator[None]:
        """Within this, signals are noted, and a forward pass without finite numbers is one line."""
        with self.signals.handled():
            try:
                yield
            except FloatingPointError:
                raise InputError(self._message()) from None

    def before_train(self):
        self.agreement = Agreement()
        self.checkpoints.start(self.trainer.start_iter, self.trainer.max_iter)
        self._done = self.trainer.start_iter

    def after_step(self):
        iteration = self.trainer.iter + 1
        stop, diverged = self.agreement.any(self.signals.received is not None, self.trainer.has_diverged())
        save = stop or self.checkpoints.is_due(iteration)
        if save and not diverged:  # now wait for the losses that are still being computed
            (diverged,) = self.agreement.any(self.trainer.has_diverged(wait=True))
        if diverged:
            raise InputError(self._message())
        if save:
            self.checkpoints.save(iteration)
        if stop:
            self._stop(iteration)
        self._done = iteration

    def _stop(self, iteration: int) -> None:
        logger.info("Stopped after iteration %d of %d; --resume goes on", iteration, self.trainer.max_iter)
        self.signals.stop()

    def evaluate(self, function: Callable[[], dict]) -> dict:
        """Call ``function``, unless the training has broken off; a signal to stop interrupts it."""
        if self._done < min(self.trainer.iter + 1, self.trainer.max_iter):
            return {}
        (stop,) = self.agreement.any(self.signals.received is not None)  # between the last step and now
        try:
            if stop:
                self._stop(self._done)
            with self.signals.stopping_at_once():
                return function()
        except BaseException:
            self._done = -1
            raise

    def _message(self) -> str:
        last = self.checkpoints.last_file()
        way_out = (
            f"{last} is from before that: go on from it with --resume and" if last else "Start again with"
        )
        return f"{self.diverged.format(self.trainer.iter)}. {way_out} {self.advice}"
