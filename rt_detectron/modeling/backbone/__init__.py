"""Backbone builders, in Detectron2's BACKBONE_REGISTRY as soon as this is imported."""

from rt_detectron.modeling.backbone.fpn import register_pyramids
from rt_detectron.modeling.backbone.resnet import build_robust_resnet_backbone, resolve_resnet
from rt_detectron.modeling.backbone.simple_pyramid import (
    build_retinanet_robust_timm_sfp_backbone,
    build_robust_timm_sfp_backbone,
)
from rt_detectron.modeling.backbone.timm import build_robust_timm_backbone
from rt_detectron.modeling.backbone.torchvision import build_robust_torchvision_backbone

__all__ = [
    "build_retinanet_robust_timm_sfp_backbone",
    "build_robust_resnet_backbone",
    "build_robust_timm_backbone",
    "build_robust_timm_sfp_backbone",
    "build_robust_torchvision_backbone",
    "resolve_resnet",
]

register_pyramids(build_robust_resnet_backbone, "a ResNet")
register_pyramids(build_robust_torchvision_backbone, "a torchvision network")
register_pyramids(build_robust_timm_backbone, "a timm network")
