"""Detectors of mmdetection 2 and 3 as Detectron2's: a Faster R-CNN with FPN on a ResNet or a ConvNeXt.

Li et al. (TIFS 2025) published theirs so (thu-ml/oddefense). Both libraries order classes as COCO's
categories, with the background last, place and order anchors alike, and code boxes alike; so the tensors stay
as they are, and only their names change. What the file says of its configuration is compared with that.
"""

import ast
import os
import re
from dataclasses import dataclass

from torch import Tensor

from rt_detectron.checkpoint.architectures import Architecture, describe, get_architecture, is_counter
from rt_detectron.checkpoint.formats import WeightsFile, file_name, read_weights, save_atomically
from rt_detectron.checkpoint.layouts import Choice, find_network
from rt_detectron.checkpoint.metadata import Metadata
from rt_detectron.utils.errors import InputError
from rt_detectron.utils.files import file_sha256

_BACKBONE = "backbone."
_LEVELS = 4  # of the pyramid that have layers of their own; p6 is pooled from p5
_OUT_NORM = re.compile(r"^backbone\.norm(\d)\.(weight|bias)$")  # of mmpretrain's ConvNeXt
# mmdetection's layers beside the backbone -> Detectron2's, both with weight and bias.
_LAYERS = {
    **{f"neck.lateral_convs.{i}.conv": f"backbone.fpn_lateral{i + 2}" for i in range(_LEVELS)},
    **{f"neck.fpn_convs.{i}.conv": f"backbone.fpn_output{i + 2}" for i in range(_LEVELS)},
    "rpn_head.rpn_conv": "proposal_generator.rpn_head.conv",
    "rpn_head.rpn_cls": "proposal_generator.rpn_head.objectness_logits",
    "rpn_head.rpn_reg": "proposal_generator.rpn_head.anchor_deltas",
    "roi_head.bbox_head.shared_fcs.0": "roi_heads.box_head.fc1",
    "roi_head.bbox_head.shared_fcs.1": "roi_heads.box_head.fc2",
    "roi_head.bbox_head.fc_cls": "roi_heads.box_predictor.cls_score",
    "roi_head.bbox_head.fc_reg": "roi_heads.box_predictor.bbox_pred",
}
# What the configuration in a file must say, if anything; else Detectron2 computes something else.
_SETTINGS = {
    "scales": [8],
    "ratios": [0.5, 1.0, 2.0],
    "strides": [4, 8, 16, 32, 64],
    "featmap_strides": [4, 8, 16, 32],
    "out_indices": [0, 1, 2, 3],
    "start_level": 0,
    "add_extra_convs": False,
    "reg_class_agnostic": False,
    "sampling_ratio": 0,
}
_STDS = ([1.0, 1.0, 1.0, 1.0], [0.1, 0.1, 0.2, 0.2])  # of the coding of the RPN's boxes and of the head's


@dataclass
class DetectorConversion:
    """What :func:`convert_detector` wrote.

    Attributes:
        metadata: of its backbone and preprocessing.
        num_tensors: their number.
        classes: how many it knows, without the background.
        config: the config lines that it needs, by key.
        guesses: what is not known but assumed, a sentence each.
    """

    metadata: Metadata
    num_tensors: int
    classes: int
    config: dict[str, str]
    guesses: list[str]


def convert_detector(
    source: str | os.PathLike,
    output: str | os.PathLike,
    norm: str | None = None,
    eps: float | None = None,
    arch: str | None = None,
) -> DetectorConversion:
    """Write the Faster R-CNN of mmdetection in ``source`` as a trained detector of Detectron2.

    Args:
        source: see :func:`~.formats.read_weights`.
        output: ``.pth``, for MODEL.WEIGHTS under a config of Faster R-CNN with FPN; replaced atomically.
        norm, eps: of the threat model of its training, if known.
        arch: its backbone; None takes a ResNet of the table, or ``timm/convnext_tiny``.

    Raises:
        InputError: for a file that cannot be read, or whose detector is another or was configured otherwise,
            naming the tensor or the setting.
    """
    source, output = file_name(source), file_name(output)
    if not output.endswith(".pth") or os.path.realpath(source) == os.path.realpath(output):
        raise InputError(f"cannot write {output}: a detector becomes another file that ends in .pth")
    file = read_weights(source)
    tensors = _detector_in(file)
    architecture, state_dict = _backbone(file, tensors, arch)
    state_dict |= _heads(file, tensors)
    _check_shapes(file.path, tensors)
    guesses: list[str] = []
    metadata = _metadata(file, architecture, norm, eps, guesses)
    classes = tensors["roi_head.bbox_head.fc_cls.bias"].numel() - 1
    state_dict = {name: tensor.float().clone() for name, tensor in state_dict.items()}
    try:
        os.makedirs(os.path.dirname(output) or ".", exist_ok=True)
        save_atomically({"model": state_dict, "rt_detectron": metadata.to_dict()}, output)
    except OSError as error:
        raise InputError(f"cannot write {output}: {error.strerror}") from None
    config = {
        "MODEL.WEIGHTS": f'"{output}"',
        "MODEL.BACKBONE.NAME": f'"{architecture.builder("fpn")}"',
        "MODEL.ROBUST.ARCH": f'"{architecture.name}"',
        "MODEL.ROBUST.OUT_NORM": '"LN"' if any(map(_OUT_NORM.match, tensors)) else '""',
        "MODEL.ROI_HEADS.NUM_CLASSES": str(classes),
    }
    return DetectorConversion(metadata, len(state_dict), classes, config, guesses)


def _detector_in(file: WeightsFile) -> dict[str, Tensor]:
    """Its tensors by mmdetection's names, without batch norm's counters."""
    for tensors in file.state_dicts.values():
        if "roi_head.bbox_head.fc_cls.weight" in tensors:
            return {name: tensor for name, tensor in tensors.items() if not is_counter(name)}
        if "bbox_head.conv_centerness.weight" in tensors:
            raise InputError(
                f"{file.path} holds an FCOS (bbox_head.conv_centerness.weight), and Detectron2's, which no "
                "YAML config builds, would find other boxes: it has no learned scale of each level "
                "(bbox_head.scales), and its threshold counts the centerness: convert its backbone, with "
                "--prefix backbone. instead of --detector"
            )
    name = next(iter(next(iter(file.state_dicts.values()))))
    raise InputError(
        f"{file.path} holds no Faster R-CNN of mmdetection: it has {name}, for example, but no "
        "roi_head.bbox_head.fc_cls.weight"
    )


def _backbone(
    file: WeightsFile, tensors: dict[str, Tensor], arch: str | None
) -> tuple[Architecture, dict[str, Tensor]]:
    """Which network it is, and its tensors by their names in Detectron2's detector."""
    below = {n: t for n, t in tensors.items() if n.startswith(_BACKBONE) and not _OUT_NORM.match(n)}
    if arch is None and any(".depthwise_conv." in name for name in below):
        arch = "timm/convnext_tiny"
    found, _ = find_network(
        WeightsFile(file.path, {"": below}),
        get_architecture(arch) if arch else None,
        Choice(prefix=_BACKBONE),
    )
    names = found.architecture.backbone_names
    state_dict = {
        f"backbone.bottom_up.{names[n]}": tensor for n, tensor in found.state_dict.items() if n in names
    }
    for name, tensor in tensors.items():
        if match := _OUT_NORM.match(name):
            state_dict[f"backbone.bottom_up.out_norms.{match[1]}.{match[2]}"] = tensor
    return found.architecture, state_dict


def _heads(file: WeightsFile, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The layers beside the backbone, by Detectron2's names."""
    needed = {
        f"{theirs}.{kind}": f"{ours}.{kind}"
        for theirs, ours in _LAYERS.items()
        for kind in ("weight", "bias")
    }
    problems = [("missing", name) for name in needed if name not in tensors]
    problems += [
        ("unexpected", name) for name in tensors if name not in needed and not name.startswith(_BACKBONE)
    ]
    if problems:
        raise InputError(f"{file.path}: this is no Faster R-CNN with FPN as ours: {describe(problems)}")
    return {ours: tensors[theirs] for theirs, ours in needed.items()}


def _check_shapes(path: str, tensors: dict[str, Tensor]) -> None:
    """Widths are free; numbers of anchors and classes, and how layers follow each other, are not."""

    def shape(layer: str) -> list[int]:
        return list(tensors[f"{layer}.weight"].shape)

    width, hidden = shape("neck.lateral_convs.0.conv")[0], shape("roi_head.bbox_head.shared_fcs.0")[0]
    last, classes = shape("roi_head.bbox_head.shared_fcs.1")[0], shape("roi_head.bbox_head.fc_cls")[0] - 1
    expected = {
        **{f"neck.fpn_convs.{i}.conv": [width, width, 3, 3] for i in range(_LEVELS)},
        "rpn_head.rpn_conv": [width, width, 3, 3],
        "rpn_head.rpn_cls": [3, width, 1, 1],
        "rpn_head.rpn_reg": [12, width, 1, 1],
        "roi_head.bbox_head.shared_fcs.0": [hidden, 49 * width],
        "roi_head.bbox_head.shared_fcs.1": [last, hidden],
        "roi_head.bbox_head.fc_cls": [classes + 1, last],
        "roi_head.bbox_head.fc_reg": [4 * classes, last],
    }
    problems = [
        ("misshaped", f"{layer}.weight {shape(layer)} instead of {sizes}")
        for layer, sizes in expected.items()
        if shape(layer) != sizes
    ]
    if problems:
        raise InputError(f"{path}: this is no Faster R-CNN with FPN as ours: {describe(problems)}")


def _metadata(
    file: WeightsFile, architecture: Architecture, norm: str | None, eps: float | None, guesses: list[str]
) -> Metadata:
    """From the configuration that mmdetection's checkpoints hold as text; without it, its defaults."""
    version = str(file.settings.get("meta.mmdet_version", ""))
    if version.startswith(("0.", "1.")):
        raise InputError(
            f"{file.path} was written by mmdetection {version}, which has the background first and codes "
            "boxes otherwise: only files of mmdetection 2 and 3 can be converted"
        )
    text = str(file.settings.get("meta.config", file.settings.get("meta.cfg", "")))
    if not text:
        guesses.append(
            "the file holds no configuration: anchors, box coding, order of the classes (background last), "
            "and RGB images with ImageNet's mean and std, are taken for those of faster_rcnn_r50_fpn"
        )
    _check_settings(file.path, text)
    usual = {"mean": architecture.pixel_mean, "std": architecture.pixel_std}
    mean, std = (
        next((found for found in _values(text, key) if isinstance(found, list) and len(found) == 3), default)
        for key, default in usual.items()
    )
    to_rgb = _first(text, "to_rgb", _first(text, "bgr_to_rgb", True))
    return Metadata(
        architecture.name,
        norm,
        eps,
        input_format="RGB" if to_rgb else "BGR",
        pixel_mean=tuple(mean),
        pixel_std=tuple(std),
        stride_in_1x1=_first(text, "style", "pytorch") == "caffe",
        source=os.path.basename(file.path),
        sha256=file_sha256(file.path),
    )


def _check_settings(path: str, text: str) -> None:
    for key, expected in _SETTINGS.items():
        for found in _values(text, key):
            if key == "scales" and isinstance(found, list) and any(isinstance(each, tuple) for each in found):
                continue  # of the images, not of the anchors
            if found != expected:
                raise InputError(
                    f"{path}: its configuration says {key} {found}, and this conversion is for {expected}"
                )
    for found in _values(text, "target_stds"):
        if found not in _STDS:
            raise InputError(f"{path}: its configuration says target_stds {found}, not one of {_STDS}")


def _first(text: str, key: str, default):
    """The first value of a setting in a configuration's text, such as ``mean=[123.675, 116.28, 103.53]``."""
    return next(iter(_values(text, key)), default)


def _values(text: str, key: str) -> list:
    values = []
    for found in re.findall(rf"\b{key}\s*=\s*(\[[^\]]*\]|[\w.'\"-]+)", text):
        try:
            values.append(ast.literal_eval(found))
        except (ValueError, SyntaxError):  # another expression
            continue
    return values
