"""The processes that load images."""

import os
import signal
from multiprocessing.synchronize import Event

GRACE_SECONDS = 30  # a loader's worker outlives a SIGTERM by this time


def leave_signals_to_the_trainer(closing: Event, worker_id: int) -> None:
    """Ignore signals to the process group, so that the trainer can finish its step and save.

    For a DataLoader's ``worker_init_fn``. Multiprocessing also ends workers by SIGTERM. So it works at once
    while the loader is ``closing``, and otherwise after GRACE_SECONDS.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0) if closing.is_set() else signal.alarm(GRACE_SECONDS))
    signal.signal(signal.SIGALRM, lambda *_: os._exit(0))
