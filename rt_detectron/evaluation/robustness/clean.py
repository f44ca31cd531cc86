"""AP on the unchanged test set."""

from collections.abc import Iterator

from detectron2.config import CfgNode

from rt_detectron.evaluation.robustness.evaluation import Evaluation, Row, register_evaluation
from rt_detectron.evaluation.robustness.session import Session


@register_evaluation
class CleanEvaluation(Evaluation):
    """AP on the whole test set without any change. It is always measured."""

    name = "clean"

    @classmethod
    def from_config(cls, cfg: CfgNode) -> "CleanEvaluation":
        return cls()

    @property
    def is_requested(self) -> bool:
        return False

    def measure(self, session: Session) -> dict:
        clean = session.clean(session.test_set)
        images = len(session.test_set.dicts)
        return {"images": images, "metrics": clean.metrics, "matches": clean.matches}

    @staticmethod
    def rows(results: dict) -> Iterator[Row]:
        yield Row("clean", results["images"], results["metrics"])
