"""The files of a study's trials: what was asked for, what came of it, and who holds the folder."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rt_detectron.study.grid import Trial


@dataclass(frozen=True)
class Outcome:
    """A trial and what came of it.

    Attributes:
        results: its results.json; None if it did not finish.
        robustness: its robustness.json; None if the study asks for no evaluation or it did not finish.
        error: why it did not finish.
    """

    trial: Trial
    folder: Path
    results: dict[str, Any] | None
    robustness: dict[str, Any] | None = None
    error: str | None = None
