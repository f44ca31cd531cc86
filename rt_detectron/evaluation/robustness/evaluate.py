"""What tools/evaluate_robustness.py runs: AP clean, under attack and under corruption, as the config asks."""

import json
import logging
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial

from detectron2.config import CfgNode
from detectron2.data import DatasetMapper, MetadataCatalog, get_detection_dataset_dicts
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager
from tabulate import tabulate
from torch import nn

from rt_detectron.attacks import DetectorAttack, RandomNoise
from rt_detectron.data.corruptions import CorruptionMapper
from rt_detectron.evaluation.build import build_evaluator
from rt_detectron.evaluation.results import config_sha256, provenance
from rt_detectron.evaluation.robustness.images import (
    Metrics,
    TestImages,
    annotated_test_mapper,
    evaluate_under_attack,
    evaluate_under_corruption,
    performance_under_corruption,
    spread,
)
from rt_detectron.evaluation.robustness.pictures import BeforeAfter
from rt_detectron.evaluation.robustness.plan import robustness_plan
from rt_detectron.utils.files import file_sha256, finite, write_json

logger = logging.getLogger(__name__)

NORMS = {"l2": "L2", "linf": "Linf"}


def evaluate_robustness(cfg: CfgNode, model: nn.Module, resume: bool = False) -> dict:
    """Measure all that ``cfg`` asks for and write ``OUTPUT_DIR/robustness.json``.

    All else goes to ``OUTPUT_DIR/robustness``: the clean predictions, pictures, and what was measured so far.

    Args:
        cfg: read with :func:`rt_detectron.detection.load_detector_config`.
        model: the detector with its weights, on its device.
        resume: measure only what an earlier, interrupted run with the same config and weights did not.

    Returns:
        In the first process the content of the file, in the others {}.
    """
    path = os.path.join(cfg.OUTPUT_DIR, "robustness.json")
    if comm.is_main_process() and os.path.isfile(path):
        os.remove(path)  # there is one only of a finished evaluation
    evaluation = _Evaluation(cfg, model)
    if resume:
        evaluation.progress.resume()
    content = evaluation.run()
    if not comm.is_main_process():
        return {}
    write_json(path, content)
    return content


class _Evaluation:
    """What the settings of one :func:`evaluate_robustness` share."""

    def __init__(self, cfg: CfgNode, model: nn.Module):
        self.cfg, self.model = cfg, model
        self.plan = robustness_plan(cfg)
        self.folder = robustness_config(cfg).OUTPUT_DIR
        os.makedirs(self.folder, exist_ok=True)
        (self.dataset,) = cfg.DATASETS.TEST
        dicts = get_detection_dataset_dicts(
            self.dataset,
            filter_empty=False,
            proposal_files=cfg.DATASETS.PROPOSAL_FILES_TEST if cfg.MODEL.LOAD_PROPOSALS else None,
        )
        self.mapper = DatasetMapper(cfg, is_train=False)
        self.images = TestImages(
            dicts,
            build_evaluator(robustness_config(cfg), self.dataset),
            self.mapper,
            num_workers=cfg.DATALOADER.NUM_WORKERS,
        )
        self.progress = Progress(os.path.join(self.folder, "progress.json"), _identity(cfg))

    def run(self) -> dict:
        """The content of robustness.json."""
        clean = self._clean(self.images)
        # Predictions on changed images are as many as there are settings: they are not kept.
        with tempfile.TemporaryDirectory() as folder:
            evaluator = build_evaluator(self.cfg, self.dataset, folder)
            changed = replace(self.images, evaluator=evaluator)
            attacked = self._attack(changed.spread(self.cfg.TEST.ATTACK.MAX_IMAGES))
            corrupted = self._corrupt(changed.spread(self.cfg.TEST.CORRUPTION.MAX_IMAGES))
        return {
            "clean": {"images": len(self.images.dicts), "metrics": clean},
            "attack": attacked,
            "corruption": corrupted,
            "pictures": [
                picture for found in self.progress.measured.values() for picture in found["pictures"]
            ],
            **provenance(robustness_config(self.cfg), self.progress.wall_time_s),
        }

    def _clean(self, images: TestImages) -> Metrics:
        return self._measure(f"clean-{len(images.dicts)}", partial(images.evaluate, self.model, "clean"))

    def _attack(self, images: TestImages) -> list[dict]:
        if not self.plan.attacks:
            return []
        clean = self._clean(images)
        images = replace(images, mapper=annotated_test_mapper(self.cfg))
        return [self._attack_entry(images, clean, attack) for attack in self.plan.attacks]

    def _attack_entry(self, images: TestImages, clean: Metrics, attack: DetectorAttack) -> dict:
        ball = attack.pgd.threat_model
        noise = None
        if self.cfg.TEST.ATTACK.NOISE:  # for each ball once, whatever the loss
            name = f"noise-{ball.norm}-{ball.eps:g}"
            measure = partial(
                evaluate_under_attack, self.model, images, RandomNoise(ball, attack.seed), clean, name
            )
            noise = self._measure(name, measure)
        name = f"attack-{ball.norm}-{ball.eps:g}" + (f"-{attack.loss}" if attack.loss != "all" else "")
        measure = partial(evaluate_under_attack, self.model, images, attack, clean, name)
        watch = self._watch(images, name, f"attacked, {NORMS[ball.norm]} eps {ball.eps:g}", perturbation=True)
        return {
            "norm": ball.norm,
            "eps": ball.eps,
            "loss": attack.loss,
            "steps": attack.pgd.steps,
            "restarts": attack.pgd.restarts,
            "images": len(images.dicts),
            "metrics": self._measure(name, measure, watch),
            "clean": clean,
            "noise": noise,
        }

    def _corrupt(self, images: TestImages) -> dict | None:
        if not self.plan.corruptions:
            return None
        clean = self._clean(images)
        results = []
        for corruption, severity in self.plan.corruptions:
            mapper = CorruptionMapper(self.mapper, corruption, severity, self.plan.seed)
            name = f"{corruption}-{severity}"
            measure = partial(evaluate_under_corruption, self.model, images, mapper, clean, name)
            watch = self._watch(images, name, f"{corruption} {severity}".replace("_", " "))
            metrics = self._measure(name, measure, watch)
            results.append({"corruption": corruption, "severity": severity, "metrics": metrics})
        mean, relative = performance_under_corruption(clean, [result["metrics"] for result in results])
        return {
            "images": len(images.dicts),
            "names": list(dict.fromkeys(result["corruption"] for result in results)),
            "severities": list(dict.fromkeys(result["severity"] for result in results)),
            "clean": clean,
            "results": results,
            "mPC": mean,
            "rPC": relative,
        }

    def _watch(
        self, images: TestImages, name: str, change: str, perturbation: bool = False
    ) -> BeforeAfter | None:
        if not self.cfg.TEST.PICTURES:
            return None
        return BeforeAfter(
            self.model,
            spread(images.dicts, self.cfg.TEST.PICTURES),
            self.mapper,
            self.cfg.INPUT.FORMAT,
            MetadataCatalog.get(self.dataset).thing_classes,
            os.path.join(self.folder, name),
            change,
            perturbation,
        )

    def _measure(
        self, name: str, measure: Callable[..., Metrics], watch: BeforeAfter | None = None
    ) -> Metrics:
        """What ``measure`` gives, or gave in an earlier run; the pictures of ``watch`` are kept with it."""

        def found() -> dict:
            metrics = finite(measure(watch=watch))
            for task, values in metrics.items():
                logger.info("%s: %s AP %s", name, task, _number(values.get("AP")))
            saved = comm.gather(watch.saved) if watch else []
            pictures = [
                {**picture, "file": os.path.relpath(picture["file"], self.cfg.OUTPUT_DIR)}
                for part in saved
                for picture in part
            ]
            return {"metrics": metrics, "pictures": pictures}

        return self.progress.get(name, found)["metrics"]


def robustness_config(cfg: CfgNode) -> CfgNode:
    """``cfg`` with the folder of its own that all files of the evaluation but the last go to.

    So a training's config, log and predictions, which may lie in OUTPUT_DIR, stay as they are.
    """
    cfg = cfg.clone()
    cfg.defrost()
    cfg.OUTPUT_DIR = os.path.join(cfg.OUTPUT_DIR, "robustness")
    cfg.freeze()
    return cfg


def _identity(cfg: CfgNode) -> dict[str, str | None]:
    weights = cfg.MODEL.WEIGHTS and PathManager.get_local_path(cfg.MODEL.WEIGHTS)
    return {"config_sha256": config_sha256(cfg), "weights_sha256": file_sha256(weights) if weights else None}


def robustness_table(content: dict) -> str:
    """The AP in ``content`` of robustness.json, as lines of text."""
    tasks = list(content["clean"]["metrics"])
    rows = [_row("clean", content["clean"], tasks)]
    for entry in content["attack"]:
        ball = f"{NORMS[entry['norm']]} eps {entry['eps']:g}"
        rows.append(_row("clean", {**entry, "metrics": entry["clean"]}, tasks))
        if entry["noise"] is not None:
            rows.append(_row(f"{ball}, random noise", {**entry, "metrics": entry["noise"]}, tasks))
        rows.append(_row(f"{ball}, {entry['loss']}", entry, tasks))
    if content["corruption"] is not None:
        corruption = content["corruption"]
        rows.append(_row("clean", {**corruption, "metrics": corruption["clean"]}, tasks))
        for result in corruption["results"]:
            rows.append(_row(f"{result['corruption']} {result['severity']}", {**corruption, **result}, tasks))
        for key, label in (("mPC", "mPC"), ("rPC", "rPC (%)")):
            cells = (_number(corruption[key].get(task)) for task in tasks)
            rows.append((label, corruption["images"], *cells))
    rows = list(dict.fromkeys(rows))  # attacks with several losses share their noise
    names = {"bbox": "box AP", "segm": "mask AP", "keypoints": "keypoint AP"}
    return tabulate(rows, ["", "images", *(names.get(task, task) for task in tasks)], disable_numparse=True)


def _row(label: str, entry: dict, tasks: list[str]) -> tuple:
    cells = (_number(entry["metrics"].get(task, {}).get("AP")) for task in tasks)
    return (label, entry["images"], *cells)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


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
