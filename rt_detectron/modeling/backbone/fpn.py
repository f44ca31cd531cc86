"""Detectron2's two pyramids on the backbones of this folder."""

from collections.abc import Callable

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, FPN, Backbone
from detectron2.modeling.backbone.fpn import LastLevelMaxPool, LastLevelP6P7

from rt_detectron.modeling.backbone.trunk import STRIDES
from rt_detectron.utils.errors import InputError

Builder = Callable[[CfgNode, ShapeSpec], Backbone]


def register_pyramids(build: Builder, network: str) -> None:
    """Register Detectron2's two pyramids on the backbones of one builder.

    For ``build_robust_x_backbone`` they are ``build_robust_x_fpn_backbone``, with p6 by max pooling, for
    Faster and Mask R-CNN, and ``build_retinanet_robust_x_fpn_backbone``, with p6 and p7 by convolution from
    res5.

    Args:
        build: the registered builder.
        network: what it builds, for the docstrings.
    """

    def fpn(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
        return _pyramid(_contiguous(build, cfg, input_shape), cfg, LastLevelMaxPool())

    def retinanet(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
        stages = _contiguous(build, cfg, input_shape)
        channels = stages.output_shape()["res5"].channels
        return _pyramid(stages, cfg, LastLevelP6P7(channels, cfg.MODEL.FPN.OUT_CHANNELS))

    name = build.__name__.removesuffix("_backbone")
    fpn.__name__ = f"{name}_fpn_backbone"
    fpn.__doc__ = f"FPN with p6 by max pooling, for Faster and Mask R-CNN, on {network}."
    retinanet.__name__ = f"{name.replace('build_', 'build_retinanet_', 1)}_fpn_backbone"
    retinanet.__doc__ = f"FPN with p6 and p7 by convolution from res5, for RetinaNet, on {network}."
    for pyramid in (fpn, retinanet):
        pyramid.__qualname__ = pyramid.__name__
        BACKBONE_REGISTRY.register(pyramid)


def _contiguous(build: Builder, cfg: CfgNode, input_shape: ShapeSpec) -> Backbone:
    """The backbone with just the features that the pyramid stands on, MODEL.FPN.IN_FEATURES.

    Raises:
        InputError: as ``build``, and if these are not contiguous up to res5, on which both pyramids end.
    """
    wanted, known = list(cfg.MODEL.FPN.IN_FEATURES), list(STRIDES)
    if not wanted or wanted != known[-len(wanted) :]:
        raise InputError(
            f"MODEL.FPN.IN_FEATURES {wanted}: a pyramid needs {known}, or fewer of them that end with res5"
        )
    return bottom_up(build, cfg, input_shape, wanted)


def bottom_up(build: Builder, cfg: CfgNode, input_shape: ShapeSpec, features: list[str]) -> Backbone:
    """The backbone with just these features, whatever MODEL.RESNETS.OUT_FEATURES says."""
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.RESNETS.OUT_FEATURES = features
    # Detectron2's default, a C4 head, stands on no pyramid, so its demands do not count.
    cfg.MODEL.ROI_HEADS.NAME = "StandardROIHeads"
    return build(cfg, input_shape)


def _pyramid(stages: Backbone, cfg: CfgNode, top_block: LastLevelMaxPool | LastLevelP6P7) -> FPN:
    return FPN(
        bottom_up=stages,
        in_features=cfg.MODEL.FPN.IN_FEATURES,
        out_channels=cfg.MODEL.FPN.OUT_CHANNELS,
        norm=cfg.MODEL.FPN.NORM,
        top_block=top_block,
        fuse_type=cfg.MODEL.FPN.FUSE_TYPE,
    )
