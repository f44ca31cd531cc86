"""AP under common corruptions."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from detectron2.config import CfgNode

from rt_detectron.data.corruptions import (
    SEVERITIES,
    SMALLEST_SIDE,
    USUAL_SIDE,
    CorruptionMapper,
    corruption_names,
)
from rt_detectron.evaluation.robustness.evaluation import (
    Evaluation,
    Row,
    image_count,
    random_seed,
    register_evaluation,
    unique,
    with_earlier,
)
from rt_detectron.evaluation.robustness.measurement import Metrics, main_metric
from rt_detectron.evaluation.robustness.session import Session
from rt_detectron.utils.errors import InputError
from rt_detectron.utils.numbers import is_number

logger = logging.getLogger(__name__)


@register_evaluation
@dataclass(frozen=True)
class CorruptionEvaluation(Evaluation):
    """AP under each corruption at each severity, their mean mPC, and rPC, which is relative to the clean AP.

    Attributes:
        corruptions: pairs of name and severity, in the order of the results.
        max_images: the number of images, evenly spread over the test set; 0 is all.
        seed: of the corruptions' random numbers.
    """

    name = "corruption"
    keys: ClassVar[dict[str, str]] = {
        "TEST.CORRUPTION.NAMES \"['common']\"": "the 15 common corruptions; 'all' is 4 more; or names: 'fog'",
        'TEST.CORRUPTION.SEVERITIES "[1,2,3,4,5]"': "from 1, hardly visible, to 5",
        "TEST.CORRUPTION.MAX_IMAGES 100": "corrupt this many images only, for a quick look",
    }

    corruptions: tuple[tuple[str, int], ...]
    max_images: int = 0
    seed: int = 0

    @classmethod
    def from_config(cls, cfg: CfgNode) -> "CorruptionEvaluation":
        max_images = image_count(cfg, "TEST.CORRUPTION.MAX_IMAGES")
        return cls(tuple(_corruptions(cfg.TEST.CORRUPTION)), max_images, random_seed(cfg))

    @property
    def is_requested(self) -> bool:
        return bool(self.corruptions)

    def check(self, session: Session) -> None:
        if not self.corruptions:
            return
        images = session.images(self.max_images).dicts
        sized = [each for each in images if "width" in each and "height" in each]
        small = [each for each in sized if min(each["width"], each["height"]) < SMALLEST_SIDE]
        if small:
            raise InputError(
                f"{small[0]['file_name']}: {small[0]['width']} x {small[0]['height']} pixels are too few to "
                f"be corrupted, as in {len(small)} of {len(images)} images: leave out images with a side "
                f"shorter than {SMALLEST_SIDE} pixels"
            )
        sides = sorted(min(each["width"], each["height"]) for each in sized)
        if sides and sides[len(sides) // 2] < USUAL_SIDE:
            logger.warning(
                "Half of the images have a side of %d pixels or less: corruptions are meant for %d and more, "
                "and blurs take more away from small images; compare these numbers among themselves only",
                sides[len(sides) // 2], USUAL_SIDE,
            )  # fmt: skip

    def measure(self, session: Session) -> dict | None:
        if not self.corruptions:
            return None
        images = session.images(self.max_images)
        clean = session.clean(images)
        results: list[dict[str, Any]] = []
        for corruption, severity in self.corruptions:
            settings = {"corruption": corruption, "severity": severity}
            measured = session.measure(
                f"{corruption}-{severity}",
                images,
                settings={**settings, "seed": self.seed},
                clean=clean,
                mapper=CorruptionMapper(images.mapper, corruption, severity, self.seed),
                change=f"{corruption} {severity}".replace("_", " "),
            )
            results.append(
                {**settings, "requested": True, "metrics": measured.metrics, "matches": measured.matches}
            )
        mean, relative = performance_under_corruption(
            clean.metrics, [result["metrics"] for result in results]
        )
        return {
            "images": len(images.dicts),
            "seed": self.seed,
            "names": list(unique(result["corruption"] for result in results)),
            "severities": list(unique(result["severity"] for result in results)),
            "clean": clean.metrics,
            "clean_matches": clean.matches,
            "results": results,
            "mPC": mean,
            "rPC": relative,
        }

    @staticmethod
    def merged(earlier: dict | None, results: dict | None) -> dict | None:
        if earlier is None:
            return results
        same = ("images", "clean_matches", "seed")
        if results and any(earlier[key] != results[key] for key in same):  # other images
            return results
        new = results["results"] if results else []
        whole = with_earlier(earlier["results"], new, lambda each: (each["corruption"], each["severity"]))
        return {**(results or earlier), "results": whole}

    @staticmethod
    def rows(results: dict | None) -> Iterator[Row]:
        requested = [result for result in (results or {}).get("results", []) if result["requested"]]
        if results is None or not requested:
            return
        images = results["images"]
        yield Row("clean", images, results["clean"])
        for result in requested:
            yield Row(f"{result['corruption']} {result['severity']}", images, result["metrics"])
        for key, label in (("mPC", "mPC"), ("rPC", "rPC (%)")):
            yield Row(
                label, images, {task: {main_metric(task): value} for task, value in results[key].items()}
            )


def performance_under_corruption(
    clean: Metrics, results: Sequence[Metrics]
) -> tuple[dict[str, float | None], dict[str, float | None]]:
    """mPC, the mean AP over corruptions and severities, and rPC, mPC in percent of the clean AP, by task.

    For semantic and panoptic segmentation the same of mIoU and PQ. None where undefined. From Michaelis et
    al. (2019), https://arxiv.org/abs/1907.07484, equations 1 and 2.
    """
    mean: dict[str, Any] = {}
    relative: dict[str, Any] = {}
    for task, metrics in clean.items():
        metric = main_metric(task)
        clean_ap: Any = metrics.get(metric)
        aps: list[Any] = [result.get(task, {}).get(metric) for result in results]
        mean[task] = relative[task] = None
        if aps and all(map(is_number, [clean_ap, *aps])):
            mean[task] = sum(aps) / len(aps)
            relative[task] = 100 * mean[task] / clean_ap if clean_ap > 0 else None
    return mean, relative


def _corruptions(keys: CfgNode) -> Iterator[tuple[str, int]]:
    if not set(keys.SEVERITIES) <= set(SEVERITIES) or not keys.SEVERITIES:
        raise InputError(
            f"TEST.CORRUPTION.SEVERITIES is {list(keys.SEVERITIES)}; it takes some of {list(SEVERITIES)}"
        )
    try:
        names = corruption_names(keys.NAMES)
    except InputError as error:
        raise InputError(f"TEST.CORRUPTION.NAMES: {error}") from None
    for name in names:
        for severity in unique(keys.SEVERITIES):
            yield name, severity
