"""The signals that ask a training to stop."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn


class StopSignals:
    """Notes SIGTERM, which clusters send ahead of a preemption, and Ctrl-C, until the training can stop.

    A second Ctrl-C stops it at once.

    Attributes:
        received: the last such signal; None before the first.
    """

    def __init__(self):
        self.received: int | None = None
        self._stop_at_once = False

    @contextmanager
    def handled(self) -> Iterator[None]:
        """Within this, signals are noted instead of ending the process."""
        is_main = threading.current_thread() is threading.main_thread()  # which alone may handle signals
        signums = (signal.SIGTERM, signal.SIGINT) if is_main else ()
        previous = {signum: signal.signal(signum, self._handle) for signum in signums}
        try:
            yield
        finally:
            for signum, handler in previous.items():
                signal.signal(signum, handler)

    @contextmanager
    def stopping_at_once(self) -> Iterator[None]:
        """Within this, a signal raises at once what :meth:`stop` raises."""
        self._stop_at_once = True
        try:
            yield
        finally:
            self._stop_at_once = False

    def stop(self) -> NoReturn:
        """End the process: by KeyboardInterrupt after Ctrl-C, else with exit status 0."""
        if self.received == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(0)

    def _handle(self, signum, frame) -> None:
        is_second = self.received is not None and signum == signal.SIGINT
        self.received = signum
        if self._stop_at_once or is_second:
            self.stop()
