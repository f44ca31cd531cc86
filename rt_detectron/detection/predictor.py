"""Detectron2's DefaultPredictor, with weights that are checked against the config when they are loaded."""

from collections.abc import Sequence

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.engine import DefaultPredictor
from detectron2.structures import Instances

from rt_detectron.checkpoint.checkpointer import RobustCheckpointer
from rt_detectron.data import classes_of
from rt_detectron.detection.trainer import load_detector_config
from rt_detectron.utils.errors import InputError, building
from rt_detectron.utils.pictures import check_narrow


class Predictor(DefaultPredictor):
    """Maps one BGR image (H x W x 3, uint8) to its detections, with ``cfg.MODEL.WEIGHTS``.

    Attributes:
        class_names: see :func:`class_names`.

    Raises:
        InputError: for missing or unfit weights; from a call, if the model gives no instances.
    """

    def __init__(self, cfg: CfgNode):
        if not cfg.MODEL.WEIGHTS:
            raise InputError("the config names no weights: give MODEL.WEIGHTS, of a trained detector")
        without_weights = cfg.clone()
        without_weights.defrost()
        without_weights.MODEL.WEIGHTS = ""
        with building("the detector", "MODEL"):
            super().__init__(without_weights)
        RobustCheckpointer(self.model, trained=True, input_format=cfg.INPUT.FORMAT).load(cfg.MODEL.WEIGHTS)
        self.class_names = class_names(cfg)

    @torch.no_grad()
    def __call__(self, original_image: np.ndarray) -> Instances:
        return self.detect(self.inputs(original_image))

    def inputs(self, original_image: np.ndarray) -> dict:
        """What the model takes: the image resized, (3, H, W) floats in 0..255 in its order of colours.

        Raises:
            InputError: for an image of which nothing is left when it is resized.
        """
        height, width = original_image.shape[:2]
        ordered = original_image[:, :, ::-1] if self.input_format == "RGB" else original_image
        try:
            image = self.aug.get_transform(ordered).apply_image(ordered)
        except ValueError as error:
            check_narrow(error, width, height)
            raise
        image = torch.as_tensor(image.astype("float32").transpose(2, 0, 1))
        return {"image": image, "height": height, "width": width}

    def detect(self, inputs: dict) -> Instances:
        """The detections for :meth:`inputs`, in pixels of the original image."""
        (predictions,) = self.model([inputs])
        if "instances" not in predictions:
            raise InputError(f"MODEL.META_ARCHITECTURE {self.cfg.MODEL.META_ARCHITECTURE} gives no instances")
        return predictions["instances"]


def load_predictors(
    config_files: Sequence[str],
    weights: Sequence[str] | None,
    captions: Sequence[str] | None,
    threshold: float,
    opts: Sequence[str] = (),
) -> dict[str, Predictor]:
    """Detectors to compare side by side, by caption.

    Args:
        config_files: one per detector, or one for all.
        weights: one per detector, or one for all; None for the configs' MODEL.WEIGHTS.
        captions: one per detector; None for the paths of the weights if they differ, else of the configs.
        threshold: the lowest score to keep, 0 to 1; masks of lower ones are not computed.
        opts: ``KEY VALUE ...``, for all.

    Raises:
        InputError: for numbers of files or captions that do not match, and as :func:`load_detector_config`
            and :class:`Predictor`.
    """
    if not 0 <= threshold <= 1:
        raise InputError(f"--threshold {threshold}: a score lies in 0 to 1")
    count = max(len(config_files), len(weights or ()))
    for option, given in (("--config-file", config_files), ("--weights", weights)):
        if given and len(given) not in (1, count):
            raise InputError(
                f"{option} was given {len(given)} times for {count} detectors: give it 1 or {count}"
            )
    config_files = [*config_files] * (count // len(config_files))
    files: list[str | None] = [*weights] * (count // len(weights)) if weights else [None] * count
    if not captions:
        captions = weights if weights and len(set(files)) == count else config_files
    if len(captions) != count or len(set(captions)) != count:
        raise InputError(f"give {count} different --caption, one for each detector")
    scores = [f"MODEL.{key}.SCORE_THRESH_TEST" for key in ("ROI_HEADS", "RETINANET")]
    first = [part for key in scores for part in (key, str(threshold))]
    predictors = {}
    for caption, path, file in zip(captions, config_files, files, strict=True):
        own = ["MODEL.WEIGHTS", file] if file else []
        predictors[caption] = Predictor(load_detector_config(path, [*first, *opts, *own]))
    return predictors


def class_names(cfg: CfgNode) -> list[str]:
    """The classes of the first of the config's datasets that has known ones; empty if none has.

    COCO class names are built in; a custom set needs its annotation file.
    """
    for name in (*cfg.DATASETS.TEST, *cfg.DATASETS.TRAIN):
        if names := classes_of(name):
            return names
    return []
