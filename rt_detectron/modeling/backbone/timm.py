"""timm's networks as Detectron2 backbones, by timm's own features_only models."""

import logging

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec, get_norm
from detectron2.modeling import BACKBONE_REGISTRY
from torch import Tensor, nn

from rt_detectron.checkpoint.architectures import TIMM_FAMILY, build_timm, get_architecture
from rt_detectron.modeling.backbone.resnet import TIMM_KEYS
from rt_detectron.modeling.backbone.trunk import (
    STAGES,
    STRIDES,
    Trunk,
    checked_features,
    chosen_arch,
    set_norms,
)
from rt_detectron.modeling.backbone.windows import put_windows, set_grid
from rt_detectron.utils.errors import InputError, one_line

logger = logging.getLogger(__name__)

# Multiples of 32 that no window, patch grid or pretraining size of another number divides.
PROBE = (96, 160)
OUT_NORMS = ("", "LN")
# What lets a network take images of any size, tried in this order.
ANY_SIZE: tuple[dict[str, bool], ...] = ({"dynamic_img_size": True}, {})


PLAIN_STRIDE = 16  # of the one feature of plain vision transformers, as the detectors have it


class TimmTrunk(Trunk):
    """A :class:`Trunk` whose network gives its features as a list, some networks with channels last.

    Args:
        trunk, shapes: as for :class:`Trunk`.
        out_norm: "LN" for a layer norm behind each feature, of its own and with fresh numbers; "" for none.
        patch: side of a plain vision transformer's patches. Images are resized by ``patch / 16`` in front of
            it, so that a patch covers 16 pixels of the image and the weights stay as they are.
    """

    def __init__(
        self,
        trunk: nn.Module,
        shapes: dict[str, ShapeSpec],
        patch: int = PLAIN_STRIDE,
        out_norm: str = "",
    ):
        super().__init__(trunk, shapes)
        self.patch = patch
        # A list, whose names hold no stage: the checkpointer asks for all of a stage in a backbone's file.
        channels = [shapes[name].channels for name in self._stages] if out_norm else []
        self.out_norms = nn.ModuleList(get_norm(out_norm, number) for number in channels)

    @property
    def _stages(self) -> list[str]:
        return sorted(self._out_features, key=STAGES.index)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        images = resized(images, self.patch)
        set_grid(self.trunk, images)
        return super().forward(images)

    def features(self, output: list[Tensor]) -> dict[str, Tensor]:
        features = _channels_first(self.trunk, output)
        if self.out_norms:
            features = [norm(feature) for norm, feature in zip(self.out_norms, features, strict=True)]
        return dict(zip(self._stages, features, strict=True))


@BACKBONE_REGISTRY.register()
def build_robust_timm_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> TimmTrunk:
    """The network MODEL.ROBUST.ARCH, ``timm/NAME``, with the features MODEL.RESNETS.OUT_FEATURES.

    res2 ... res5 are the last features of strides 4 ... 32; stages behind the last one wanted are not
    built. Networks of a fixed input size take any multiple of 32 if timm lets them.

    Raises:
        InputError: without timm; for a network that is none of timm's, has no features_only model, not the
            features wanted, or takes its own image size only; for settings that it cannot follow.
    """
    architecture = get_architecture(chosen_arch(cfg))
    architecture.check_family(TIMM_FAMILY)
    arch = architecture.name
    wanted = checked_features(cfg, arch)
    with torch.device("meta"):  # shapes alone, at no cost
        info = timm_features(arch).feature_info.info
        patch = _patch(arch, info)
        indices = _indices(arch, info, wanted)
        shapes = _shapes(arch, timm_features(arch, out_indices=indices), wanted, patch)
    trunk = timm_features(arch, out_indices=indices)
    _drop_unused_blocks(trunk)
    out_norm, window = (cfg.MODEL.ROBUST.get(key, off) for key, off in TIMM_KEYS.items())
    if out_norm not in OUT_NORMS:
        raise InputError(f"MODEL.ROBUST.OUT_NORM {out_norm!r}: LN, or nothing for none")
    if window:
        put_windows(trunk, arch, window)
    stages = _stage_modules(arch, trunk, info[: indices[-1] + 1]) if cfg.MODEL.BACKBONE.FREEZE_AT > 0 else {}
    set_norms(trunk, stages, cfg)
    if patch != PLAIN_STRIDE:
        logger.info("%s has patches of %d pixels: images are resized by %d/16", arch, patch, patch)
    return TimmTrunk(trunk, shapes, patch, out_norm)


def resized(images: Tensor, patch: int) -> Tensor:
    """(N, 3, H, W) to (N, 3, H * patch / 16, W * patch / 16); ``images`` themselves for patches of 16."""
    if patch == PLAIN_STRIDE:
        return images
    size = [side * patch // PLAIN_STRIDE for side in images.shape[2:]]
    return F.interpolate(images, size, mode="bilinear", align_corners=False, antialias=True)


def is_plain(info: list[dict]) -> bool:
    """Whether all of timm's features have one stride, as in plain vision transformers."""
    return len({feature["reduction"] for feature in info}) == 1


def _patch(arch: str, info: list[dict]) -> int:
    """The side of a plain transformer's patches, whose features then count as of stride 16; else 16.

    Raises:
        InputError: for patches that are neither of 14 nor of 16 pixels.
    """
    patch = info[0]["reduction"]
    if not is_plain(info) or patch == PLAIN_STRIDE:
        return PLAIN_STRIDE
    if patch != 14:
        raise InputError(f"{arch} has patches of {patch} pixels: choose a network with patches of 16 or 14")
    for feature in info:
        feature["reduction"] = PLAIN_STRIDE
    return patch


def timm_features(arch: str, **kwargs) -> nn.Module:
    """timm's features_only model of ``timm/NAME``, randomly initialised, for any image size if possible.

    Raises:
        InputError: if timm cannot build one.
    """
    try:
        for settings in ANY_SIZE:
            try:
                network = build_timm(arch, features_only=True, **settings, **kwargs)
                _shift_windows(network)
                return network
            except TypeError as error:
                if not any(key in str(error) for key in settings):
                    raise
    except Exception as error:  # each network refuses in its own way
        raise InputError(
            f"timm has no features of {arch} ({one_line(error)}): choose another network"
        ) from None


def _shift_windows(network: nn.Module) -> None:
    """Have Swin shift the windows of every second block, in place.

    At 224 pixels its res5 is one window, which it does not shift; in a detector it has many.
    """
    for block in network.modules():
        if any(getattr(block, "target_shift_size", ())):
            block.shift_size = tuple(side // 2 for side in block.window_size)


def _indices(arch: str, info: list[dict], wanted: list[str]) -> list[int]:
    """Where in timm's list of features the wanted ones are, each the last of its stride, in that order."""
    last = {feature["reduction"]: index for index, feature in enumerate(info)}
    missing = [name for name in wanted if STRIDES[name] not in last]
    if missing:
        found = [name for name, stride in STRIDES.items() if stride in last]
        raise InputError(
            f"{arch} has {', '.join(found) or 'features of other strides'} only, "
            f"{', '.join(missing)} missing: choose a network with strides "
            f"{', '.join(str(STRIDES[name]) for name in wanted)}"
        )
    return sorted(last[STRIDES[name]] for name in wanted)


def _shapes(arch: str, network: nn.Module, wanted: list[str], patch: int) -> dict[str, ShapeSpec]:
    """Channels and strides of the wanted features, on an image as detectors have them."""
    try:
        features = network.eval()(resized(torch.zeros(1, 3, *PROBE), patch))
    except Exception as error:  # each network refuses in its own way
        raise InputError(
            f"{arch} does not take images of any size ({one_line(error)}): choose another network"
        ) from None
    names = sorted(wanted, key=STAGES.index)
    by_name = dict(zip(names, _channels_first(network, features), strict=True))
    for name, feature in by_name.items():
        if feature.shape[2:] != tuple(side // STRIDES[name] for side in PROBE):
            raise InputError(
                f"{arch} gives {name} of {tuple(feature.shape[2:])} pixels for an image of {PROBE}, "
                f"which is not its stride {STRIDES[name]}: choose another network"
            )
    return {name: ShapeSpec(channels=by_name[name].shape[1], stride=STRIDES[name]) for name in wanted}


def _drop_unused_blocks(trunk: nn.Module) -> None:
    """Remove what lies behind the last feature, where timm's own features_only model keeps it."""
    from timm.models.efficientnet import EfficientNetFeatures
    from timm.models.mobilenetv3 import MobileNetV3Features

    if isinstance(trunk, (EfficientNetFeatures, MobileNetV3Features)):
        del trunk.blocks[trunk.feature_info.get_dicts()[-1]["stage"] :]


def _channels_first(network: nn.Module, features: list[Tensor]) -> list[Tensor]:
    if getattr(network, "output_fmt", "NCHW") == "NHWC":
        return [feature.permute(0, 3, 1, 2).contiguous() for feature in features]
    return features


def _stage_modules(arch: str, trunk: nn.Module, info: list[dict]) -> dict[str, list[str]]:
    """Names of the modules in each stage, after the features in ``info`` and the order of registration.

    The stem is all in front of the first layer of stride 4, or of the first feature if there is no earlier
    one: timm's features_only models rest on that order, too.
    """
    names = [name for name, _ in trunk.named_modules()]
    # features_only models write stages.0 as stages_0, or have the whole network as `model`.
    flat = [f"{name.removeprefix('model.').replace('.', '_')}_" if name else "" for name in names]
    found = [
        [i for i, name in enumerate(flat) if name.startswith(f"{feature['module'].replace('.', '_')}_")]
        for feature in info
    ]
    if not all(found):
        raise InputError(f"{arch} does not tell its stages apart: set MODEL.BACKBONE.FREEZE_AT 0")
    ends = {"stem": found[0][0]}
    for feature, positions in zip(info, found, strict=True):
        stage = next((s for s, stride in STRIDES.items() if stride == feature["reduction"]), "stem")
        ends[stage] = positions[-1] + 1
    starts = [0, *ends.values()]
    return {stage: names[start:end] for (stage, end), start in zip(ends.items(), starts, strict=False)}
