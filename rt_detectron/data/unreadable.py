"""Images that cannot be read: they stop a run, or are skipped and counted."""

import logging

import torch

from rt_detectron.utils.errors import InputError, one_line
from rt_detectron.utils.files import printable
from rt_detectron.utils.pictures import DepthError

logger = logging.getLogger(__name__)


class UnreadableImages:
    """What to do with an image that cannot be decoded: ``"stop"`` the run, or ``"skip"`` and count it.

    The count is shared with the loader's worker processes.

    Args:
        policy: "stop" or "skip".
        skipping: what sets "skip", for messages; "" if nothing does.
    """

    def __init__(self, policy: str, skipping: str = "on_corrupt=skip"):
        if policy not in ("stop", "skip"):
            key = skipping.removesuffix("skip").rstrip(" =") or "on_corrupt"
            raise InputError(f"{key} is {policy!r}; use 'stop' or 'skip'")
        self.policy = policy
        self.skipping = skipping
        # Shared with workers; and unlike multiprocessing's own numbers it can be pickled at any time, as
        # Detectron2 does with mappers. Two workers that count at the same moment may count one image.
        self._count = torch.zeros(1, dtype=torch.int64).share_memory_()

    @property
    def count(self) -> int:
        return int(self._count)

    def report(self, name: str, error: Exception) -> None:
        """Count an image as skipped, or raise an InputError. Images of another depth are never skipped."""
        name = printable(name)
        if isinstance(error, DepthError):  # nothing is wrong with it, and others will be like it
            raise InputError(f"{name}: {error}") from None
        if self.policy == "stop":
            or_skip = f", or set {self.skipping}" if self.skipping else ""
            raise InputError(
                f"{name}: cannot be read ({one_line(error)}); repair or delete it{or_skip}"
            ) from error
        self._count += 1
        logger.warning("skipped %s: cannot be read (%s); %d so far", name, one_line(error), self.count)
