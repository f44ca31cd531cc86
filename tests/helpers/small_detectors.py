"""Detectors that cost little, and the comparison of what they become."""

import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone

RETINANET = {
    "MODEL.META_ARCHITECTURE": "RetinaNet",
    "MODEL.BACKBONE.NAME": "build_retinanet_robust_resnet_fpn_backbone",
    "MODEL.RESNETS.OUT_FEATURES": "['res3', 'res4', 'res5']",
    "MODEL.FPN.IN_FEATURES": "['res3', 'res4', 'res5']",
    "MODEL.RETINANET.NUM_CLASSES": 10,
    "MODEL.RETINANET.NUM_CONVS": 1,
    "MODEL.ANCHOR_GENERATOR.SIZES": "[[32]]",
}
SMALL = {
    "MODEL.WEIGHTS": "",
    "MODEL.BACKBONE.NAME": "ThreeConvolutions",
    "MODEL.RPN.IN_FEATURES": "['p2']",
    "MODEL.ANCHOR_GENERATOR.SIZES": "[[12, 20, 30]]",
    "MODEL.ROI_HEADS.IN_FEATURES": "['p2']",
    "MODEL.ROI_MASK_HEAD.NUM_CONV": 1,
}


@BACKBONE_REGISTRY.register()
class ThreeConvolutions(Backbone):
    """The smallest backbone that learns the tiny pictures."""

    def __init__(self, cfg, input_shape):
        super().__init__()
        layers = []
        for channels, out_channels, stride in ((3, 16, 2), (16, 32, 2), (32, 32, 1)):
            convolution = torch.nn.Conv2d(channels, out_channels, 3, stride, 1, bias=False)
            layers += [convolution, torch.nn.BatchNorm2d(out_channels), torch.nn.ReLU()]
        self.layers = torch.nn.Sequential(*layers)

    def forward(self, x):
        return {"p2": self.layers(x)}

    def output_shape(self):
        return {"p2": ShapeSpec(channels=32, stride=4)}


def differences(one, other, path="") -> list[str]:
    """The paths of what differs in nested containers of tensors and numbers."""
    if isinstance(one, torch.Tensor):
        return [] if torch.equal(one, other) else [path]
    if isinstance(one, dict):
        if one.keys() != other.keys():
            return [f"{path}: {one.keys() ^ other.keys()}"]
        return [d for key in one for d in differences(one[key], other[key], f"{path}/{key}")]
    if isinstance(one, list | tuple):
        if len(one) != len(other):
            return [f"{path}: {len(one)} and {len(other)}"]
        pairs = enumerate(zip(one, other, strict=True))
        return [d for i, (a, b) in pairs for d in differences(a, b, f"{path}/{i}")]
    return [] if one == other else [f"{path}: {one} and {other}"]
