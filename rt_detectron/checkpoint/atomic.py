"""Checkpoints that are whole or not there at all."""

import os
import re

from detectron2.checkpoint import DetectionCheckpointer

from rt_detectron.checkpoint.writers import save_atomically
from rt_detectron.utils.errors import InputError
from rt_detectron.utils.files import replaced_atomically


class AtomicCheckpointer(DetectionCheckpointer):
    """Detectron2's checkpointer, whose files are whole or not there at all.

    Raises:
        InputError: from ``save``, when the file cannot be written.
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


def periodic_checkpoints(folder: str) -> list[str]:
    """The files ``model_NUMBER.pth`` of the folder, oldest first."""
    names = [name for name in os.listdir(folder) if re.fullmatch(r"model_\d+\.pth", name)]
    return [os.path.join(folder, name) for name in sorted(names, key=lambda name: int(name[6:-4]))]
