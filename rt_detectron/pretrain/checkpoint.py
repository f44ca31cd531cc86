"""Checkpoints that a training can be resumed from, whatever ends it."""

import glob
import logging
import os
import re
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.engine import hooks
from detectron2.utils import comm
from filelock import FileLock, Timeout

from rt_detectron.checkpoint.formats import check_archive, unreadable
from rt_detectron.checkpoint.writers import save_atomically
from rt_detectron.errors import InputError, one_line
from rt_detectron.files import replaced_atomically

logger = logging.getLogger(__name__)

TO_KEEP = 2  # one to fall back on, should the last one turn out damaged


class TrainingCheckpointer(DetectionCheckpointer):
    """Detectron2's checkpointer, whose files are whole or not there at all.

    No code in a file is run when it is loaded.

    Raises:
        InputError: from ``save``, when the file cannot be written; from ``resume``, when no checkpoint of the
            folder can be read or the last one does not fit the configuration.
    """

    def save(self, name: str, **kwargs) -> None:
        if not self.save_dir or not self.save_to_disk:
            return
        path = os.path.join(self.save_dir, f"{name}.pth")
        content = {"model": self.model.state_dict(), **kwargs}
        content |= {key: part.state_dict() for key, part in self.checkpointables.items()}
        try:
            save_atomically(content, path)
            self.tag_last_checkpoint(os.path.basename(path))
        except OSError as error:
            last = self.get_checkpoint_file()
            raise InputError(
                f"cannot write {path}: {error.strerror}; "
                + (
                    f"{last} is whole: make room and go on with --resume"
                    if last
                    else "make room and start again"
                )
            ) from None
        self.logger.info("Saved %s", path)

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        path = os.path.join(self.save_dir, "last_checkpoint")
        with replaced_atomically(path) as temporary, open(temporary, "w") as file:
            file.write(last_filename_basename)

    def resume(self) -> bool:
        """Load the last checkpoint, or the newest that is not damaged; False if the folder has none."""
        remove_leftovers(self.save_dir)
        if not self.has_checkpoint():
            return False
        last = self.get_checkpoint_file()
        older = [path for path in reversed(periodic_checkpoints(self.save_dir)) if path != last]
        damages = []
        for path in (last, *older):
            try:
                content = self._read(path)
            except InputError as error:
                damages.append(str(error))
                logger.warning("%s; trying the checkpoint before it", error)
                continue
            self._fill(content, path)
            return True
        raise InputError(f"{self.save_dir} has no checkpoint that can be read: {damages[0]}")

    def _read(self, path: str) -> dict:
        if not os.path.isfile(path):
            raise InputError(f"{path} is missing")
        check_archive(path)
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # damaged files fail in every way there is
            raise InputError(unreadable(path, error)) from None

    def _fill(self, content: dict, path: str) -> None:
        try:
            self.model.load_state_dict(content["model"])
            for key, part in self.checkpointables.items():
                part.load_state_dict(content[key])
        except (KeyError, RuntimeError, ValueError) as error:
            raise InputError(
                f"{path} is of another configuration ({type(error).__name__}: {one_line(error)[:200]}): "
                "resume with the one in config.yaml beside it, or choose another train.output_dir"
            ) from None
        logger.info("Resuming from %s", path)


def periodic_checkpoints(folder: str) -> list[str]:
    """The files ``model_NUMBER.pth`` of the folder, oldest first."""
    names = [name for name in os.listdir(folder) if re.fullmatch(r"model_\d+\.pth", name)]
    return [os.path.join(folder, name) for name in sorted(names, key=lambda name: int(name[6:-4]))]


def remove_leftovers(folder: str) -> None:
    """Delete the temporary files of a process that was killed while it wrote; nobody else may be writing."""
    if comm.is_main_process():
        for path in glob.glob(os.path.join(glob.escape(folder), "*.[0-9]*.tmp")):
            os.remove(path)


@contextmanager
def locked(folder: str) -> Iterator[None]:
    """Keep every other training out of ``folder``; the kernel ends this when the process dies.

    Raises:
        InputError: in all processes, if another training has it.
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
            raise InputError(f"another process is training into {folder}: choose another train.output_dir")
        yield
    finally:
        lock.release()


class SafeCheckpointing(hooks.PeriodicCheckpointer):
    """Saves periodically, ahead of every evaluation, at the end, and when the process is told to stop.

    - Before anything is saved, the losses up to then are known to be finite, in all processes; one that is
      not ends the training, and the log names its images.
    - SIGTERM, which clusters send ahead of a preemption, and Ctrl-C let the current step finish, save, and
      leave: with exit status 0 and with a KeyboardInterrupt. A second Ctrl-C leaves at once.

    Register it in all processes; the first one saves.

    Args:
        checkpointer: of the training.
        periods: save after every so many iterations, by each of these.
    """

    def __init__(self, checkpointer: TrainingCheckpointer, periods: list[int]):
        super().__init__(checkpointer, periods[0], max_to_keep=TO_KEEP)
        self.periods = periods
        self.signal: int | None = None
        self.evaluating = False
        self._flags_group = None

    def before_train(self):
        super().before_train()
        if comm.get_world_size() > 1:
            self._flags_group = torch.distributed.new_group(backend="gloo")
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
        """Call ``function``; a signal to stop interrupts it, since all is saved."""
        if self.signal is not None:  # after the last step
            return {}
        self.evaluating = True
        try:
            return function()
        finally:
            self.evaluating = False

    def _save(self, iteration: int) -> None:
        if not comm.is_main_process():
            return
        name = "model_final" if iteration == self.max_iter else f"model_{iteration - 1:07d}"
        self.checkpointer.save(name, iteration=self.trainer.iter)
        if iteration < self.max_iter:
            self.recent_checkpoints.append(self.checkpointer.get_checkpoint_file())
        while len(self.recent_checkpoints) > self.max_to_keep:
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
        last = self.checkpointer.get_checkpoint_file()
        raise InputError(
            f"the loss is not finite around iteration {self.trainer.iter}; log.txt names the images. "
            + (
                f"{last} is from before that: go on from it with --resume and "
                if last
                else "Start again with "
            )
            + "a smaller optimizer.lr, or without train.amp"
        )

    def _on_signal(self, signum, frame) -> None:
        repeated = self.signal is not None and signum == signal.SIGINT
        self.signal = signum
        if self.evaluating or repeated:
            self._leave()

    def _leave(self) -> None:
        if self.signal == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(0)
