"""Detectron2's two pyramids on the ResNets of :mod:`rt_detectron.modeling.backbone.resnet`."""

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, FPN
from detectron2.modeling.backbone.fpn import build_resnet_fpn_backbone, build_retinanet_resnet_fpn_backbone

from rt_detectron.modeling.backbone.resnet import resolve_resnet


@BACKBONE_REGISTRY.register()
def build_robust_resnet_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """FPN with p6 by max pooling, for Faster and Mask R-CNN. Raises as :func:`resolve_resnet`."""
    return build_resnet_fpn_backbone(resolve_resnet(cfg), input_shape)


@BACKBONE_REGISTRY.register()
def build_retinanet_robust_resnet_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """FPN with p6 and p7 by convolution from res5, for RetinaNet. Raises as :func:`resolve_resnet`."""
    return build_retinanet_resnet_fpn_backbone(resolve_resnet(cfg), input_shape)
