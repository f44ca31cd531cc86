"""ViTDet's simple pyramid on timm's plain vision transformers."""

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY
from detectron2.modeling.backbone.fpn import LastLevelMaxPool
from detectron2.modeling.backbone.vit import SimpleFeaturePyramid

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
    paper. MODEL.FPN.IN_FEATURES and MODEL.RESNETS.OUT_FEATURES have no say.

    Raises:
        InputError: as :func:`build_robust_timm_backbone`, and for a network with features of several strides.
    """
    net = bottom_up(build_robust_timm_backbone, cfg, input_shape, ["res4"])
    if not is_plain(net.trunk.feature_info.info):
        raise InputError(
            f"{chosen_arch(cfg)} is no plain vision transformer: "
            "set MODEL.BACKBONE.NAME to build_robust_timm_fpn_backbone"
        )
    return SimplePyramid(
        net=net,
        in_feature="res4",
        out_channels=cfg.MODEL.FPN.OUT_CHANNELS,
        scale_factors=(4.0, 2.0, 1.0, 0.5),
        top_block=LastLevelMaxPool(),
        norm=cfg.MODEL.FPN.NORM or "LN",
    )
