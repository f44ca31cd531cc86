"""timm's networks as backbones, against hooks on timm's own classifiers."""

import logging
import sys

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.layers import FrozenBatchNorm2d, ShapeSpec
from detectron2.modeling import build_backbone, build_model
from torch import nn

from rt_detectron.checkpoint import zoo
from rt_detectron.checkpoint.architectures import get_architecture
from rt_detectron.checkpoint.checkpointer import TRUNK
from rt_detectron.config import add_robust_config
from rt_detectron.modeling.backbone.timm import build_robust_timm_backbone, is_plain, timm_features
from rt_detectron.utils.errors import InputError

timm = pytest.importorskip("timm")

STAGES = ["res2", "res3", "res4", "res5"]
SIZE = (256, 288)  # more than a window in Swin's res5: a classifier of this size has the same windows
# Its arguments for images of SIZE, the modules whose output the features are, and the features' channels.
NETWORKS = {
    "convnext_atto": ({}, ["stages.0", "stages.1", "stages.2", "stages.3"], [40, 80, 160, 320]),
    "efficientnet_lite0": ({}, ["blocks.1", "blocks.2", "blocks.4", "blocks.6"], [24, 40, 112, 320]),
    "resnet18": ({}, ["layer1", "layer2", "layer3", "layer4"], [64, 128, 256, 512]),
    "swin_tiny_patch4_window7_224": (
        {"img_size": SIZE},
        ["layers.0", "layers.1", "layers.2", "layers.3"],
        [96, 192, 384, 768],
    ),
    "vit_tiny_patch16_224": ({"dynamic_img_size": True}, ["blocks.11"], [192]),
}
SWIN, VIT = "swin_tiny_patch4_window7_224", "vit_tiny_patch16_224"


@pytest.fixture
def timm_cfg(make_cfg):
    """``timm_cfg(name, **resnets)``: the network alone, with all of its features."""

    def make(name, **resnets):
        features = ["res4"] if name == VIT else STAGES
        cfg = make_cfg(f"timm/{name}", **{"OUT_FEATURES": features, **resnets})
        cfg.MODEL.BACKBONE.NAME = "build_robust_timm_backbone"
        return cfg

    return make


def random_network(name, **kwargs):
    """timm's classifier in eval mode, with numbers of order 1 in every tensor that it computes with."""
    network = timm.create_model(name, num_classes=2, **kwargs).eval()
    generator = torch.Generator().manual_seed(0)
    for key, tensor in network.state_dict().items():
        if not tensor.is_floating_point():
            continue
        if tensor.dim() > 1 and not key.endswith("token"):
            tensor.normal_(0, (1 / tensor[0].numel()) ** 0.5, generator=generator)
        elif key.endswith(("running_var", "weight", "gamma")):
            tensor.uniform_(0.5, 1.5, generator=generator)
        else:
            tensor.normal_(0, 0.1, generator=generator)
    return network


def load(trunk, network):
    """Fill a features_only model, which may write ``stages_0`` for ``stages.0``, from a classifier."""
    given = {name.replace(".", "_"): tensor for name, tensor in network.state_dict().items()}
    for name, tensor in trunk.state_dict().items():
        tensor.copy_(given[name.removeprefix("model.").replace(".", "_")])


@pytest.mark.parametrize("name", NETWORKS)
def test_features_are_timms(name, timm_cfg, photograph):
    kwargs, modules, channels = NETWORKS[name]
    network = random_network(name, **kwargs)
    backbone = build_backbone(timm_cfg(name)).eval()
    load(backbone.trunk, network)
    expected = []
    for module in modules:
        network.get_submodule(module).register_forward_hook(lambda *args: expected.append(args[-1].clone()))
    images = (photograph.repeat(1, 3, 3)[None, :, : SIZE[0], : SIZE[1]].float() - 120) / 60
    with torch.no_grad():
        found = backbone(images)
        network(images)
    if name == SWIN:
        expected = [tensor.permute(0, 3, 1, 2) for tensor in expected]
    if name == VIT:  # one token of the class, then those of the patches, row by row
        expected = [expected[0][:, 1:].transpose(1, 2).reshape(1, 192, SIZE[0] // 16, SIZE[1] // 16)]
    stages = ["res4"] if name == VIT else STAGES
    assert list(found) == stages
    for stage, tensor in zip(stages, expected, strict=True):
        stride = 2 ** int(stage[3])
        assert found[stage].shape == (1, channels[stages.index(stage)], SIZE[0] // stride, SIZE[1] // stride)
        torch.testing.assert_close(found[stage], tensor, rtol=1e-4, atol=1e-4 * tensor.abs().max().item())
        assert tensor.std() > 0.01
        assert backbone.output_shape()[stage] == ShapeSpec(channels=found[stage].shape[1], stride=stride)
    assert backbone.size_divisibility == 32


@pytest.mark.parametrize("name", NETWORKS)
def test_every_parameter_gets_a_gradient(name, timm_cfg):
    cfg = timm_cfg(name, OUT_FEATURES=["res4"], NORM="BN")
    cfg.MODEL.BACKBONE.FREEZE_AT = 0
    backbone = build_backbone(cfg)
    assert backbone.training
    backbone(torch.randn(2, 3, 64, 96))["res4"].square().mean().backward()
    assert [n for n, p in backbone.named_parameters() if p.grad is None] == []
    last = {"convnext_atto": "stages_2", "efficientnet_lite0": "blocks.4", "resnet18": "layer3"}
    last.update({SWIN: "layers_2", VIT: "model.blocks.11"})
    assert [*backbone.named_parameters()][-1][0].startswith(f"trunk.{last[name]}.")


def test_features_in_the_order_asked_for(timm_cfg):
    cfg = timm_cfg("resnet18", OUT_FEATURES=["res4", "res2"])
    features = build_backbone(cfg)(torch.zeros(1, 3, 64, 96))
    assert {name: tuple(tensor.shape[1:]) for name, tensor in features.items()} == {
        "res4": (256, 4, 6),
        "res2": (64, 16, 24),
    }
    assert list(features) == ["res4", "res2"]


def test_swin_in_a_detector_of_odd_images(make_cfg, photograph):
    cfg = make_cfg(f"timm/{SWIN}")
    cfg.MODEL.BACKBONE.NAME = "build_robust_timm_fpn_backbone"
    with torch.no_grad():
        (output,) = build_model(cfg).eval()([{"image": photograph[:, :67, :101]}])
    assert output["instances"].image_size == (67, 101)


def test_a_layer_norm_behind_each_stage(timm_cfg, photograph):
    cfg = timm_cfg("convnext_atto")
    images = (photograph[None, :, :64, :96].float() - 120) / 60
    network = random_network("convnext_atto")
    features = []
    for cfg.MODEL.ROBUST.OUT_NORM in ("", "LN"):
        backbone = build_backbone(cfg).eval()
        load(backbone.trunk, network)
        with torch.no_grad():
            features.append(backbone(images))
    plain, normed = features
    for stage in STAGES:
        expected = nn.functional.layer_norm(plain[stage].movedim(1, -1), plain[stage].shape[1:2], eps=1e-6)
        torch.testing.assert_close(normed[stage], expected.movedim(-1, 1), rtol=1e-4, atol=1e-4)
    own = [name for name, _ in backbone.named_parameters() if not name.startswith("trunk.")]
    assert own == [f"out_norms.{n}.{kind}" for n in range(4) for kind in ("weight", "bias")]
    assert not any(TRUNK.search(f"backbone.bottom_up.{name}") for name in own)  # no file has to have them
    assert all(parameter.requires_grad for parameter in backbone.out_norms.parameters())


@pytest.mark.parametrize(
    ("arch", "builder", "key", "value", "match"),
    [
        ("timm/convnext_atto", "timm", "OUT_NORM", "GN", "OUT_NORM 'GN': LN, or nothing"),
        (
            "timm/convnext_atto",
            "timm",
            "WINDOW",
            7,
            "convnext_atto does not attend in windows, ViT, .*WINDOW 0",
        ),
        ("timm/eva02_tiny_patch14_224", "timm_sfp", "WINDOW", 7, "does not attend in windows"),
        (f"timm/{VIT}", "timm_sfp", "WINDOW", -1, "WINDOW is -1; it must be a number of patches"),
        ("resnet18", "resnet", "OUT_NORM", "LN", "OUT_NORM is for timm's networks, resnet18 is none"),
        (
            "shufflenet",
            "torchvision",
            "WINDOW",
            7,
            "WINDOW is for timm's networks, shufflenet is none: set it to 0",
        ),
    ],
)
def test_keys_that_a_network_cannot_follow(arch, builder, key, value, match, make_cfg):
    cfg = make_cfg(arch)
    cfg.MODEL.BACKBONE.NAME = f"build_robust_{builder}_backbone"
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res4"]
    cfg.MODEL.ROBUST[key] = value
    with pytest.raises(InputError, match=match):
        build_backbone(cfg)


STEM_AND_RES2 = {
    "convnext_atto": (["stem_0", "stem_1"], ["stages_0"]),
    "efficientnet_lite0": (["conv_stem", "bn1", "blocks.0"], ["blocks.1"]),
    "resnet18": (["conv1", "bn1"], ["layer1"]),
    SWIN: (["patch_embed"], ["layers_0"]),
    VIT: (["model.cls_token", "model.pos_embed", "model.patch_embed"], []),
}


@pytest.mark.parametrize(
    ("name", "freeze_at"),
    [*((name, 2) for name in NETWORKS), *(("efficientnet_lite0", n) for n in (0, 1, 5)), (VIT, 1), (VIT, 5)],
)
def test_freeze_at(name, freeze_at, timm_cfg):
    cfg = timm_cfg(name, NORM="BN")
    cfg.MODEL.BACKBONE.FREEZE_AT = freeze_at
    with torch.device("meta"):
        trunk = build_backbone(cfg).trunk
    stem, res2 = STEM_AND_RES2[name]
    words = {0: [], 1: stem, 2: stem + res2, 5: [""]}[freeze_at]

    def is_frozen(name):
        return any(f"{name}.".startswith(f"{word}." if word else "") for word in words)

    assert {name: not p.requires_grad for name, p in trunk.named_parameters()} == {
        name: is_frozen(name) for name, _ in trunk.named_parameters()
    }
    for name, module in trunk.named_modules():
        if "BatchNorm" in type(module).__name__:
            assert type(module).__name__.startswith("Frozen") == is_frozen(name), name


@pytest.mark.parametrize("norm", ["FrozenBN", "BN", "SyncBN"])
def test_norms_keep_their_activation(norm, timm_cfg, photograph):
    from timm.layers import BatchNormAct2d, FrozenBatchNormAct2d, SyncBatchNormAct

    expected = {"FrozenBN": FrozenBatchNormAct2d, "BN": BatchNormAct2d, "SyncBN": SyncBatchNormAct}[norm]
    cfg = timm_cfg("efficientnet_lite0", NORM=norm)
    cfg.MODEL.BACKBONE.FREEZE_AT = 0
    backbone, network = build_backbone(cfg).eval(), random_network("efficientnet_lite0")
    load(backbone.trunk, network)
    norms = [module for module in backbone.modules() if "BatchNorm" in type(module).__name__]
    assert len(norms) == 48
    assert all(type(module) is expected for module in norms)
    assert isinstance(backbone.trunk.bn1.act, nn.ReLU6)
    images = photograph[None].float() / 255
    with torch.no_grad():
        stem = network.bn1(network.conv_stem(images))
        found = backbone.trunk.bn1(backbone.trunk.conv_stem(images))
    torch.testing.assert_close(found, stem)
    assert found.min() == 0


def test_plain_batch_norm_is_detectron2s(timm_cfg):
    backbone = build_backbone(timm_cfg("resnet18"))
    assert sum(isinstance(module, FrozenBatchNorm2d) for module in backbone.modules()) == 20


def test_layer_norm_is_left_alone(timm_cfg):
    cfg = timm_cfg("convnext_atto")
    cfg.MODEL.BACKBONE.FREEZE_AT = 0
    assert all(parameter.requires_grad for parameter in build_backbone(cfg).parameters())


def test_one_line_says_what_is_built(timm_cfg, caplog):
    with caplog.at_level(logging.INFO, logger="rt_detectron"):
        build_backbone(timm_cfg("resnet18", OUT_FEATURES=["res2"]))
    (record,) = [r for r in caplog.records if r.name.startswith("rt_detectron")]
    assert record.getMessage() == "building timm/resnet18 (features res2, NORM FrozenBN, FREEZE_AT 2)"


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("maxvit_tiny_rw_224", r"does not take images of any size \(height .* divisible by window"),
        ("inception_v3", r"gives res2 of \(20, 36\) pixels"),
        ("beit_base_patch16_224", "res2, res3, res5 missing"),
        ("hrnet_w18_small", r"set MODEL\.BACKBONE\.FREEZE_AT 0"),
        ("convnext_atom", "did you mean .*convnext_atto"),
    ],
)
def test_networks_that_make_no_backbone(name, match, timm_cfg):
    with pytest.raises(InputError, match=match) as error:
        build_backbone(timm_cfg(name))
    assert "\n" not in str(error.value)


def test_settings_that_make_no_backbone(timm_cfg, make_cfg, monkeypatch):
    cfg = make_cfg(f"timm/{VIT}")
    cfg.MODEL.BACKBONE.NAME = "build_robust_timm_fpn_backbone"
    with pytest.raises(InputError, match=r"has res4 only, res2, res3, res5 missing: .* strides 4, 8, 16, 32"):
        build_backbone(cfg)
    cfg = timm_cfg("resnet18")
    cfg.MODEL.ROBUST.ARCH = "resnet18"
    with pytest.raises(InputError, match=r"resnet18 is a ResNet: set .* to build_robust_resnet_backbone"):
        build_backbone(cfg)
    with pytest.raises(InputError, match="takes FrozenBN, EvalBN, BN, SyncBN"):
        build_backbone(timm_cfg("resnet18", NORM="GN"))
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(InputError, match='pip install "timm'):
        build_backbone(timm_cfg("resnet18"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "arch", sorted({entry.arch for entry in zoo.list() if entry.arch.startswith("timm/")})
)
def test_the_zoos_networks_make_backbones(arch):
    """With the tensors of the classifier, at the strides of a detector; without numbers, in no time."""
    known = get_architecture(arch).shapes
    with torch.device("meta"):
        trunk = timm_features(arch)
        wanted = ["res4"] if is_plain(trunk.feature_info.info) else STAGES
        cfg = get_cfg()
        add_robust_config(cfg)
        cfg.MODEL.ROBUST.ARCH = arch
        cfg.MODEL.RESNETS.OUT_FEATURES = wanted
        cfg.MODEL.ROI_HEADS.NAME = ""
        backbone = build_robust_timm_backbone(cfg, ShapeSpec(channels=3))
    assert list(backbone.output_shape()) == wanted
    own = {name.replace(".", "_"): shape for name, shape in known.items()}
    for name, tensor in trunk.state_dict().items():
        assert own[name.removeprefix("model.").replace(".", "_")] == tensor.shape
