"""Collectives before which one process may work for hours longer than another."""

import datetime
import functools

from detectron2.utils import comm
from torch import distributed

LONG = datetime.timedelta(days=30)  # a process that dies ends the others long before, through its connections


def patient_group() -> "distributed.ProcessGroup | None":
    """All processes, for Detectron2's ``comm``; None if there is one. Call it in all of them at a time.

    Detectron2's own groups give up after half an hour.
    """
    return _patient_group() if comm.get_world_size() > 1 else None


@functools.cache
def _patient_group() -> "distributed.ProcessGroup":
    return distributed.new_group(backend="gloo", timeout=LONG)
