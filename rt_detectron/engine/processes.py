"""What the processes of one training agree on: decisions, and the weights that they start from."""

import datetime
import functools
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from detectron2.engine import HookBase
from detectron2.utils import comm
from torch import distributed, nn

LONG = datetime.timedelta(days=30)  # a process that dies ends the others long before, through its connections


def patient_group() -> "distributed.ProcessGroup | None":
    """All processes, for collectives before which one of them may work for hours longer than another.

    Detectron2's own groups give up after half an hour. None if there is one process. Call it in all of them
    at a time.
    """
    return _patient_group() if comm.get_world_size() > 1 else None


@functools.cache
def _patient_group() -> "distributed.ProcessGroup":
    return distributed.new_group(backend="gloo", timeout=LONG)


class Agreement:
    """Lets all processes take the same decision. Make it in all of them."""

    def __init__(self):
        self._group = distributed.new_group(backend="gloo") if comm.get_world_size() > 1 else None

    def any(self, *flags: bool) -> list[bool]:
        """Of each flag, whether it is set in any process."""
        if self._group is None:
            return list(flags)
        agreed = torch.tensor(flags, dtype=torch.uint8)
        distributed.all_reduce(agreed, distributed.ReduceOp.MAX, group=self._group)
        return agreed.bool().tolist()


@torch.no_grad()
def share_state(model: nn.Module) -> None:
    """Give every process the first one's parameters and buffers. Call it in all processes."""
    for parameter in model.parameters() if comm.get_world_size() > 1 else ():
        distributed.broadcast(parameter, 0)
    share_buffers(model)


@torch.no_grad()
def share_buffers(model: nn.Module) -> None:
    """Give every process the first one's buffers, such as batch norm's statistics, which it saves.

    Each process has seen other images, and so has statistics of its own. Call it in all processes.
    """
    for buffer in model.buffers() if comm.get_world_size() > 1 else ():
        distributed.broadcast(buffer, 0)


@contextmanager
def first_ones_buffers(model: nn.Module) -> Iterator[None]:
    """Within this, every process has the first one's buffers; afterwards its own again.

    So a training that is resumed after the evaluation goes on as one that was not interrupted.
    """
    is_alone = comm.get_world_size() == 1
    own = [] if is_alone else [buffer.clone() for buffer in model.buffers()]
    share_buffers(model)
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in zip(() if is_alone else model.buffers(), own, strict=True):
                buffer.copy_(value)


class SameStart(HookBase):
    """All processes start from the first one's weights.

    Elsewhere weights may differ: layers without pretrained ones are initialised at random, and a file's copy
    on another machine may be old.
    """

    def __init__(self, *models: nn.Module):
        self.models = models

    def before_train(self):
        for model in self.models:
            share_state(model)
