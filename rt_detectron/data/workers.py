"""The processes that load images."""

import functools
import multiprocessing
import os
import signal
from collections.abc import Iterator
from multiprocessing.synchronize import Event

import torch
from torch.utils.data import DataLoader, Dataset

GRACE_SECONDS = 30  # a loader's worker outlives a SIGTERM by this time


def training_batches(dataset: Dataset, **options) -> Iterator:
    """The batches of a DataLoader with these ``options``, whose workers leave signals to the trainer.

    Torch's global random numbers are left alone.
    """
    closing = multiprocessing.Event()
    worker_init = functools.partial(leave_signals_to_the_trainer, closing)
    generator = torch.Generator()  # or else it uses the global one
    try:
        yield from DataLoader(dataset, worker_init_fn=worker_init, generator=generator, **options)
    finally:
        closing.set()


def leave_signals_to_the_trainer(closing: Event, worker_id: int) -> None:
    """Ignore signals to the process group, so that the trainer can finish its step and save.

    For a DataLoader's ``worker_init_fn``. Multiprocessing also ends workers by SIGTERM. So it works at once
    while the loader is ``closing``, and otherwise after GRACE_SECONDS.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0) if closing.is_set() else signal.alarm(GRACE_SECONDS))
    signal.signal(signal.SIGALRM, lambda *_: os._exit(0))
