"""Checkpoints that a training can be resumed from, whatever ends it."""

import glob
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from detectron2.utils import comm
from filelock import FileLock, Timeout

from rt_detectron.checkpoint.atomic import AtomicCheckpointer, periodic_checkpoints
from rt_detectron.checkpoint.formats import check_archive, unreadable
from rt_detectron.utils.errors import InputError, one_line

logger = logging.getLogger(__name__)

TO_KEEP = 2  # one to fall back on, should the last one turn out damaged


class TrainingCheckpointer(AtomicCheckpointer):
    """Resumes from the newest whole checkpoint; no code in a file is run when it is loaded.

    Raises:
        InputError: from ``save``, when the file cannot be written; from ``resume``, when no checkpoint of the
            folder can be read or the last one does not fit the configuration.
    """

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


def has_checkpoint(folder: str) -> bool:
    """Whether ``folder`` holds a training to resume."""
    return os.path.isfile(os.path.join(folder, "last_checkpoint"))


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
