"""What the backbones on torchvision's and timm's networks share: names, norms, freezing and shapes."""

import logging

from detectron2.config import CfgNode
from detectron2.layers import FrozenBatchNorm2d, ShapeSpec
from detectron2.modeling import Backbone
from torch import Tensor, nn

from rt_detectron.checkpoint.weights import check_config
from rt_detectron.layers.eval_norm import keep_statistics
from rt_detectron.layers.sync_bn import synchronised
from rt_detectron.modeling.backbone.resnet import has_c4_head
from rt_detectron.utils.errors import InputError

logger = logging.getLogger(__name__)

STRIDES = {"res2": 4, "res3": 8, "res4": 16, "res5": 32}
STAGES = ("stem", *STRIDES)  # in the order of MODEL.BACKBONE.FREEZE_AT, which counts from 1
NORMS = ("FrozenBN", "EvalBN", "BN", "SyncBN")


class Trunk(Backbone):
    """A classification network without its head, as a Detectron2 backbone.

    Its tensors are called ``trunk.`` and the name in the network. Images are (N, 3, H, W) under the weights'
    own preprocessing, H and W multiples of 32; ``forward`` gives ``{"res2": (N, C, H / 4, W / 4), ...}``.

    Args:
        trunk: what images go through; ``features`` turns its output into features by name.
        shapes: channels and stride of each feature that is given, in their order.
    """

    size_divisibility = 32

    def __init__(self, trunk: nn.Module, shapes: dict[str, ShapeSpec]):
        super().__init__()
        self.trunk = trunk
        self._out_features = list(shapes)
        self._out_feature_channels = {name: shape.channels for name, shape in shapes.items()}
        self._out_feature_strides = {name: shape.stride for name, shape in shapes.items()}

    def features(self, output) -> dict[str, Tensor]:
        return output

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        features = self.features(self.trunk(images))
        return {name: features[name] for name in self._out_features}


def chosen_arch(cfg: CfgNode) -> str:
    """``MODEL.ROBUST.ARCH``.

    Raises:
        InputError: if the key is missing or empty.
    """
    if "ROBUST" not in cfg.MODEL:
        raise InputError("there is no MODEL.ROBUST.ARCH: call rt_detectron.config.add_robust_config(cfg)")
    if not cfg.MODEL.ROBUST.ARCH:
        raise InputError("MODEL.ROBUST.ARCH is empty: name the network, e.g. densenet or timm/convnext_tiny")
    return cfg.MODEL.ROBUST.ARCH


def checked_features(cfg: CfgNode, arch: str) -> list[str]:
    """``MODEL.RESNETS.OUT_FEATURES``, once what only ResNets can follow is ruled out. Logs what is built.

    Raises:
        InputError: for other names than res2 ... res5, a NORM other than :data:`NORMS`, and for
            DC5 and C4 detectors.
    """
    check_config(cfg)
    resnets = cfg.MODEL.RESNETS
    if not resnets.OUT_FEATURES or not set(resnets.OUT_FEATURES) <= set(STRIDES):
        raise InputError(
            f"MODEL.RESNETS.OUT_FEATURES {list(resnets.OUT_FEATURES)}: {arch} has {', '.join(STRIDES)}"
        )
    if resnets.NORM not in NORMS:
        raise InputError(f"MODEL.RESNETS.NORM {resnets.NORM!r}: {arch} takes {', '.join(NORMS)}")
    if resnets.RES5_DILATION != 1:
        raise InputError(
            f"a dilated res5 (DC5) needs a ResNet, {arch} is none: set MODEL.RESNETS.RES5_DILATION 1"
        )
    if has_c4_head(cfg):
        raise InputError(
            f"{cfg.MODEL.ROI_HEADS.NAME} (C4) has a ResNet's res5, {arch} has none: "
            "choose a ResNet or an FPN detector"
        )
    logger.info(
        "building %s (features %s, NORM %s, FREEZE_AT %s)",
        arch,
        ", ".join(resnets.OUT_FEATURES),
        resnets.NORM,
        cfg.MODEL.BACKBONE.FREEZE_AT,
    )
    return list(resnets.OUT_FEATURES)


def set_norms(trunk: nn.Module, stages: dict[str, list[str]], cfg: CfgNode) -> None:
    """Give ``trunk`` its MODEL.RESNETS.NORM and freeze its first MODEL.BACKBONE.FREEZE_AT stages, in place.

    As in Detectron2's ResNet, 1 freezes the stem, 2 also res2, ...: no gradients, and fixed batch norm.

    Args:
        stages: names of the modules of each of :data:`STAGES`; of a module only its own parameters count,
            not those of the modules in it.
    """
    convert = {
        "FrozenBN": _frozen,
        "EvalBN": _of_fixed_statistics,
        "BN": lambda module: module,
        "SyncBN": synchronised,
    }
    for name, module in list(trunk.named_modules()):
        if isinstance(module, nn.BatchNorm2d):
            trunk.set_submodule(name, convert[cfg.MODEL.RESNETS.NORM](module))
    for stage in STAGES[: max(cfg.MODEL.BACKBONE.FREEZE_AT, 0)]:
        for name in stages.get(stage, []):
            module = trunk.get_submodule(name)
            for parameter in module.parameters(recurse=False):
                parameter.requires_grad = False
            if isinstance(module, (nn.BatchNorm2d, nn.SyncBatchNorm)):
                trunk.set_submodule(name, _frozen(module))


# timm has layers that are batch norm and activation in one, and conversions that keep the activation.
def _frozen(norm: nn.Module) -> nn.Module:
    if hasattr(norm, "act"):
        from timm.layers import freeze_batch_norm_2d

        return freeze_batch_norm_2d(norm)
    frozen = FrozenBatchNorm2d.convert_frozen_batchnorm(norm)
    frozen.num_batches_tracked = None  # as in Detectron2's ResNet; weights' files do not have it
    return frozen


def _of_fixed_statistics(norm: nn.Module) -> nn.Module:
    if type(norm) is not nn.BatchNorm2d:
        raise InputError(
            f"MODEL.RESNETS.NORM EvalBN is for plain batch norm, and this network has {type(norm).__name__}: "
            "set FrozenBN"
        )
    return keep_statistics(norm)
