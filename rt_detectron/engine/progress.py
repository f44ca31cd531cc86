"""What a long evaluation has measured so far."""

import json
import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from detectron2.utils import comm

from rt_detectron.utils.files import write_json

logger = logging.getLogger(__name__)


@dataclass
class Progress:
    """What was measured so far, kept in a file, so that an interrupted evaluation goes on.

    Attributes:
        path: of the file.
        identity: of what is measured: results of another are not taken over.
        measured: by the name of what was measured.
        seconds: that earlier runs took.
    """

    path: str
    identity: dict[str, str | None]
    measured: dict[str, dict] = field(default_factory=dict)
    seconds: float = 0.0
    start: float = field(default_factory=time.perf_counter)

    def resume(self) -> None:
        """Take over what the file holds, in all processes what the first finds."""
        found = None
        if comm.is_main_process() and os.path.isfile(self.path):
            with open(self.path) as file:
                found = json.load(file)
            if found["identity"] != self.identity:
                logger.warning("%s is of another config or of other weights: all is measured anew", self.path)
                found = None
        found = comm.all_gather(found)[0]
        if found is not None:
            self.measured, self.seconds = found["measured"], found["seconds"]

    def get(self, name: str, measure: Callable[[], dict]) -> dict:
        """What ``measure`` gives, measured at most once; it is the first process' that counts."""
        if name not in self.measured:
            self.measured[name] = measure()
            if comm.is_main_process():
                content = {
                    "identity": self.identity,
                    "seconds": self.wall_time_s,
                    "measured": self.measured,
                }
                write_json(self.path, content)
        return self.measured[name]

    @property
    def wall_time_s(self) -> float:
        return self.seconds + time.perf_counter() - self.start
