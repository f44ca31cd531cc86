"""Robust networks in one line, for projects without a Detectron2 config."""

import logging
import os
from collections.abc import Sequence

import numpy as np
from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_backbone
from detectron2.modeling.backbone import Backbone
from detectron2.utils.file_io import PathManager
from torch import Tensor

from rt_detectron.checkpoint import zoo
from rt_detectron.checkpoint.architectures import Architecture, get_architecture, is_counter
from rt_detectron.checkpoint.checkpointer import RobustCheckpointer
from rt_detectron.checkpoint.convert import read_network
from rt_detectron.checkpoint.formats import WRITERS, backbone_metadata, file_architecture, file_name
from rt_detectron.checkpoint.preprocessing import compare
from rt_detectron.config import add_robust_config
from rt_detectron.modeling.classifier import Classifier, versioned
from rt_detectron.utils.errors import InputError

logger = logging.getLogger(__name__)


def load_backbone(
    name: str | os.PathLike,
    detector: str | None = None,
    norm: str = "FrozenBN",
    freeze_at: int = 2,
    input_format: str | None = None,
    pixel_mean: Sequence[float] | None = None,
    pixel_std: Sequence[float] | None = None,
    out_norm: str = "",
    window: int = 0,
) -> Backbone:
    """A pretrained Detectron2 backbone. Serves as a LazyConfig node: ``L(load_backbone)(name=...)``.

    Args:
        name: of the zoo, such as "resnet50_l2_eps3" (or "resnet50_l2_eps3-bgr"), or a backbone's ``.pkl``.
        detector: None for the bare network, "fpn" or "retinanet" for the pyramid of that detector, "sfp" or
            "retinanet_sfp" for ViTDet's simple pyramid on a plain vision transformer. A pyramid's own layers
            are randomly initialised.
        norm: "FrozenBN", "EvalBN" (fixed statistics, but scale and shift train), "BN" or "SyncBN".
        freeze_at: 1 freezes the stem, 2 also res2, ... 5 everything; 0 nothing.
        input_format, pixel_mean, pixel_std: what the detector gives it, to be compared with what it was
            trained on; None is not compared. In a LazyConfig ``pixel_mean="${..pixel_mean}"`` and the like.
        out_norm, window: of timm's networks, as MODEL.ROBUST.OUT_NORM and MODEL.ROBUST.WINDOW.

    Returns:
        A module from images (N, 3, H, W) to a dict of features: "res2" ... "res5" at strides 4 to 32,
        "p2" ... "p6" at 4 to 64 for "fpn" and "sfp", "p3" ... "p7" at 8 to 128 for the RetinaNets. It
        takes what its ``metadata``, a :class:`.Metadata`, says: colours in the order ``input_format``, as
        floats of 0..255, minus ``pixel_mean``, divided by ``pixel_std``; H and W multiples of
        ``size_divisibility``, if not 0.

    Raises:
        InputError: for an unknown name, detector or norm, a network without these strides, other
            preprocessing than that of the weights, and for what
            :mod:`rt_detectron.checkpoint.zoo` and :class:`RobustCheckpointer` refuse.
    """
    name = file_name(name)
    path = PathManager.get_local_path(name) if name.endswith(".pkl") else zoo.backbone(name)
    metadata = backbone_metadata(path)
    given = {"INPUT.FORMAT": input_format, "MODEL.PIXEL_MEAN": pixel_mean, "MODEL.PIXEL_STD": pixel_std}
    compare(given, metadata)
    cfg = _config(file_architecture(metadata, path), detector, norm, freeze_at)
    cfg.MODEL.ROBUST.OUT_NORM, cfg.MODEL.ROBUST.WINDOW = out_norm, window
    backbone = build_backbone(cfg, ShapeSpec(channels=3))
    RobustCheckpointer(backbone).load(path)
    backbone.metadata = metadata
    return backbone


def _config(architecture: str | Architecture, detector: str | None, norm: str, freeze_at: int):
    architecture = get_architecture(architecture)
    stages = ["res3", "res4", "res5"] if detector == "retinanet" else ["res2", "res3", "res4", "res5"]
    cfg = get_cfg()
    add_robust_config(cfg)
    cfg.MODEL.ROBUST.ARCH = architecture.name
    cfg.MODEL.BACKBONE.NAME = architecture.builder(detector)
    cfg.MODEL.BACKBONE.FREEZE_AT = freeze_at
    cfg.MODEL.RESNETS.NORM = norm
    cfg.MODEL.RESNETS.OUT_FEATURES = stages
    cfg.MODEL.FPN.IN_FEATURES = stages
    cfg.MODEL.ROI_HEADS.NAME = ""  # Detectron2's default, a C4 head, would change the backbone
    return cfg


def load_classifier(
    name: str | os.PathLike, arch: str | None = None, num_classes: int | None = None
) -> Classifier:
    """A pretrained classifier in eval mode, its normalisation included, as attacks want it.

    Args:
        name: of the zoo, such as "resnet50_l2_eps3" (or "robust://resnet50_l2_eps3.pkl"), or a classifier's
            file (anything that :func:`rt_detectron.checkpoint.formats.read_weights` reads).
        arch: the network in the file; None detects it. Needed for timm's ("timm/convnext_tiny").
        num_classes: put a fresh last linear layer for so many classes in place of the file's. A backbone's
            file, which has none, then serves, too.

    Returns:
        A module from RGB images (N, 3, H, W) in [0, 1] to logits (N, classes); 1000 ImageNet classes for
        the zoo's. Its ``metadata`` is the file's :class:`.Metadata`.

    Raises:
        InputError: for an unknown name, a file that cannot be read or is of another network, and for a
            backbone, unless the last linear layer is all that it lacks and ``num_classes`` is given.
    """
    path, published = _weights_file(file_name(name))
    if published is None:
        weights = read_network(path, arch)
    else:
        norm, eps = published.norm, published.eps
        weights = read_network(path, arch or published.arch, norm, eps, published=published.mean_and_std)
    architecture, state_dict, metadata = weights.architecture, weights.state_dict, weights.metadata
    for line in (*weights.remarks, *weights.guesses):
        logger.warning("%s: %s", path, line)
    logits = [tensor for name, tensor in state_dict.items() if name.startswith(architecture.head)]
    if not logits and num_classes is None:
        raise InputError(
            f"{path} is a backbone without the classifier's last layer: give the classifier's file"
        )
    if published is not None and published.kind == "encoder" and num_classes is None:
        raise InputError(f"{published.name} is an encoder without classes: give num_classes for a last layer")
    classifier = Classifier(
        architecture, num_classes or len(logits[-1]), metadata.pixel_mean, metadata.pixel_std
    )
    _fill(classifier, state_dict, path, fresh_head=num_classes is not None)
    classifier.metadata = metadata
    return classifier.eval()


def load_weights(classifier: Classifier, name: str, fresh_head: bool = False) -> bool:
    """Load pretrained weights into a classifier that exists.

    Args:
        classifier: where they go.
        name: as for :func:`load_classifier`.
        fresh_head: leave the last linear layer as it is where the file has none, or one for another number
            of classes. The log says so.

    Returns:
        Whether the last linear layer was loaded, too.

    Raises:
        InputError: for an unknown name, for a file that cannot be read, is of another network or of another
            number of classes, and for weights that expect another normalisation.
    """
    path, published = _weights_file(file_name(name))
    pixels = None if published is None else published.mean_and_std
    weights = read_network(path, classifier.architecture, published=pixels)
    for remark in weights.remarks:
        logger.warning("%s: %s", path, remark)
    state_dict = weights.state_dict
    for key in ("pixel_mean", "pixel_std") if weights.pixels_are_known else ():
        expected, found = getattr(weights.metadata, key), getattr(classifier, key)
        if not np.allclose(expected, found, rtol=1e-3):
            raise InputError(
                f"{path} expects {key} {list(expected)}, not {list(found)}: set model.classifier.{key}"
            )
    weight = state_dict.get(f"{classifier.last_linear}.weight")
    has_head = weight is not None and len(weight) == classifier.num_classes
    if not has_head:
        found = "has no last linear layer" if weight is None else f"has {len(weight)} classes"
        if not fresh_head:
            raise InputError(
                f"{path} {found}, but model.classifier.num_classes is {classifier.num_classes}: "
                "give the file of the same classifier"
            )
        logger.info(
            "%s %s: the last linear layer, %s, starts afresh with %d classes",
            path, found, classifier.last_linear, classifier.num_classes,
        )  # fmt: skip
    _fill(classifier, state_dict, path, fresh_head=not has_head)
    return has_head


def _fill(classifier: Classifier, state_dict: dict[str, Tensor], path: str, fresh_head: bool) -> None:
    """Load ``state_dict``, whose tensors are those of the network; without its last linear layer if asked."""
    fresh: tuple[str, ...] = ()
    if fresh_head:
        fresh = tuple(f"{classifier.last_linear}.{part}" for part in ("weight", "bias"))
        state_dict = {name: tensor for name, tensor in state_dict.items() if name not in fresh}
    state_dict = versioned(state_dict, classifier.network)
    missing = classifier.network.load_state_dict(state_dict, strict=False).missing_keys
    missing = [name for name in missing if name not in fresh and not is_counter(name)]
    if missing:
        raise InputError(f"{path} is a backbone without {missing[0]}: give the classifier's file")


def _weights_file(name: str) -> tuple[str, zoo.Entry | None]:
    """The local file, and what it was published as."""
    robust = zoo.RobustPathHandler.PREFIX
    if not name.startswith(robust) and (os.path.isfile(name) or name.endswith((*WRITERS, ".tar", ".pt"))):
        return name, None
    name = name.removeprefix(robust).removesuffix(".pkl")
    path = zoo.weights(name)
    return path, None if path.endswith(".pkl") else zoo.find(name)
