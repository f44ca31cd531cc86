"""torchvision's networks as Detectron2 backbones, by torchvision's own feature extraction."""

import torch
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from torch import fx

from rt_detectron.checkpoint.architectures import RESNET, TORCHVISION, Architecture, get_architecture
from rt_detectron.modeling.backbone.resnet import build_robust_resnet_backbone, refuse_timm_keys
from rt_detectron.modeling.backbone.trunk import STAGES, Trunk, checked_features, chosen_arch, set_norms


@BACKBONE_REGISTRY.register()
def build_robust_torchvision_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> Backbone:
    """The network MODEL.ROBUST.ARCH with the features MODEL.RESNETS.OUT_FEATURES, and no deeper layer.

    Any of :data:`rt_detectron.checkpoint.architectures.ARCHITECTURES`: a ResNet is built as by
    :func:`build_robust_resnet_backbone`, so a sweep over architectures changes ARCH and WEIGHTS only.

    Raises:
        InputError: for a network that is none of torchvision's, and for settings it cannot follow.
    """
    architecture = get_architecture(chosen_arch(cfg))
    architecture.check_family(RESNET, TORCHVISION)
    if architecture.family is RESNET:
        return build_robust_resnet_backbone(cfg, input_shape)
    refuse_timm_keys(cfg, architecture.name)
    wanted = checked_features(cfg, architecture.name)
    depth = max(map(STAGES.index, wanted)) + 1
    trunk = _extractor(architecture, {stage: architecture.taps[stage] for stage in STAGES[:depth]})
    side = 32
    with torch.no_grad():
        features = trunk.eval()(torch.zeros(1, 3, side, side))
    shapes = {
        name: ShapeSpec(channels=features[name].shape[1], stride=side // features[name].shape[3])
        for name in wanted
    }
    set_norms(trunk, _stage_modules(trunk), cfg)
    return Trunk(trunk.train(), shapes)


def _extractor(architecture: Architecture, taps: dict[str, str]) -> fx.GraphModule:
    """Images to a dict with one tensor for each of ``taps``, without any layer behind the last."""
    from torchvision.models.feature_extraction import create_feature_extractor

    return create_feature_extractor(architecture.build(1), {node: stage for stage, node in taps.items()})


def _stage_modules(trunk: fx.GraphModule) -> dict[str, list[str]]:
    """Names of the modules that lead to each of the extractor's taps, in the order of computation."""
    (output,) = (node for node in trunk.graph.nodes if node.op == "output")
    ends = {node: stage for stage, node in output.args[0].items()}
    stages, layers = {}, []
    for node in trunk.graph.nodes:
        if node.op == "call_module":
            # Some layers of torchvision's are modules of several, which the graph does not look into.
            layer = trunk.get_submodule(node.target)
            layers += [name for name, _ in layer.named_modules(prefix=node.target)]
        if node in ends:
            stages[ends[node]], layers = layers, []
    return stages
