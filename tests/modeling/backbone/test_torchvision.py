"""torchvision's networks as backbones, against the sub-modules of torchvision's own classifiers."""

import logging

import pytest
import torch
from detectron2.layers import FrozenBatchNorm2d, ShapeSpec
from detectron2.modeling import build_backbone, build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from torch import nn

from rt_detectron.modeling.backbone import build_robust_resnet_backbone
from rt_detectron.utils.errors import InputError

STAGES = ["res2", "res3", "res4", "res5"]
CHANNELS = {
    "densenet": [384, 768, 2112, 2208],
    "mnasnet": [24, 40, 96, 1280],
    "mobilenet": [24, 32, 96, 1280],
    "shufflenet": [24, 116, 232, 1024],
    "vgg16_bn": [256, 512, 512, 512],
}
# What each further stage freezes: how its tensors' names begin behind ``trunk.features.`` or the like.
FROZEN = {
    "shufflenet": [["conv1"], [], ["stage2"], ["stage3"], ["stage4", "conv5"]],
    "mobilenet": [map(str, range(*ends)) for ends in [(0, 2), (2, 4), (4, 7), (7, 14), (14, 19)]],
    "mnasnet": [map(str, range(*ends)) for ends in [(0, 8), (8, 9), (9, 10), (10, 12), (12, 17)]],
    "densenet": [
        ["conv0", "norm0"],
        ["denseblock1", "transition1.norm"],
        ["transition1.conv", "denseblock2", "transition2.norm"],
        ["transition2.conv", "denseblock3", "transition3.norm"],
        ["transition3.conv", "denseblock4", "norm5"],
    ],
}
FROZEN = {arch: [list(stage) for stage in stages] for arch, stages in FROZEN.items()}


@pytest.fixture
def torchvision_cfg(make_cfg):
    """``torchvision_cfg(arch, **resnets)``: the network alone, with all of its features."""

    def make(arch, **resnets):
        cfg = make_cfg(arch, **{"OUT_FEATURES": STAGES, **resnets})
        cfg.MODEL.BACKBONE.NAME = "build_robust_torchvision_backbone"
        return cfg

    return make


def build_with_weights(cfg, network):
    """The backbone in eval mode with the weights of ``network``, without the time to initialise others."""
    with torch.device("meta"):
        backbone = build_backbone(cfg)
    backbone = backbone.to_empty(device="cpu").eval()
    found = backbone.trunk.load_state_dict(network.state_dict(), strict=False)
    assert not found.missing_keys
    unused = {name.split(".")[0] for name in found.unexpected_keys if "num_batches_tracked" not in name}
    assert unused <= {"classifier", "fc"}
    return backbone


def reference(arch, network, images):
    """res2 ... res5 by calling the parts of torchvision's network one by one."""
    if arch == "shufflenet":
        res2 = network.maxpool(network.conv1(images))
        res3 = network.stage2(res2)
        res4 = network.stage3(res3)
        return [res2, res3, res4, network.conv5(network.stage4(res4))]
    if arch == "densenet":
        parts, features = network.features, []
        x = parts.pool0(parts.relu0(parts.norm0(parts.conv0(images))))
        for block, transition in [
            (parts.denseblock1, parts.transition1),
            (parts.denseblock2, parts.transition2),
            (parts.denseblock3, parts.transition3),
        ]:
            features.append(transition.norm(block(x)).relu())
            x = transition.pool(transition.conv(features[-1]))
        return [*features, parts.norm5(parts.denseblock4(x)).relu()]
    ends = {"mnasnet": (9, 10, 12, 17), "mobilenet": (4, 7, 14, 19), "vgg16_bn": (23, 33, 43, 44)}[arch]
    layers = list(network.layers if arch == "mnasnet" else network.features)
    features, start = [], 0
    for end in ends:
        images = nn.Sequential(*layers[start:end])(images)
        features.append(images)
        start = end
    return features


@pytest.mark.parametrize("arch", CHANNELS)
def test_features_are_torchvisions(arch, torchvision_cfg, random_classifier, photograph):
    network = random_classifier(arch)
    backbone = build_with_weights(torchvision_cfg(arch), network)  # FrozenBN, Detectron2's default
    assert any(isinstance(module, FrozenBatchNorm2d) for module in backbone.modules())
    assert not any(isinstance(module, nn.BatchNorm2d) for module in backbone.modules())
    images = (photograph[None].float() - 120) / 60
    with torch.no_grad():
        found, expected = backbone(images), reference(arch, network, images)
    assert list(found) == STAGES
    for name, tensor in zip(STAGES, expected, strict=True):
        assert torch.equal(found[name], tensor), name
        assert tensor.std() > 0
    shapes = backbone.output_shape()
    assert [shapes[name].channels for name in STAGES] == CHANNELS[arch]
    assert [shapes[name].stride for name in STAGES] == [4, 8, 16, 32]
    assert [tuple(found[name].shape[2:]) for name in STAGES] == [(24, 32), (12, 16), (6, 8), (3, 4)]
    assert backbone.size_divisibility == 32


@pytest.mark.parametrize(
    ("arch", "wanted"),
    [
        ("densenet", ["res3", "res2"]),
        ("mnasnet", ["res4"]),
        ("mobilenet", ["res4"]),
        ("shufflenet", ["res3", "res2"]),
    ],
)
def test_only_what_is_wanted_is_built(arch, wanted, torchvision_cfg):
    cfg = torchvision_cfg(arch, OUT_FEATURES=wanted, NORM="BN")
    cfg.MODEL.BACKBONE.FREEZE_AT = 0
    backbone = build_backbone(cfg)
    assert backbone.training
    features = backbone(torch.randn(2, 3, 64, 96))
    assert list(features) == list(backbone.output_shape()) == wanted
    sum(feature.square().mean() for feature in features.values()).backward()
    assert [name for name, p in backbone.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("arch", CHANNELS)
def test_trains_in_faster_rcnn(arch, make_cfg, photograph):
    cfg = make_cfg(arch, NORM="BN")
    cfg.MODEL.BACKBONE.NAME = "build_robust_torchvision_fpn_backbone"
    cfg.MODEL.BACKBONE.FREEZE_AT = 0
    cfg.MODEL.MASK_ON = False
    torch.manual_seed(0)
    model = build_model(cfg).train()
    instances = Instances((64, 96), gt_boxes=Boxes([[16.0, 8.0, 80.0, 56.0]]), gt_classes=torch.tensor([1]))
    inputs = [{"image": photograph[:, :64, :96], "instances": instances}]
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    losses = []
    with EventStorage():
        for _ in range(8):
            torch.manual_seed(0)  # the same anchors and proposals are sampled
            loss = sum(model(inputs).values())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize(
    ("arch", "freeze_at"),
    [*((arch, 2) for arch in FROZEN), *(("mobilenet", n) for n in (0, 1, 3, 5))],
)
def test_freeze_at(arch, freeze_at, torchvision_cfg):
    cfg = torchvision_cfg(arch, NORM="BN")
    cfg.MODEL.BACKBONE.FREEZE_AT = freeze_at
    with torch.device("meta"):
        backbone = build_backbone(cfg)

    def is_within(name, stages):
        rest = name.removeprefix("trunk.").removeprefix("features.").removeprefix("layers.")
        return any(f"{rest}.".startswith(f"{word}.") for stage in stages for word in stage)

    frozen, free = FROZEN[arch][:freeze_at], FROZEN[arch][freeze_at:]
    for name, parameter in backbone.named_parameters():
        assert is_within(name, free if parameter.requires_grad else frozen), name
    norms = {name: type(m) for name, m in backbone.named_modules() if "BatchNorm" in type(m).__name__}
    for name, norm in norms.items():
        assert norm is (FrozenBatchNorm2d if is_within(name, frozen) else nn.BatchNorm2d), name
    assert (FrozenBatchNorm2d in norms.values()) == (freeze_at > 0)
    assert (nn.BatchNorm2d in norms.values()) == (freeze_at < 5)


@pytest.mark.parametrize(
    ("norm", "expected"),
    [("FrozenBN", FrozenBatchNorm2d), ("BN", nn.BatchNorm2d), ("SyncBN", nn.SyncBatchNorm)],
)
def test_norms(norm, expected, torchvision_cfg, random_classifier, photograph):
    cfg = torchvision_cfg("shufflenet", NORM=norm)
    cfg.MODEL.BACKBONE.FREEZE_AT = 0
    network = random_classifier("shufflenet")
    backbone = build_with_weights(cfg, network)
    norms = [m for m in backbone.modules() if "BatchNorm" in type(m).__name__]
    assert len(norms) == 56
    assert all(isinstance(module, expected) for module in norms)
    assert all(bool(list(module.parameters())) == (norm != "FrozenBN") for module in norms)
    images = photograph[None].float() / 255
    with torch.no_grad():
        found = backbone(images)["res5"]
        assert torch.equal(found, reference("shufflenet", network, images)[-1])
        backbone.train()
        statistics = backbone.trunk.conv1.get_submodule("1").running_mean
        before = statistics.clone()
        if norm != "SyncBN":  # which trains on GPUs only
            backbone(images)
            assert torch.equal(before, statistics) == (norm == "FrozenBN")


def test_resnets_are_detectron2s(torchvision_cfg):
    cfg = torchvision_cfg("resnet18")
    found, expected = build_backbone(cfg), build_robust_resnet_backbone(cfg, ShapeSpec(channels=3))
    assert type(found) is type(expected)
    assert {n: t.shape for n, t in found.state_dict().items()} == {
        n: t.shape for n, t in expected.state_dict().items()
    }


def test_one_line_says_what_is_built(torchvision_cfg, caplog):
    with caplog.at_level(logging.INFO, logger="rt_detectron"):
        build_backbone(torchvision_cfg("shufflenet", OUT_FEATURES=["res2"]))
    (record,) = [r for r in caplog.records if r.name.startswith("rt_detectron")]
    assert record.getMessage() == "building shufflenet (features res2, NORM FrozenBN, FREEZE_AT 2)"


def test_what_cannot_be_built(torchvision_cfg):
    def refused(cfg, match):
        with pytest.raises(InputError, match=match) as error:
            build_backbone(cfg)
        assert "\n" not in str(error.value)

    refused(torchvision_cfg(""), r"MODEL\.ROBUST\.ARCH is empty")
    refused(torchvision_cfg("timm/resnet18"), "build_robust_timm_backbone")
    refused(torchvision_cfg("densenet161"), "did you mean densenet")
    refused(torchvision_cfg("mnasnet", OUT_FEATURES=["res4", "res6"]), r"res6.*mnasnet has res2, res3")
    refused(torchvision_cfg("mnasnet", OUT_FEATURES=[]), "mnasnet has res2, res3")
    refused(torchvision_cfg("mnasnet", NORM="GN"), "'GN': mnasnet takes FrozenBN, EvalBN, BN, SyncBN")
    refused(torchvision_cfg("mnasnet", RES5_DILATION=2), r"set MODEL\.RESNETS\.RES5_DILATION 1")
    cfg = torchvision_cfg("mnasnet")
    cfg.MODEL.ROI_HEADS.NAME = "Res5ROIHeads"
    refused(cfg, "choose a ResNet or an FPN detector")
    cfg = torchvision_cfg("mnasnet")
    del cfg.MODEL["ROBUST"]
    refused(cfg, "add_robust_config")
