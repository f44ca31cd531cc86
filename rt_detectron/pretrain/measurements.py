"""Which images withstand which attack, kept on disk while an evaluation goes on."""

import glob
import json
import logging
import os
from collections import defaultdict
from collections.abc import Sequence

from detectron2.utils import comm

from rt_detectron.utils.errors import InputError
from rt_detectron.utils.files import json_lines

logger = logging.getLogger(__name__)


class Measurements:
    """What attacks have found of single images, so that no attack is run twice.

    Each process appends to a file of its own in ``folder``, ``measurements-RANK.jsonl``: a line for each
    batch and attack. All of them are read at the beginning, whichever number of processes wrote them. A line
    that a killed process left incomplete does not count.

    Args:
        folder: for the files; "" keeps nothing.
        identity: of all that the findings depend on beside image and attack. Others' findings are left alone.
    """

    def __init__(self, folder: str = "", identity: str = ""):
        self.identity = identity
        self._path = os.path.join(folder, f"measurements-{comm.get_rank()}.jsonl") if folder else ""
        self._found: dict[str, dict[str, bool]] = defaultdict(dict)
        if folder:
            for path in sorted(glob.glob(os.path.join(glob.escape(folder), "measurements-*.jsonl"))):
                for entry in json_lines(path):
                    if entry.get("identity") == identity:
                        self._found[entry["attack"]].update(entry["withstood"])

    def known(self, attack: str, keys: Sequence[str]) -> list[bool | None]:
        """Whether each of these images withstands the attack; None where that is not known."""
        found = self._found[attack]
        return [found.get(key) for key in keys]

    def add(self, attack: str, keys: Sequence[str], withstood: Sequence[bool]) -> None:
        """Keep what was found of these images.

        Raises:
            InputError: if it cannot be written.
        """
        new = dict(zip(keys, withstood, strict=True))
        self._found[attack].update(new)
        if not self._path:
            return
        line = json.dumps({"identity": self.identity, "attack": attack, "withstood": new})
        try:
            with open(self._path, "a", encoding="ascii") as file:
                file.write(f"\n{line}\n")  # the first line end closes what a killed process left
        except OSError as error:
            raise InputError(
                f"cannot write {self._path} ({error.strerror}): make room and start again, which goes on"
            ) from None
