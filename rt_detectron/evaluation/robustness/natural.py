"""Box AP under natural shifts: on other images of the same classes, such as drawings."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from detectron2.config import CfgNode

from rt_detectron.data import check_datasets, load_test_set
from rt_detectron.data.coco_o import KEPT, SETS, effective_robustness
from rt_detectron.evaluation.coco import COCOEvaluator
from rt_detectron.evaluation.robustness.evaluation import (
    Evaluation,
    Row,
    register_evaluation,
    unique,
    with_earlier,
)
from rt_detectron.evaluation.robustness.session import Session
from rt_detectron.utils.errors import InputError
from rt_detectron.utils.numbers import is_number

COCO = "coco_2017_val"


@register_evaluation
@dataclass(frozen=True)
class NaturalEvaluation(Evaluation):
    """Box AP on each of several test sets, and their mean.

    On all of COCO-O also its effective robustness, if the test set is the one that it is defined on.

    Attributes:
        names: of the test sets.
    """

    name = "natural"
    keys: ClassVar[dict[str, str]] = {
        "TEST.NATURAL \"['coco_o']\"": "also box AP on COCO-O's six domains, or on test sets by name"
    }

    names: tuple[str, ...]

    @classmethod
    def from_config(cls, cfg: CfgNode) -> "NaturalEvaluation":
        named = cfg.TEST.NATURAL
        if not isinstance(named, list | tuple) or not all(isinstance(name, str) for name in named):
            raise InputError(f"TEST.NATURAL is {named!r}; it must be names of test sets, such as ('coco_o',)")
        names = unique(each for name in named for each in (SETS if name == "coco_o" else (name,)))
        check_datasets(names)
        return cls(names)

    @property
    def is_requested(self) -> bool:
        return bool(self.names)

    def check(self, session: Session) -> None:
        for name in self.names:
            load_test_set(session.cfg, name)

    def measure(self, session: Session) -> dict[str, Any] | None:
        if not self.names:
            return None
        results: list[dict[str, Any]] = []
        for name in self.names:
            other = session.on(name)
            images = other.images()
            if not isinstance(images.evaluator, COCOEvaluator):
                raise InputError(f"TEST.NATURAL: {name} is not evaluated as COCO is, by box AP")
            images.evaluator._tasks = ["bbox"]  # all that COCO-O has annotations of
            measured = other.measure(f"natural-{name}", images, settings={"tasks": ["bbox"]})
            result = {
                "dataset": name,
                "requested": True,
                "images": len(images.dicts),
                "of_coco_o": name in SETS,
            }
            results.append({**result, "metrics": measured.metrics, "matches": measured.matches})
        aps = {result["dataset"]: _box_ap(result["metrics"]) for result in results}
        score = None
        if session.dataset == COCO and set(SETS) <= aps.keys():
            clean = _box_ap(session.clean(session.test_set).metrics)
            score = effective_robustness([aps[name] for name in SETS], clean)
        mean = sum(aps.values()) / len(aps)
        return {"results": results, "mean": mean, "effective_robustness": score, "coco_kept": KEPT}

    @staticmethod
    def merged(earlier: dict | None, results: dict | None) -> dict | None:
        if earlier is None:
            return results
        new = results["results"] if results else []
        whole = with_earlier(earlier["results"], new, lambda result: result["dataset"])
        return {**(results or earlier), "results": whole}

    @staticmethod
    def rows(results: dict | None) -> Iterator[Row]:
        requested = [result for result in (results or {}).get("results", ()) if result["requested"]]
        for result in requested:
            yield Row(result["dataset"], result["images"], result["metrics"])
        if results is not None and len(requested) > 1:
            images = sum(result["images"] for result in requested)
            yield Row("natural shifts, mean", images, {"bbox": {"AP": results["mean"]}})
            if results["effective_robustness"] is not None:
                score = {"bbox": {"AP": results["effective_robustness"]}}
                yield Row("effective robustness", images, score)


def _box_ap(metrics: dict[str, dict[str, Any]]) -> float:
    """0 where nothing at all was detected, for which evaluators give no AP."""
    value: Any = metrics.get("bbox", {}).get("AP")
    return value if is_number(value) else 0.0
