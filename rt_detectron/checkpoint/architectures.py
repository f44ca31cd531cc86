"""The table of networks, and the names of their tensors in a Detectron2 backbone.

A new architecture of a known family is one entry here.
"""

import functools
import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rt_detectron.utils.errors import InputError, did_you_mean, optional_import

TIMM = "timm/"  # before the name of a network of timm's

# What torchvision's and the published classifiers subtract and divide by. RGB, 0..255.
IMAGENET_MEAN = (123.675, 116.28, 103.53)
IMAGENET_STD = (58.395, 57.12, 57.375)


@dataclass(frozen=True)
class Architecture:
    """One network, seen from its classifier and from the Detectron2 backbone made of it.

    Attributes:
        build: ``build(num_classes)`` gives the classifier, randomly initialised.
        stem: name of the convolution that the image enters.
        head: what the names of the tensors begin with that only the classifier has.
        resnets: the ``MODEL.RESNETS`` keys that describe the same network, if it is one of Detectron2's.
        taps: where the other torchvision networks yield stem, res2 (stride 4) ... res5 (stride 32), as node
            names of :func:`torchvision.models.feature_extraction.create_feature_extractor`.
        pixel_mean, pixel_std: what the classifier subtracts and divides by unless its file says otherwise.
            RGB, 0..255.
    """

    build: Callable[[int], nn.Module]
    stem: str
    head: str
    resnets: dict[str, int] | None = None
    taps: dict[str, str] | None = None
    pixel_mean: tuple[float, ...] = IMAGENET_MEAN
    pixel_std: tuple[float, ...] = IMAGENET_STD


def _torchvision(name: str, **kwargs) -> Callable[[int], nn.Module]:
    def build(num_classes: int) -> nn.Module:
        from torchvision import models  # here, so that `import rt_detectron` stays fast

        return getattr(models, name)(weights=None, num_classes=num_classes, **kwargs)

    return build


def _resnet(
    name: str, depth: int, groups: int = 1, width_per_group: int = 64, res2_channels: int = 256
) -> Architecture:
    resnets = {
        "DEPTH": depth,
        "NUM_GROUPS": groups,
        "WIDTH_PER_GROUP": width_per_group,
        "RES2_OUT_CHANNELS": res2_channels,
    }
    build = _torchvision(name, groups=groups, width_per_group=width_per_group)
    return Architecture(build, stem="conv1", head="fc.", resnets=resnets)


def _tapped(name: str, stem: str, head: str, *taps: str) -> Architecture:
    names = ("stem", "res2", "res3", "res4", "res5")
    return Architecture(_torchvision(name), stem, head, taps=dict(zip(names, taps, strict=True)))


# Names are the file stems of the published checkpoints. wide_resnet50_4 is not in torchvision: it is
# ResNet-50 with four times the bottleneck width (Salman et al. 2020, section 4).
ARCHITECTURES: dict[str, Architecture] = {
    "resnet18": _resnet("resnet18", 18, res2_channels=64),
    "resnet34": _resnet("resnet34", 34, res2_channels=64),
    "resnet50": _resnet("resnet50", 50),
    "resnet101": _resnet("resnet101", 101),
    "resnet152": _resnet("resnet152", 152),
    "wide_resnet50_2": _resnet("wide_resnet50_2", 50, width_per_group=128),
    "wide_resnet50_4": _resnet("resnet50", 50, width_per_group=256),
    "wide_resnet101_2": _resnet("wide_resnet101_2", 101, width_per_group=128),
    "resnext50_32x4d": _resnet("resnext50_32x4d", 50, groups=32, width_per_group=4),
    "resnext101_32x8d": _resnet("resnext101_32x8d", 101, groups=32, width_per_group=8),
    # The last tap of each stride, after its activation; res5 is all that the classifier pools, so that
    # no trained layer is lost.
    "densenet": _tapped(
        "densenet161",
        "features.conv0",
        "classifier.",
        "features.pool0",
        "features.transition1.relu",
        "features.transition2.relu",
        "features.transition3.relu",
        "relu",
    ),
    "mnasnet": _tapped(
        "mnasnet1_0", "layers.0", "classifier.", "layers.7", "layers.8", "layers.9", "layers.11", "layers.16"
    ),
    "mobilenet": _tapped(
        "mobilenet_v2",
        "features.0.0",
        "classifier.",
        "features.1",
        "features.3",
        "features.6",
        "features.13",
        "features.18",
    ),
    "shufflenet": _tapped(
        "shufflenet_v2_x1_0", "conv1.0", "fc.", "conv1", "maxpool", "stage2", "stage3", "conv5"
    ),
    "vgg16_bn": _tapped(
        "vgg16_bn",
        "features.0",
        "classifier.",
        "features.13",
        "features.22",
        "features.32",
        "features.42",
        "features.43",
    ),
}


def get_architecture(name: str) -> Architecture:
    """The table's entry for ``name``, or timm's network for ``timm/NAME``.

    Raises:
        InputError: for an unknown name, listing the known; for a timm name without timm installed.
    """
    name = str(name)
    if name.startswith(TIMM):
        return _timm_architecture(name.removeprefix(TIMM))
    if name in ARCHITECTURES:
        return ARCHITECTURES[name]
    raise InputError(
        f"unknown architecture {name!r}; known are {', '.join(ARCHITECTURES)} and timm/NAME"
        f"{did_you_mean(name, ARCHITECTURES)}"
    )


def import_timm():
    """The module timm; an :class:`InputError` where it is missing."""
    return optional_import("timm", "timm>=1.0.31", "timm networks")


@functools.cache
def _timm_architecture(name: str) -> Architecture:
    timm = import_timm()
    if not timm.is_model(name):
        raise InputError(f"timm has no model {name!r}{did_you_mean(name, timm.list_models())}")
    config = timm.get_pretrained_cfg(name)
    first_conv, classifier = getattr(config, "first_conv", None), getattr(config, "classifier", None)
    if not isinstance(first_conv, str) or not isinstance(classifier, str):
        raise InputError(
            f"timm/{name} has no single first convolution and classifier: choose another network"
        )
    return Architecture(
        lambda num_classes: timm.create_model(name, num_classes=num_classes),
        stem=first_conv,
        head=f"{classifier}.",
        pixel_mean=tuple(round(255 * value, 4) for value in config.mean),
        pixel_std=tuple(round(255 * value, 4) for value in config.std),
    )


def build_classifier(arch: str, num_classes: int = 1000) -> nn.Module:
    """The network ``arch`` with ``num_classes`` logits, randomly initialised. Raises as get_architecture."""
    return get_architecture(arch).build(num_classes)


# torchvision's ResNets -> Detectron2's, each rule on the outcome of the one before it.
_TO_DETECTRON2 = (
    (r"^(conv1|bn1)\.", r"stem.\1."),
    (r"^layer(\d)\.", lambda match: f"res{int(match[1]) + 1}."),
    (r"\bbn(\d)\.", r"conv\1.norm."),
    (r"\bdownsample\.0\.", "shortcut."),
    (r"\bdownsample\.1\.", "shortcut.norm."),
)


@functools.cache
def backbone_names(arch: str) -> dict[str, str]:
    """The names of a classifier's tensors, as far as its backbone has them, to those in the backbone.

    ``layer1.0.downsample.1.bias`` to ``res2.0.shortcut.norm.bias`` for a ResNet, which is Detectron2's own;
    ``features.conv0.weight`` to ``trunk.features.conv0.weight`` for a network that a feature extractor
    wraps. BN's counters, which no backbone uses, are left out.
    """
    architecture = get_architecture(arch)
    names = [n for n in _shapes(arch) if not n.startswith(architecture.head) and not is_counter(n)]
    if architecture.resnets:
        return {name: _to_detectron2(name) for name in names}
    if arch.startswith(TIMM):
        return _timm_names(arch, names)
    return {name: f"trunk.{name}" for name in names}


def is_counter(name: str) -> bool:
    """Whether a tensor is BN's count of batches: no number that a network computes with."""
    return name.endswith(".num_batches_tracked")


def _to_detectron2(name: str) -> str:
    for pattern, replacement in _TO_DETECTRON2:
        name = re.sub(pattern, replacement, name)
    return name


def _timm_names(arch: str, names: list[str]) -> dict[str, str]:
    """By comparison with timm's features_only model, which flattens ``stages.0`` to ``stages_0``."""
    with torch.device("meta"):
        features = import_timm().create_model(arch.removeprefix(TIMM), features_only=True)
    flat = {name.removeprefix("model.").replace(".", "_"): name for name in features.state_dict()}
    return {name: f"trunk.{flat[key]}" for name in names if (key := name.replace(".", "_")) in flat}


def detect_architecture(state_dict: dict[str, Tensor]) -> str:
    """The network of the table whose names and shapes are those of ``state_dict``, a classifier's.

    Raises:
        InputError: if none fits, naming what keeps the nearest one from fitting.
    """
    candidates = [a for a, known in ARCHITECTURES.items() if f"{known.stem}.weight" in state_dict]
    problems = {arch: _problems(state_dict, arch) for arch in candidates or ARCHITECTURES}
    arch = min(problems, key=lambda name: len(problems[name]))
    if problems[arch]:
        raise InputError(
            _misfit(arch, problems[arch], "no known architecture fits; the nearest is ")
            + "; a timm network needs --arch timm/NAME"
        )
    return arch


def check_architecture(state_dict: dict[str, Tensor], arch: str) -> None:
    """Raise :class:`InputError` naming the missing, unexpected and misshaped tensors, if there are any.

    The number of classes is free, and so is the presence of BN's ``num_batches_tracked`` and of all that
    only the classifier has: a backbone has no use for them.
    """
    problems = _problems(state_dict, arch)
    if problems:
        raise InputError(_misfit(arch, problems, "the tensors do not fit "))


@functools.cache
def _shapes(arch: str) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        network = build_classifier(arch)
    return {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}


def _problems(state_dict: dict[str, Tensor], arch: str) -> list[tuple[str, str]]:
    """What is wrong with ``state_dict`` as ``arch``: (kind, description of a tensor), in that order."""
    head = get_architecture(arch).head
    known = _shapes(arch)
    found = {name: tuple(tensor.shape) for name, tensor in state_dict.items()}
    needed = known if any(name.startswith(head) for name in found) else backbone_names(arch)
    missing = [("missing", name) for name in needed if name not in found and not is_counter(name)]
    unexpected = [("unexpected", name) for name in found if name not in known]
    misshaped = [
        ("misshaped", f"{name} {found[name]} instead of {shape}")
        for name, shape in known.items()
        if name in found and not _same_shape(found[name], shape, any_classes=name.startswith(head))
    ]
    return missing + unexpected + misshaped


def _same_shape(found: tuple[int, ...], needed: tuple[int, ...], any_classes: bool) -> bool:
    return (found[1:] == needed[1:] and len(found) == len(needed)) if any_classes else found == needed


def _misfit(arch: str, problems: list[tuple[str, str]], what: str) -> str:
    parts = []
    for kind in ("missing", "unexpected", "misshaped"):
        names = [name for problem, name in problems if problem == kind]
        more = f" and {len(names) - 5} more" if len(names) > 5 else ""
        if names:
            parts.append(f"{kind} {', '.join(names[:5])}{more}")
    return f"{what}{arch}: {'; '.join(parts)}"
