"""The interface of evaluations of a trained detector, and which of them there are."""

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, NamedTuple

from detectron2.config import CfgNode

from rt_detectron.evaluation.robustness.measurement import Metrics
from rt_detectron.evaluation.robustness.session import Session
from rt_detectron.utils.errors import InputError

EVALUATIONS: dict[str, type["Evaluation"]] = {}  # by name, in the order of robustness.json and of the table


class Row(NamedTuple):
    """A row of the printed table: its label, the number of images, and metrics, of which AP is shown.

    An attack's has its cost for an image, too: "forward" and "backward" passes of the detector.
    """

    label: str
    images: int
    metrics: Metrics
    passes: dict[str, int] | None = None


class Evaluation(ABC):
    """One way to evaluate a detector: on clean, attacked or corrupted images.

    To add one, derive from this class in a new file of this package, decorate it with
    :func:`register_evaluation`, and add its keys to :mod:`rt_detectron.config`. A study reads its results by
    a class in :mod:`rt_detectron.study.evaluations`.

    Attributes:
        name: the key of its results in robustness.json.
        keys: what ``--help`` says of its config keys, by key with an example value. The first one asks for
            this evaluation.
    """

    name: ClassVar[str]
    keys: ClassVar[dict[str, str]] = {}

    @classmethod
    @abstractmethod
    def from_config(cls, cfg: CfgNode) -> "Evaluation":
        """What the config asks for.

        Raises:
            InputError: for a value that makes no sense, naming its key.
        """

    @property
    @abstractmethod
    def is_requested(self) -> bool:
        """Whether the config asks for anything that is not always measured."""

    def check(self, session: Session) -> None:
        """Called before anything is measured.

        Raises:
            InputError: if this evaluation would stop at the detector or at an image of the test set.
        """
        return

    @abstractmethod
    def measure(self, session: Session) -> Any:
        """Measure everything that is requested. Return the results for robustness.json."""

    @staticmethod
    def merged(earlier: Any, results: Any) -> Any:
        """``results`` and what an earlier run measured of the same detector, which has not been asked for.

        Args:
            earlier: its results in the robustness.json that is there already.
            results: what :meth:`measure` returned.
        """
        return results

    @staticmethod
    def remarks(results: Any) -> Iterator[str]:
        """Lines below the table, such as checks of the results; "error: ..." for one that says: no use."""
        return iter(())

    @staticmethod
    @abstractmethod
    def rows(results: Any) -> Iterator[Row]:
        """The table's rows, from what :meth:`measure` returned."""


def register_evaluation(evaluation: type[Evaluation]) -> type[Evaluation]:
    """Class decorator: the evaluation becomes part of every :func:`evaluate_robustness`."""
    EVALUATIONS[evaluation.name] = evaluation
    return evaluation


def robustness_evaluations(cfg: CfgNode) -> list[Evaluation]:
    """All registered evaluations with the settings of ``cfg``, checked.

    Raises:
        InputError: for a value that makes no sense, naming its key, or if nothing is requested.
    """
    if len(cfg.DATASETS.TEST) != 1:
        raise InputError(f"DATASETS.TEST has {len(cfg.DATASETS.TEST)} sets; robustness is measured on one")
    image_count(cfg, "TEST.PICTURES")
    image_count(cfg, "TEST.ATTACK.IMS_PER_BATCH", least=1)
    evaluations = [evaluation.from_config(cfg) for evaluation in EVALUATIONS.values()]
    if not any(evaluation.is_requested for evaluation in evaluations):
        examples = [next(iter(evaluation.keys)) for evaluation in evaluations if evaluation.keys]
        raise InputError(f"nothing to evaluate: set {' or '.join(examples)}")
    return evaluations


def image_count(cfg: CfgNode, key: str, least: int = 0) -> int:
    """The value of ``key``, a number of images.

    Raises:
        InputError: if it is less than ``least``.
    """
    value = functools.reduce(getattr, key.split("."), cfg)
    if value < least:
        raise InputError(f"{key} is {value}; it must be >= {least}")
    return value


def random_seed(cfg: CfgNode) -> int:
    """SEED, or 0 for Detectron2's -1, which means any seed."""
    return max(cfg.SEED, 0)


def unique(values) -> tuple:
    """Each value once, in the same order."""
    return tuple(dict.fromkeys(values))


def with_earlier(earlier: list[dict], results: list[dict], what: Callable[[dict], Any]) -> list[dict]:
    """``results``, and what an earlier run measured beside them, as not requested.

    Args:
        what: tells what was measured, from a result.
    """
    measured = [what(result) for result in results]
    return results + [{**one, "requested": False} for one in earlier if what(one) not in measured]
