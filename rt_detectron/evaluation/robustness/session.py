"""What the evaluations of one run share. Each measurement is made once, also over several runs."""

import logging
import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetMapper, MetadataCatalog
from detectron2.utils import comm
from torch import nn

from rt_detectron.attacks.detection import detect
from rt_detectron.data import load_test_set
from rt_detectron.evaluation.build import build_evaluator, inference_folder, parts_of
from rt_detectron.evaluation.coco import metrics_of
from rt_detectron.evaluation.counts import CountingEvaluator, image_id
from rt_detectron.evaluation.matching import read_matches, write_matches
from rt_detectron.evaluation.robustness.identity import detector_identity, weights_sha256
from rt_detectron.evaluation.robustness.measurement import (
    ImageByImage,
    Measured,
    Metrics,
    digest,
    from_main,
    main_metric,
    read_result,
    summary,
    wait_for_all,
    write_result,
)
from rt_detectron.evaluation.robustness.pictures import BeforeAfter
from rt_detectron.evaluation.robustness.protocols import OURS
from rt_detectron.evaluation.robustness.test_set import (
    DetectionTestSet,
    Perturb,
    spread,
    with_image_ids,
)
from rt_detectron.evaluation.robustness.worst import worst_case, worst_counts
from rt_detectron.evaluation.sem_seg import read_labels
from rt_detectron.utils.errors import InputError
from rt_detectron.utils.files import read_json, write_json
from rt_detectron.utils.modes import eval_mode
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
    """A detector, its test set, and what was measured of them.

    Args:
        cfg: the config; DATASETS.TEST has one set.
        model: the detector with its weights, on its device.
        scratch: a folder for the predictions on changed images. There are as many as there are settings, so
            only what was matched is kept of them.
        surrogate: another detector, whose attacks are tried on this one.

    Attributes:
        test_set: the whole test set. Its predictions are kept in OUTPUT_DIR/robustness.
        identity: of the detector and its test set, see :func:`detector_identity`.
        pictures: in the order of the measurements: "file", relative to OUTPUT_DIR, and "caption".
        seconds: how long the measurements took, those of earlier runs included.
    """

    def __init__(self, cfg: CfgNode, model: nn.Module, scratch: str, surrogate: nn.Module | None = None):
        self.cfg = cfg
        self.model = model
        self.surrogate = surrogate
        own = robustness_config(cfg)
        self.folder = own.OUTPUT_DIR
        os.makedirs(self.folder, exist_ok=True)
        (self.dataset,) = cfg.DATASETS.TEST
        keys = cfg.TEST.ATTACK
        attacked = bool(keys.L2_EPS or keys.LINF_EPS or keys.PROTOCOL != OURS)
        dicts = with_image_ids(load_test_set(cfg, self.dataset, with_objects=attacked))
        self.test_set = DetectionTestSet(
            dicts,
            build_evaluator(own, self.dataset),
            DatasetMapper(cfg, is_train=False),
            num_workers=cfg.DATALOADER.NUM_WORKERS,
            folder=inference_folder(own, self.dataset),
            batch_size=cfg.TEST.ATTACK.IMS_PER_BATCH,
        )
        self.test_set.keep_matches()
        self._changed = replace(
            self.test_set, evaluator=build_evaluator(cfg, self.dataset, scratch), folder=scratch
        )
        self._changed.keep_matches()
        self.identity = from_main(detector_identity(cfg, model, dicts) if comm.is_main_process() else None)
        self.surrogate_sha256 = surrogate and weights_sha256(surrogate)
        if self.surrogate_sha256 == self.identity["weights_sha256"]:
            logger.warning(
                "TEST.ATTACK.SURROGATE has the weights of MODEL.WEIGHTS: an attack is no transfer there"
            )
        self.pictures: list[dict[str, str]] = []
        self._measured: dict[str, Measured] = {}

    @property
    def seconds(self) -> float:
        return sum(measured.seconds for measured in self._measured.values())

    def on(self, dataset: str) -> "Session":
        """The same detector on another test set; what is measured there counts here, too."""
        cfg = self.cfg.clone()
        cfg.defrost()
        cfg.DATASETS.TEST = (dataset,)
        other = Session(cfg, self.model, self._changed.folder, self.surrogate)
        other._measured = self._measured
        return other

    def images(self, max_images: int = 0) -> DetectionTestSet:
        """Images to change: so many of the test set, evenly spread, or all for 0.

        Raises:
            InputError: if the test set's evaluator cannot score a part of it.
        """
        return self._changed.spread(max_images)

    def object_counts(self) -> tuple[int, ...]:
        """The number of objects of each class in the test set, crowd regions left out."""
        counts = [0] * len(MetadataCatalog.get(self.dataset).thing_classes)
        for each in self.test_set.dicts:
            for annotation in each.get("annotations", ()):
                counts[annotation["category_id"]] += not annotation.get("iscrowd", 0)
        return tuple(counts)

    def pixel_counts(self) -> tuple[int, ...]:
        """The number of pixels of each class of the test set's semantic segmentation."""
        metadata = MetadataCatalog.get(self.dataset)
        classes = len(metadata.stuff_classes)
        total = np.zeros(classes, np.int64)
        for each in self.test_set.dicts:
            labels = read_labels(each["sem_seg_file_name"])
            labels = labels[(labels != metadata.ignore_label) & (labels >= 0) & (labels < classes)]
            total += np.bincount(labels, minlength=classes)
        return tuple(total.tolist())

    def clean(self, images: DetectionTestSet) -> Measured:
        """AP on these images as they are."""
        return self.measure(f"clean-{len(images.dicts)}", images)

    def measure(
        self,
        name: str,
        images: DetectionTestSet,
        *,
        settings: dict[str, Any] | None = None,
        clean: Measured | None = None,
        perturb: Perturb | None = None,
        mapper: Callable[[dict], dict] | None = None,
        change: str = "",
    ) -> Measured:
        """The detector's AP, measured at most once, also over several runs.

        Args:
            name: of this measurement; its folder and its progress bar have it.
            images, perturb, mapper: see :meth:`DetectionTestSet.evaluate`.
            settings: all that defines the change, beside its name, as JSON values: a finished measurement of
                the same detector on the same images under the same settings is taken over.
            clean: on the same images. What it finds and this measurement does not is AP 0, see
                :func:`~.test_set.zero_where_nothing_is_found`.
            change: what happened to the images, such as "fog 3". If given, TEST.PICTURES pictures are saved.
        """
        identity = {
            **self.identity,
            "name": name,
            "images": digest([image_id(each) for each in images.dicts]),
            "settings": settings or {},
        }
        key = digest(identity)
        folder = os.path.join(self.folder, "measured", f"{name}-{key}")
        if key not in self._measured:
            result = read_result(folder) or self._evaluate(
                name, images, folder, identity, perturb=perturb, mapper=mapper, clean=clean
            )
            self._measured[key] = Measured(
                result["metrics"],
                self._file(folder, "matches.npz"),
                result["seconds"],
                result["objective"],
                self._file(folder, "counts.json"),
            )
            if change:
                self.pictures += self._pictures(folder, images, change, perturb, mapper or images.mapper)
        return self._measured[key]

    def worst(self, name: str, images: DetectionTestSet, parts: list[Measured]) -> Measured:
        """The worst case over measurements of the same images, see :func:`worst_case`.

        Semantic and panoptic segmentation each have their own, see :func:`worst_counts`. Of evaluators that
        keep nothing of the images, it is the measurement with the least AP.
        """
        files = [part.matches or part.counts for part in parts]
        if None in files:
            return min(
                parts,
                key=lambda part: [
                    values.get(main_metric(task)) or 0 for task, values in part.metrics.items()
                ],
            )
        key = digest({**self.identity, "name": name, "parts": files})
        folder = os.path.join(self.folder, "measured", f"{name}-{key}")
        result = read_result(folder)
        if result is None:
            if comm.is_main_process():
                os.makedirs(folder, exist_ok=True)
                result = {"identity": {**self.identity, "parts": files}}
                result["metrics"] = {**self._combine(parts, folder), **self._combine_counts(parts, folder)}
                write_result(folder, result)
            result = from_main(result)
        matches, counts = (self._file(folder, file) for file in ("matches.npz", "counts.json"))
        return Measured(result["metrics"], matches, 0.0, counts=counts)

    def _file(self, folder: str, name: str) -> str | None:
        """Its path relative to OUTPUT_DIR, in all processes; None if the folder has none."""
        path = os.path.join(folder, name)
        return from_main(os.path.relpath(path, self.cfg.OUTPUT_DIR) if os.path.isfile(path) else None)

    def _combine_counts(self, parts: list[Measured], folder: str) -> Metrics:
        """As :meth:`_combine`, for the tasks whose evaluators count."""
        if parts[0].counts is None:
            return {}
        read = []
        for part in parts:
            path = os.path.join(self.cfg.OUTPUT_DIR, str(part.counts))
            content = read_json(path)
            if content is None:
                raise InputError(f"{path} is damaged: delete its folder, which is then measured again")
            read.append(content)
        counting = {
            part.task: part
            for part in parts_of(self._changed.evaluator)
            if isinstance(part, CountingEvaluator)
        }
        worst = {
            task: worst_counts(evaluator, [each[task] for each in read])
            for task, evaluator in counting.items()
        }
        write_json(os.path.join(folder, "counts.json"), worst)
        return finite({task: counting[task].metrics_of(found) for task, found in worst.items()})

    def _combine(self, parts: list[Measured], folder: str) -> Metrics:
        """Write the matches of the worst case, and give its metrics."""
        if parts[0].matches is None:
            return {}
        read = [read_matches(os.path.join(self.cfg.OUTPUT_DIR, str(part.matches))) for part in parts]
        common = read[0][1]
        worst = worst_case(
            [matches for matches, _ in read], len(common["image_ids"]), len(common["category_ids"])
        )
        write_matches(os.path.join(folder, "matches.npz"), worst, **common)
        classes = MetadataCatalog.get(self.dataset).thing_classes
        return finite(
            {task: metrics_of(found, common["iou_thrs"], task, classes) for task, found in worst.items()}
        )

    def _evaluate(
        self,
        name: str,
        images: DetectionTestSet,
        folder: str,
        identity: dict[str, Any],
        clean: Measured | None,
        **changes,
    ) -> dict[str, Any]:
        """The content of the measurement's ``result.json``, in all processes."""
        written = os.path.join(images.folder, "matches.npz")
        if comm.is_main_process() and os.path.isfile(written):
            os.remove(written)  # of another measurement, where this one may give none
        kept = ImageByImage(images.evaluator, folder)
        if kept.done:
            logger.info("%s: goes on after %d of %d images", name, len(kept.done), len(images.dicts))
        found = images.evaluate(
            self.model, name, clean=clean.metrics if clean else None, kept=kept, **changes
        )
        metrics = finite(found)
        objectives = kept.objectives()
        result = None
        if comm.is_main_process():
            for task, values in metrics.items():
                logger.info("%s: %s %s %s", name, task, main_metric(task), values.get(main_metric(task)))
            os.makedirs(folder, exist_ok=True)
            self._keep_matches(written, folder, clean)
            _keep_counts(images, folder)
            result = {
                "identity": identity,
                "metrics": metrics,
                "objective": summary(objectives),
                "seconds": round(kept.seconds, 3),
            }
            write_result(folder, result)
        return from_main(result)

    def _keep_matches(self, path: str, folder: str, clean: Measured | None) -> None:
        """Put the evaluator's ``matches.npz``, if it wrote one, into the measurement's folder."""
        if not os.path.isfile(path):
            return
        matches, common = read_matches(path)
        if clean and clean.matches:  # without any detection the evaluator only knows of boxes
            of_clean, _ = read_matches(os.path.join(self.cfg.OUTPUT_DIR, clean.matches))
            matches = {task: found.without_detections() for task, found in of_clean.items()} | matches
        write_matches(os.path.join(folder, "matches.npz"), matches, **common)

    def _pictures(
        self,
        folder: str,
        images: DetectionTestSet,
        change: str,
        perturb: Perturb | None,
        mapper: Callable[[dict], dict],
    ) -> list[dict[str, str]]:
        """TEST.PICTURES pictures before and after the change, unless the folder has as many already."""
        count, path = self.cfg.TEST.PICTURES, os.path.join(folder, "pictures.json")
        if not count:
            return []
        found = from_main(read_json(path) if comm.is_main_process() else None)
        if found is None or found["count"] < count:
            shown = spread(images.dicts, count)
            pictures = BeforeAfter(
                self.model,
                shown,
                self.test_set.mapper,
                self.cfg.INPUT.FORMAT,
                MetadataCatalog.get(self.dataset).get("thing_classes", ()),
                folder,
                change,
                perturbation=perturb is not None,
            )
            with eval_mode(self.model), torch.no_grad():
                for each in shown[comm.get_rank() :: comm.get_world_size()]:
                    inputs = [mapper(each)]
                    inputs = inputs if perturb is None else perturb(self.model, inputs)
                    pictures(inputs, detect(self.model, inputs))
            found = {"count": count, "pictures": self._saved(pictures)}
            if comm.is_main_process():
                write_json(path, found)
        return found["pictures"]

    def _saved(self, pictures: BeforeAfter) -> list[dict[str, str]]:
        """What all processes saved, with paths relative to OUTPUT_DIR."""
        wait_for_all()
        return [
            {**picture, "file": os.path.relpath(picture["file"], self.cfg.OUTPUT_DIR)}
            for part in comm.all_gather(pictures.saved)
            for picture in part
        ]


def _keep_counts(images: DetectionTestSet, folder: str) -> None:
    """Write the ``counts.json`` of the evaluators that count, in the order of the images' ids."""
    found = {
        part.task: [
            {key: value for key, value in each.items() if key != "segments"} for each in part._predictions
        ]
        for part in parts_of(images.evaluator)
        if isinstance(part, CountingEvaluator)
    }
    if found:
        write_json(os.path.join(folder, "counts.json"), found)
