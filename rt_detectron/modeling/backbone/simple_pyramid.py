"""ViTDet's simple pyramid on timm's plain vision transformers."""

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY
from detectron2.modeling.backbone.fpn import LastLevelMaxPool, LastLevelP6P7
from detectron2.modeling.backbone.vit import SimpleFeaturePyramid
from torch import nn

from rt_detectron.modeling.backbone.fpn import bottom_up
from rt_detectron.modeling.backbone.timm import build_robust_timm_backbone, is_plain
from rt_detectron.modeling.backbone.trunk import chosen_arch
from rt_detectron.utils.errors import InputError


class SimplePyramid(SimpleFeaturePyramid):
    """Detectron2's; it also tells its ``size_divisibility``, which other code asks a backbone for."""

    @property
    def size_divisibility(self) -> int:
        return self._size_divisibility


@BACKBONE_REGISTRY.register()
def build_robust_timm_sfp_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> SimplePyramid:
    """p2 ... p6 from the last feature of the plain vision transformer MODEL.ROBUST.ARCH.

    Plain transformers (ViT, DeiT, XCiT, DINO, EVA, CLIP) have one resolution, stride 16. Transposed
    convolutions and pooling make p2 ... p5 of it, and max pooling p6 (Li et al. 2022,
    https://arxiv.org/abs/2203.16527, section 3). MODEL.FPN.NORM is the pyramid's norm; "" is "LN", as in the
    paper. MODEL.FPN.IN_FEATURES and MODEL.RESNETS.OUT_FEATURES are ignored.

    Raises:
        InputError: as :func:`build_robust_timm_backbone`, for a network with features of several strides, and
            for a RetinaNet without p2, whose layers would get no gradients: several processes stop at that.
    """
    if cfg.MODEL.META_ARCHITECTURE == "RetinaNet" and "p2" not in cfg.MODEL.RETINANET.IN_FEATURES:
        raise InputError(
            "MODEL.RETINANET.IN_FEATURES has no p2, which this pyramid begins with: "
            "set MODEL.BACKBONE.NAME to build_retinanet_robust_timm_sfp_backbone"
        )
    return _simple_pyramid(cfg, input_shape, (4.0, 2.0, 1.0, 0.5), LastLevelMaxPool())


@BACKBONE_REGISTRY.register()
def build_retinanet_robust_timm_sfp_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> SimplePyramid:
    """p3 ... p7 for RetinaNet: p6 and p7 by convolution from p5, the others as those of
    :func:`build_robust_timm_sfp_backbone`.

    Raises:
        InputError: as :func:`build_robust_timm_backbone`, and for a network with features of several strides.
    """
    channels = cfg.MODEL.FPN.OUT_CHANNELS
    return _simple_pyramid(
        cfg, input_shape, (2.0, 1.0, 0.5), LastLevelP6P7(channels, channels, in_feature="p5")
    )


def _simple_pyramid(
    cfg: CfgNode, input_shape: ShapeSpec, scales: tuple[float, ...], top_block: nn.Module
) -> SimplePyramid:
    net = bottom_up(build_robust_timm_backbone, cfg, input_shape, ["res4"])
    if not is_plain(net.trunk.feature_info.info):
        fpn = cfg.MODEL.BACKBONE.NAME.replace("_sfp_", "_fpn_")
        raise InputError(
            f"{chosen_arch(cfg)} is no plain vision transformer: set MODEL.BACKBONE.NAME to {fpn}"
        )
    return SimplePyramid(
        net=net,
        in_feature="res4",
        out_channels=cfg.MODEL.FPN.OUT_CHANNELS,
        scale_factors=scales,
        top_block=top_block,
        norm=cfg.MODEL.FPN.NORM or "LN",
    )
