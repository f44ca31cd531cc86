"""What the evaluations of one run share, and a record of it that survives an interruption."""

import json
import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from detectron2.config import CfgNode
from detectron2.data import DatasetMapper, MetadataCatalog
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager
from torch import nn

from rt_detectron.data import load_test_set
from rt_detectron.evaluation.build import build_evaluator
from rt_detectron.evaluation.results import config_sha256
from rt_detectron.evaluation.robustness.pictures import BeforeAfter
from rt_detectron.evaluation.robustness.test_set import DetectionTestSet, Metrics, spread
from rt_detectron.utils.files import file_sha256, write_json
from rt_detectron.utils.numbers import finite

logger = logging.getLogger(__name__)


def robustness_config(cfg: CfgNode) -> CfgNode:
    """``cfg`` with OUTPUT_DIR/robustness as its folder, where all files but robustness.json go.

    OUTPUT_DIR may be a training's: its config, log and predictions stay as they are.
    """
    cfg = cfg.clone()
    cfg.defrost()
    cfg.OUTPUT_DIR = os.path.join(cfg.OUTPUT_DIR, "robustness")
    cfg.freeze()
    return cfg


class Session:
    """A detector, its test set, and what was measured so far.

    Args:
        cfg: the config; DATASETS.TEST has one set.
        model: the detector with its weights, on its device.
        scratch: a folder for the predictions on changed images. There are as many as there are settings, so
            they are not kept.

    Attributes:
        test_set: the whole test set. Its predictions are kept in OUTPUT_DIR/robustness.
        progress: the record of what was measured.
    """

    def __init__(self, cfg: CfgNode, model: nn.Module, scratch: str):
        self.cfg = cfg
        self.model = model
        own = robustness_config(cfg)
        self.folder = own.OUTPUT_DIR
        os.makedirs(self.folder, exist_ok=True)
        (self.dataset,) = cfg.DATASETS.TEST
        attacked = bool(cfg.TEST.ATTACK.L2_EPS or cfg.TEST.ATTACK.LINF_EPS)
        dicts = load_test_set(cfg, self.dataset, with_objects=attacked)
        self.test_set = DetectionTestSet(
            dicts,
            build_evaluator(own, self.dataset),
            DatasetMapper(cfg, is_train=False),
            num_workers=cfg.DATALOADER.NUM_WORKERS,
        )
        self._changed = replace(self.test_set, evaluator=build_evaluator(cfg, self.dataset, scratch))
        self.progress = Progress(os.path.join(self.folder, "progress.json"), _identity(cfg))

    def images(self, max_images: int = 0) -> DetectionTestSet:
        """Images to change: so many of the test set, evenly spread, or all for 0.

        Raises:
            InputError: if the test set's evaluator cannot score a part of it.
        """
        return self._changed.spread(max_images)

    def clean(self, images: DetectionTestSet) -> Metrics:
        """AP on these images as they are."""
        return self.measure(f"clean-{len(images.dicts)}", images)

    def measure(
        self,
        name: str,
        images: DetectionTestSet,
        *,
        clean: Metrics | None = None,
        perturb: Callable[[nn.Module, list[dict]], list[dict]] | None = None,
        mapper: Callable[[dict], dict] | None = None,
        change: str = "",
    ) -> Metrics:
        """The detector's AP, measured at most once for each name, also after an interruption.

        Args:
            name: of this measurement, unique; its pictures' names begin with it.
            images, clean, perturb, mapper: see :meth:`DetectionTestSet.evaluate`.
            change: what happened to the images, such as "fog 3". If given, TEST.PICTURES pictures are saved.

        Returns:
            In the first process task -> metric -> percent, None where undefined. In the others {}.
        """

        def found() -> dict:
            pictures = self._pictures(name, images, change, perturb) if change else None
            metrics = finite(
                images.evaluate(self.model, name, perturb=perturb, mapper=mapper, clean=clean, watch=pictures)
            )
            for task, values in metrics.items():
                logger.info("%s: %s AP %s", name, task, values.get("AP"))
            return {"metrics": metrics, "pictures": self._saved(pictures)}

        return self.progress.get(name, found)["metrics"]

    @property
    def pictures(self) -> list[dict[str, str]]:
        """All pictures in the order of the measurements: "file", relative to OUTPUT_DIR, and "caption"."""
        return [picture for found in self.progress.measured.values() for picture in found["pictures"]]

    def _pictures(
        self, name: str, images: DetectionTestSet, change: str, perturb: Callable | None
    ) -> BeforeAfter | None:
        if not self.cfg.TEST.PICTURES:
            return None
        return BeforeAfter(
            self.model,
            spread(images.dicts, self.cfg.TEST.PICTURES),
            self.test_set.mapper,
            self.cfg.INPUT.FORMAT,
            MetadataCatalog.get(self.dataset).thing_classes,
            os.path.join(self.folder, name),
            change,
            perturbation=perturb is not None,
        )

    def _saved(self, pictures: BeforeAfter | None) -> list[dict[str, str]]:
        """What all processes saved, with paths relative to OUTPUT_DIR."""
        saved = comm.gather(pictures.saved) if pictures else []
        return [
            {**picture, "file": os.path.relpath(picture["file"], self.cfg.OUTPUT_DIR)}
            for part in saved
            for picture in part
        ]


@dataclass
class Progress:
    """What was measured so far, kept in a file, so that an interrupted run can go on.

    Attributes:
        path: of the file.
        identity: of config and weights; the results of others are not taken over.
        measured: "metrics" and "pictures", by the measurement's name.
        seconds: the time of earlier runs.
    """

    path: str
    identity: dict[str, str | None]
    measured: dict[str, dict] = field(default_factory=dict)
    seconds: float = 0.0
    start: float = field(default_factory=time.perf_counter)

    def resume(self) -> None:
        """Load the file; all processes take over what the first one finds."""
        found = None
        if comm.is_main_process() and os.path.isfile(self.path):
            with open(self.path) as file:
                found = json.load(file)
            if found["identity"] != self.identity:
                logger.warning("%s is of another config or weights: everything is measured again", self.path)
                found = None
        found = comm.all_gather(found)[0]
        if found is not None:
            self.measured, self.seconds = found["measured"], found["seconds"]

    def get(self, name: str, measure: Callable[[], dict]) -> dict:
        """The result of ``measure``, called at most once for each name. The first process's counts."""
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


def _identity(cfg: CfgNode) -> dict[str, str | None]:
    weights = cfg.MODEL.WEIGHTS and PathManager.get_local_path(cfg.MODEL.WEIGHTS)
    return {"config_sha256": config_sha256(cfg), "weights_sha256": file_sha256(weights) if weights else None}
