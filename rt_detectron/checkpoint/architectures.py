"""The table of networks. A new architecture is one entry here."""

import difflib
from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from rt_detectron.errors import InputError

# What torchvision's and the published classifiers subtract and divide by. RGB, 0..255.
IMAGENET_MEAN = (123.675, 116.28, 103.53)
IMAGENET_STD = (58.395, 57.12, 57.375)


@dataclass(frozen=True)
class Architecture:
    """One network, seen from torchvision (the classifier) and from Detectron2 (the backbone).

    Attributes:
        build: ``build(num_classes)`` gives torchvision's network, randomly initialised.
        resnets: the ``MODEL.RESNETS`` keys of Detectron2 that describe the same network.
    """

    build: Callable[[int], nn.Module]
    resnets: dict[str, int]


def _torchvision(name: str, **kwargs) -> Callable[[int], nn.Module]:
    def build(num_classes: int) -> nn.Module:
        from torchvision import models  # here, so that `import rt_detectron` stays fast

        return getattr(models, name)(weights=None, num_classes=num_classes, **kwargs)

    return build


def _resnet(
    depth: int, groups: int = 1, width_per_group: int = 64, res2_channels: int = 256
) -> dict[str, int]:
    return {
        "DEPTH": depth,
        "NUM_GROUPS": groups,
        "WIDTH_PER_GROUP": width_per_group,
        "RES2_OUT_CHANNELS": res2_channels,
    }


# Names are the file stems of the published checkpoints. wide_resnet50_4 is not in torchvision: it is
# ResNet-50 with four times the bottleneck width (Salman et al. 2020, section 4).
ARCHITECTURES: dict[str, Architecture] = {
    "resnet18": Architecture(_torchvision("resnet18"), _resnet(18, res2_channels=64)),
    "resnet34": Architecture(_torchvision("resnet34"), _resnet(34, res2_channels=64)),
    "resnet50": Architecture(_torchvision("resnet50"), _resnet(50)),
    "resnet101": Architecture(_torchvision("resnet101"), _resnet(101)),
    "resnet152": Architecture(_torchvision("resnet152"), _resnet(152)),
    "wide_resnet50_2": Architecture(_torchvision("wide_resnet50_2"), _resnet(50, width_per_group=128)),
    "wide_resnet50_4": Architecture(
        _torchvision("resnet50", width_per_group=256), _resnet(50, width_per_group=256)
    ),
    "wide_resnet101_2": Architecture(_torchvision("wide_resnet101_2"), _resnet(101, width_per_group=128)),
    "resnext50_32x4d": Architecture(
        _torchvision("resnext50_32x4d"), _resnet(50, groups=32, width_per_group=4)
    ),
    "resnext101_32x8d": Architecture(
        _torchvision("resnext101_32x8d"), _resnet(101, groups=32, width_per_group=8)
    ),
}


def get_architecture(name: str) -> Architecture:
    """The table's entry for ``name``; an unknown one raises :class:`InputError` listing the known."""
    if name in ARCHITECTURES:
        return ARCHITECTURES[name]
    near = difflib.get_close_matches(str(name), ARCHITECTURES, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise InputError(f"unknown architecture {name!r}: {hint}known are {', '.join(ARCHITECTURES)}")


def build_classifier(arch: str, num_classes: int = 1000) -> nn.Module:
    """torchvision's network ``arch`` with ``num_classes`` outputs, randomly initialised."""
    return get_architecture(arch).build(num_classes)
