"""Backbone builders, in Detectron2's BACKBONE_REGISTRY as soon as this is imported."""

from rt_detectron.modeling.backbone.fpn import (
    build_retinanet_robust_resnet_fpn_backbone,
    build_retinanet_robust_timm_fpn_backbone,
    build_retinanet_robust_torchvision_fpn_backbone,
    build_robust_resnet_fpn_backbone,
    build_robust_timm_fpn_backbone,
    build_robust_torchvision_fpn_backbone,
)
from rt_detectron.modeling.backbone.resnet import build_robust_resnet_backbone, resolve_resnet
from rt_detectron.modeling.backbone.timm import build_robust_timm_backbone
from rt_detectron.modeling.backbone.torchvision import build_robust_torchvision_backbone

__all__ = [
    "build_retinanet_robust_resnet_fpn_backbone",
    "build_retinanet_robust_timm_fpn_backbone",
    "build_retinanet_robust_torchvision_fpn_backbone",
    "build_robust_resnet_backbone",
    "build_robust_resnet_fpn_backbone",
    "build_robust_timm_backbone",
    "build_robust_timm_fpn_backbone",
    "build_robust_torchvision_backbone",
    "build_robust_torchvision_fpn_backbone",
    "resolve_resnet",
]
