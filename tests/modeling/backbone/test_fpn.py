"""The two pyramids on each family of networks."""

import pytest
import torch
from detectron2.modeling import build_backbone, build_model

from rt_detectron.utils.errors import InputError

NETWORKS = {"resnet": "resnet18", "torchvision": "shufflenet", "timm": "timm/convnext_atto"}
LEVELS = {"fpn": ["p2", "p3", "p4", "p5", "p6"], "retinanet": ["p3", "p4", "p5", "p6", "p7"]}


@pytest.fixture
def pyramid_cfg(make_cfg):
    """``pyramid_cfg(family, detector)``: a detector on the builder of that family."""

    def make(family, detector="fpn", arch=None):
        if family == "timm":
            pytest.importorskip("timm")
        cfg = make_cfg(arch or NETWORKS[family], detector)
        cfg.MODEL.BACKBONE.NAME = cfg.MODEL.BACKBONE.NAME.replace("resnet", family)
        return cfg

    return make


@pytest.mark.parametrize("detector", LEVELS)
@pytest.mark.parametrize("family", NETWORKS)
def test_detectors_take_odd_images(family, detector, pyramid_cfg, photograph):
    model = build_model(pyramid_cfg(family, detector)).eval()
    assert list(model.backbone.output_shape()) == LEVELS[detector]
    assert model.backbone.size_divisibility == 32
    sizes = []
    model.backbone.register_forward_hook(lambda _, inputs, outputs: sizes.append((inputs[0], outputs)))
    with torch.no_grad():
        found = model([{"image": photograph[:, :67, :101]}, {"image": photograph[:, :33, :120]}])
    assert all(
        one["instances"].image_size == size for one, size in zip(found, [(67, 101), (33, 120)], strict=True)
    )
    ((images, features),) = sizes
    assert images.shape == (2, 3, 96, 128)
    for name, feature in features.items():
        stride = 2 ** int(name[1])
        assert feature.shape == (2, 16, -(-96 // stride), -(-128 // stride))
        assert model.backbone.output_shape()[name].stride == stride


@pytest.mark.parametrize("detector", LEVELS)
@pytest.mark.parametrize("family", NETWORKS)
def test_every_parameter_gets_a_gradient(family, detector, pyramid_cfg):
    """As DistributedDataParallel demands; MODEL.RESNETS.OUT_FEATURES of the bare network does not count."""
    cfg = pyramid_cfg(family, detector)
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res4"]
    cfg.MODEL.RESNETS.NORM = "BN"
    cfg.MODEL.BACKBONE.FREEZE_AT = 0
    backbone = build_backbone(cfg)
    features = backbone(torch.randn(2, 3, 64, 64))
    sum(feature.square().mean() for feature in features.values()).backward()
    assert [name for name, p in backbone.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("family", ["torchvision", "timm"])
def test_resnets_by_every_family(family, pyramid_cfg):
    arch = {"torchvision": "resnet18", "timm": "timm/resnet18"}[family]
    backbone = build_backbone(pyramid_cfg(family, arch=arch))
    shapes = backbone.bottom_up.output_shape()
    assert [(s.channels, s.stride) for s in shapes.values()] == [(64, 4), (128, 8), (256, 16), (512, 32)]


@pytest.mark.parametrize("wanted", [[], ["res2", "res4", "res5"], ["res2", "res3"], ["res5", "res4"], ["p2"]])
@pytest.mark.parametrize("detector", LEVELS)
def test_levels_that_make_no_pyramid(detector, wanted, pyramid_cfg):
    cfg = pyramid_cfg("torchvision", detector)
    cfg.MODEL.FPN.IN_FEATURES = wanted
    with pytest.raises(InputError, match="end with res5"):
        build_backbone(cfg)


def test_the_callers_config_is_left_alone(pyramid_cfg):
    cfg = pyramid_cfg("torchvision")
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res4"]
    cfg.freeze()
    before = cfg.dump()
    build_backbone(cfg)
    assert cfg.dump() == before
