"""The table of networks, and the names of their tensors in a Detectron2 backbone.

A new architecture of a known family is one entry here.
"""

import functools
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from rt_detectron.checkpoint.conv_stem import first_convolution, put_conv_stem
from rt_detectron.checkpoint.ra_resnet import PUBLISHED_NAMES, build_ra_resnet
from rt_detectron.utils.errors import InputError, did_you_mean, one_line, optional_import

TIMM = "timm/"  # before the name of a network of timm's
CONV_STEM = "stem=conv"  # behind that name: see rt_detectron.checkpoint.conv_stem
# What may be chosen behind that name: kinds of layers, and numbers.
TIMM_LAYERS = ("act_layer", "norm_layer", "aa_layer")
TIMM_NUMBERS = ("depth", "window_size")

# What torchvision's and the published classifiers subtract and divide by. RGB, 0..255.
IMAGENET_MEAN = (123.675, 116.28, 103.53)
IMAGENET_STD = (58.395, 57.12, 57.375)

_BUILDERS = {
    None: "build_robust_{}_backbone",
    "fpn": "build_robust_{}_fpn_backbone",
    "retinanet": "build_retinanet_robust_{}_fpn_backbone",
    "sfp": "build_robust_{}_sfp_backbone",
    "retinanet_sfp": "build_retinanet_robust_{}_sfp_backbone",
}


@dataclass(frozen=True)
class Family:
    """What all networks of one backbone builder share.

    Attributes:
        name: part of the builders' names.
        title: in messages.
        backbone_names: ``backbone_names(architecture, names)`` gives a dict from the names of a classifier's
            tensors, as far as its backbone has them, to those in the backbone.
        translate: ``translate(architecture, state_dict)`` gives a state dict under the network's own names,
            from any names that the family's library still reads.
    """

    name: str
    title: str
    backbone_names: "Callable[[Architecture, list[str]], dict[str, str]]"
    translate: "Callable[[Architecture, dict[str, Tensor]], dict[str, Tensor]]" = lambda _, tensors: tensors

    def builder(self, detector: str | None = None) -> str:
        """The builder in Detectron2's BACKBONE_REGISTRY: bare, or with a pyramid.

        Args:
            detector: None, "fpn", "retinanet", or, on plain transformers, "sfp" and "retinanet_sfp", ViTDet's
                simple pyramid.

        Raises:
            InputError: for another detector, and for a simple pyramid on a network that has none.
        """
        if detector not in _BUILDERS:
            raise InputError(f"unknown detector {detector!r}: {', '.join(map(repr, _BUILDERS))}")
        if detector in ("sfp", "retinanet_sfp") and self.name != "timm":
            other = "fpn" if detector == "sfp" else "retinanet"
            raise InputError(
                f"the simple pyramid is for plain vision transformers: take {other!r} on a {self.title}"
            )
        return _BUILDERS[detector].format(self.name)


# A regular expression and what takes its place; each on the outcome of the one before it.
Rules = tuple[tuple[str, str | Callable[[re.Match[str]], str]], ...]


def _renamed(name: str, rules: Rules) -> str:
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


# torchvision's ResNets -> Detectron2's.
_TO_DETECTRON2: Rules = (
    (r"^(conv1|bn1)\.", r"stem.\1."),
    (r"^layer(\d)\.", lambda match: f"res{int(match[1]) + 1}."),
    (r"\bbn(\d)\.", r"conv\1.norm."),
    (r"\bdownsample\.0\.", "shortcut."),
    (r"\bdownsample\.1\.", "shortcut.norm."),
)


def _detectron2_names(architecture: "Architecture", names: list[str]) -> dict[str, str]:
    """``layer1.0.downsample.1.bias`` to ``res2.0.shortcut.norm.bias``: Detectron2 has its own ResNets."""
    return {name: _renamed(name, _TO_DETECTRON2) for name in names}


def _trunk_names(architecture: "Architecture", names: list[str]) -> dict[str, str]:
    """``features.conv0.weight`` to ``trunk.features.conv0.weight``: a feature extractor wraps the network."""
    return {name: f"trunk.{name}" for name in names}


def _timm_names(architecture: "Architecture", names: list[str]) -> dict[str, str]:
    """Names in timm's features_only model, which flattens ``stages.0`` to ``stages_0``."""
    with torch.device("meta"):
        features = build_timm(architecture.name, features_only=True)
    flat = {name.removeprefix("model.").replace(".", "_"): name for name in features.state_dict()}
    return {name: f"trunk.{flat[key]}" for name in names if (key := name.replace(".", "_")) in flat}


# What timm resamples where a file is of another image, patch or window size.
_RESAMPLED = ("pos_embed", "patch_embed.proj.weight", "relative_position_bias_table")


# mmpretrain's names of ConvNeXt -> those of its authors, which timm reads.
_MMPRETRAIN: Rules = (
    (r"\.depthwise_conv\.", ".dwconv."),
    (r"\.pointwise_conv(\d)\.", r".pwconv\1."),
    (r"^norm3\.", "norm."),
    (r"^head\.fc\.", "head."),
)


def _current_timm_names(architecture: "Architecture", tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """timm's own translation of files of its earlier releases and of a network's original authors.

    It also resamples tensors of another image, patch or window size, so that the network would compute
    something else: then the tensors stay as they are, and do not fit.
    """
    network = architecture.skeleton
    if any(".depthwise_conv." in name for name in tensors):
        tensors = {_renamed(name, _MMPRETRAIN): tensor for name, tensor in tensors.items()}
    translate = getattr(sys.modules[type(network).__module__], "checkpoint_filter_fn", None)
    if translate is None:
        return tensors
    if "class_embedding" in tensors:  # CLIP's image encoder by itself, of which timm knows the whole CLIP
        tensors = {f"visual.{name}": tensor for name, tensor in tensors.items()}
    found = dict(translate(dict(tensors), network))
    sizes = {tensor.numel() for tensor in tensors.values()}
    if "pos_embed" in tensors:  # DINOv2's with registers loses its class token's
        sizes.add(tensors["pos_embed"][:, 1:].numel())
    resampled = [n for n, tensor in found.items() if n.endswith(_RESAMPLED) and tensor.numel() not in sizes]
    return tensors if resampled else found


def _current_torchvision_names(architecture: "Architecture", tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Files of the implementations that torchvision's began as have older names in the same network."""
    if tensors.keys() >= architecture.backbone_names.keys():
        return tensors
    older = {_renamed(name, architecture.older_names): tensor for name, tensor in tensors.items()}
    return older if older.keys() >= architecture.backbone_names.keys() else tensors


RESNET = Family("resnet", "ResNet", _detectron2_names)
TORCHVISION = Family("torchvision", "torchvision network", _trunk_names, _current_torchvision_names)
TIMM_FAMILY = Family("timm", "timm network", _timm_names, _current_timm_names)


@dataclass(frozen=True, eq=False)
class Architecture:
    """One network: its classifier, and the Detectron2 backbone made of it.

    Attributes:
        name: of the table, or ``timm/NAME``.
        family: whose builder makes its backbone.
        build: ``build(num_classes)`` gives the classifier, randomly initialised.
        stem: name of the first convolution.
        head: prefixes of the tensors that only the classifier has.
        resnets: the ``MODEL.RESNETS`` keys that describe the same network, if it is one of Detectron2's.
        taps: where the other torchvision networks yield stem, res2 (stride 4) ... res5 (stride 32), as node
            names of :func:`torchvision.models.feature_extraction.create_feature_extractor`.
        older_names: turn the names in files of the network's authors into those of the same tensors here.
        pixel_mean, pixel_std: what the classifier subtracts and divides by unless its file says otherwise.
            RGB, 0..255.
    """

    name: str
    family: Family
    build: Callable[[int], nn.Module]
    stem: str
    head: str
    resnets: dict[str, int] = field(default_factory=dict)
    taps: dict[str, str] = field(default_factory=dict)
    older_names: Rules = ()
    pixel_mean: tuple[float, ...] = IMAGENET_MEAN
    pixel_std: tuple[float, ...] = IMAGENET_STD

    @functools.cached_property
    def skeleton(self) -> nn.Module:
        """The classifier with 1000 classes in eval mode, with the shapes of its tensors and no numbers."""
        with torch.device("meta"):
            return self.build(1000).eval()

    @functools.cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the tensors of the classifier with 1000 classes."""
        return {name: tuple(tensor.shape) for name, tensor in self.skeleton.state_dict().items()}

    @functools.cached_property
    def backbone_names(self) -> dict[str, str]:
        """Names of the classifier's tensors to names in the backbone, for those that the backbone has.

        BN's counters, which no backbone uses, are left out.
        """
        names = [name for name in self.shapes if not name.startswith(self.head) and not is_counter(name)]
        return self.family.backbone_names(self, names)

    def builder(self, detector: str | None = None) -> str:
        """See :meth:`Family.builder`."""
        return self.family.builder(detector)

    def check_family(self, *families: Family) -> None:
        """Raise :class:`InputError` unless a builder of one of these families makes the backbone."""
        if self.family not in families:
            raise InputError(
                f"{self.name} is a {self.family.title}: set MODEL.BACKBONE.NAME to {self.builder()} or "
                f"{self.builder('fpn')}"
            )


def _torchvision(name: str, **kwargs) -> Callable[[int], nn.Module]:
    def build(num_classes: int) -> nn.Module:
        from torchvision import models  # here, so that `import rt_detectron` stays fast

        return getattr(models, name)(weights=None, num_classes=num_classes, **kwargs)

    return build


def _resnet(
    name: str,
    depth: int,
    groups: int = 1,
    width_per_group: int = 64,
    res2_channels: int = 256,
    torchvision_name: str = "",
) -> Architecture:
    resnets = {
        "DEPTH": depth,
        "NUM_GROUPS": groups,
        "WIDTH_PER_GROUP": width_per_group,
        "RES2_OUT_CHANNELS": res2_channels,
    }
    build = _torchvision(torchvision_name or name, groups=groups, width_per_group=width_per_group)
    return Architecture(name, RESNET, build, stem="conv1", head="fc.", resnets=resnets)


def _tapped(
    name: str, torchvision_name: str, stem: str, head: str, taps: str, older: Rules = ()
) -> Architecture:
    """``taps``: those of the stem and of res2 ... res5, with blanks between them."""
    stages = ("stem", "res2", "res3", "res4", "res5")
    by_stage = dict(zip(stages, taps.split(), strict=True))
    build = _torchvision(torchvision_name)
    return Architecture(name, TORCHVISION, build, stem, head, taps=by_stage, older_names=older)


def _ra_resnet(name: str, depths: tuple[int, ...], widths: tuple[int, ...]) -> Architecture:
    def build(num_classes: int) -> nn.Module:
        return build_ra_resnet(depths, widths, num_classes)

    taps = {"stem": "stem", **{f"res{stage + 1}": f"trunk_output.block{stage}" for stage in (1, 2, 3, 4)}}
    return Architecture(
        name, TORCHVISION, build, stem="stem.0", head="fc.", taps=taps, older_names=PUBLISHED_NAMES
    )


# A block of MobileNetV2 was one flat list of layers: its activations, without tensors, are counted, too.
_OLDER_MOBILENET: Rules = (
    (r"^features\.1\.conv\.([01])\.", r"features.1.conv.0.\1."),
    (r"^features\.1\.conv\.3\.", "features.1.conv.1."),
    (r"^features\.1\.conv\.4\.", "features.1.conv.2."),
    (r"^features\.(?!1\.)(\d+)\.conv\.([01])\.(?=[a-z])", r"features.\1.conv.0.\2."),
    (r"^features\.(\d+)\.conv\.3\.", r"features.\1.conv.1.0."),
    (r"^features\.(\d+)\.conv\.4\.", r"features.\1.conv.1.1."),
    (r"^features\.(\d+)\.conv\.6\.", r"features.\1.conv.2."),
    (r"^features\.(\d+)\.conv\.7\.", r"features.\1.conv.3."),
    (r"^classifier\.(?=[a-z])", "classifier.1."),
)
# As torchvision's own files of DenseNet still have them.
_OLDER_DENSENET: Rules = ((r"\.(norm|relu|conv)\.(\d)\.", r".\1\2."),)


# Names are the file stems of the published checkpoints. wide_resnet50_4 is not in torchvision: it is
# ResNet-50 with four times the bottleneck width (Salman et al. 2020, section 4).
_TABLE = (
    _resnet("resnet18", 18, res2_channels=64),
    _resnet("resnet34", 34, res2_channels=64),
    _resnet("resnet50", 50),
    _resnet("resnet101", 101),
    _resnet("resnet152", 152),
    _resnet("wide_resnet50_2", 50, width_per_group=128),
    _resnet("wide_resnet50_4", 50, width_per_group=256, torchvision_name="resnet50"),
    _resnet("wide_resnet101_2", 101, width_per_group=128),
    _resnet("resnext50_32x4d", 50, groups=32, width_per_group=4),
    _resnet("resnext101_32x8d", 101, groups=32, width_per_group=8),
    # The last tap of each stride, after its activation; res5 is all that the classifier pools, so that
    # no trained layer is lost.
    _tapped(
        "densenet",
        "densenet161",
        "features.conv0",
        "classifier.",
        "features.pool0 features.transition1.relu features.transition2.relu features.transition3.relu relu",
        _OLDER_DENSENET,
    ),
    _tapped(
        "mnasnet", "mnasnet1_0", "layers.0", "classifier.", "layers.7 layers.8 layers.9 layers.11 layers.16"
    ),
    _tapped(
        "mobilenet",
        "mobilenet_v2",
        "features.0.0",
        "classifier.",
        "features.1 features.3 features.6 features.13 features.18",
        _OLDER_MOBILENET,
    ),
    _tapped("shufflenet", "shufflenet_v2_x1_0", "conv1.0", "fc.", "conv1 maxpool stage2 stage3 conv5"),
    _tapped(
        "vgg16_bn",
        "vgg16_bn",
        "features.0",
        "classifier.",
        "features.13 features.22 features.32 features.42 features.43",
    ),
    # Peng et al. 2023; depths and widths as their code has them.
    _ra_resnet("ra_resnet50", (5, 8, 13, 1), (288, 576, 1120, 2160)),
    _ra_resnet("ra_resnet101", (7, 11, 18, 1), (336, 672, 1328, 2624)),
    _ra_resnet("ra_wrn101_2", (7, 11, 18, 1), (512, 1024, 2016, 4032)),
)
ARCHITECTURES = {architecture.name: architecture for architecture in _TABLE}


def get_architecture(name: "str | Architecture") -> Architecture:
    """The table's entry for ``name``, or timm's network for ``timm/NAME``; an architecture is itself.

    ``timm/NAME:KEY=VALUE`` has timm build it of other layers, or of more or fewer:
    ``timm/resnet50:act_layer=gelu``, ``timm/xcit_medium_24_p16_224:depth=12``. With ``stem=conv`` it has the
    convolutional stem of Singh et al. (2023): ``timm/convnext_tiny:stem=conv``.

    Raises:
        InputError: for an unknown name, listing the known; for a timm name without timm installed.
    """
    if isinstance(name, Architecture):
        return name
    name = str(name)
    if name.startswith(TIMM):
        return _timm_architecture(name)
    if name in ARCHITECTURES:
        return ARCHITECTURES[name]
    raise InputError(
        f"unknown architecture {name!r}; known are {', '.join(ARCHITECTURES)} and timm/NAME"
        f"{did_you_mean(name, ARCHITECTURES)}"
    )


def import_timm():
    """The module timm; an :class:`InputError` where it is missing."""
    return optional_import("timm", "timm>=1.0.31", "timm networks")


def split_timm(arch: str) -> tuple[str, dict[str, str]]:
    """timm's name and what is built otherwise: ``timm/resnet50:act_layer=gelu`` has {"act_layer": "gelu"}.

    Besides timm's own arguments there is ``stem=conv``, see :mod:`rt_detectron.checkpoint.conv_stem`.

    Raises:
        InputError: for other arguments: the name may come from a file, and not all of timm's are harmless.
    """
    name, _, text = arch.removeprefix(TIMM).partition(":")
    arguments = {}
    for part in filter(None, text.split(",")):
        key, _, value = part.partition("=")
        is_layer = key in TIMM_LAYERS and value.isidentifier()
        is_number = key in TIMM_NUMBERS and re.fullmatch("[1-9][0-9]?", value)
        if part != CONV_STEM and not is_layer and not is_number:
            layers, numbers = (f"{'=NAME, '.join(TIMM_LAYERS)}=NAME", f"{'=N, '.join(TIMM_NUMBERS)}=N")
            raise InputError(f"{arch}: {part!r} is none of {CONV_STEM}, {layers}, {numbers}")
        arguments[key] = value
    return name, arguments


def build_timm(arch: str, **kwargs) -> nn.Module:
    """timm's network ``timm/NAME`` or ``timm/NAME:act_layer=gelu``, randomly initialised."""
    name, chosen = split_timm(arch)
    has_conv_stem = bool(chosen.pop("stem", ""))
    arguments = {key: _timm_argument(key, value) for key, value in chosen.items()}
    is_classifier = not kwargs.get("features_only")
    if has_conv_stem and not is_classifier:
        kwargs["feature_cls"] = "getter"  # keeps the classifier's modules, so that the stem is one of them
    network = import_timm().create_model(name, pretrained=False, **arguments, **kwargs)
    if has_conv_stem:
        put_conv_stem(network if is_classifier else network.model, name)
    return network


def _timm_argument(key: str, value: str) -> object:
    """What timm takes for ``value``; of norms the class, since not all of its networks know them by name."""
    if key in TIMM_NUMBERS:
        return int(value)
    if key == "norm_layer":
        from timm.layers import get_norm_layer

        return get_norm_layer(value)
    return value


@functools.cache
def _timm_architecture(arch: str) -> Architecture:
    timm = import_timm()
    name, arguments = split_timm(arch)
    if not timm.is_model(name):
        raise InputError(f"timm has no model {name!r}{did_you_mean(name, timm.list_models())}")
    config = timm.get_pretrained_cfg(name)
    first_conv, classifier = getattr(config, "first_conv", None), getattr(config, "classifier", None)
    if "stem" in arguments:
        first_conv = first_convolution(name)
    if not isinstance(first_conv, str) or not isinstance(classifier, str):
        raise InputError(
            f"timm/{name} has no single first convolution and classifier: choose another network"
        )
    architecture = Architecture(
        arch,
        TIMM_FAMILY,
        lambda num_classes: build_timm(arch, num_classes=num_classes),
        stem=first_conv,
        head=f"{classifier}.",
        pixel_mean=tuple(round(255 * value, 4) for value in config.mean),
        pixel_std=tuple(round(255 * value, 4) for value in config.std),
    )
    try:
        _ = architecture.shapes if arguments else ()
    except Exception as error:  # each network refuses in its own way
        raise InputError(f"timm cannot build {arch}: {one_line(error)[:200]}") from None
    return architecture


def build_classifier(arch: str | Architecture, num_classes: int = 1000) -> nn.Module:
    """The network ``arch`` with ``num_classes`` logits, randomly initialised. Raises as get_architecture."""
    return get_architecture(arch).build(num_classes)


def is_counter(name: str) -> bool:
    """Whether a tensor is batch norm's ``num_batches_tracked``, which no output depends on."""
    return name.endswith(".num_batches_tracked")


def misfits(state_dict: dict[str, Tensor], architecture: Architecture) -> list[tuple[str, str]]:
    """What is wrong with ``state_dict``: (kind, description of a tensor), in the order of kinds.

    The kinds are "missing", "unexpected" and "misshaped". The number of classes is free, and so is the
    presence of BN's ``num_batches_tracked`` and of all that only the classifier has: a backbone has no use
    for them.
    """
    head, known = architecture.head, architecture.shapes
    found = {name: tuple(tensor.shape) for name, tensor in state_dict.items()}
    needed = known if any(name.startswith(head) for name in found) else architecture.backbone_names
    missing = [("missing", name) for name in needed if name not in found and not is_counter(name)]
    unexpected = [("unexpected", name) for name in found if name not in known]
    misshaped = [
        ("misshaped", f"{name} {found[name]} instead of {shape}")
        for name, shape in known.items()
        if name in found and not _same_shape(found[name], shape, any_classes=name.startswith(head))
    ]
    return missing + unexpected + misshaped


def describe(found: list[tuple[str, str]]) -> str:
    """The outcome of :func:`misfits` in words, five tensors of each kind."""
    parts = []
    for kind in ("missing", "unexpected", "misshaped"):
        names = [name for problem, name in found if problem == kind]
        more = f" and {len(names) - 5} more" if len(names) > 5 else ""
        if names:
            parts.append(f"{kind} {', '.join(names[:5])}{more}")
    return "; ".join(parts)


def _same_shape(found: tuple[int, ...], needed: tuple[int, ...], any_classes: bool) -> bool:
    return (found[1:] == needed[1:] and len(found) == len(needed)) if any_classes else found == needed
