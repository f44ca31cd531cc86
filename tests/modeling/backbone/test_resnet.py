"""The builders: what they build, what they refuse, and which lines they ask for."""

import logging
import pickle

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling import build_backbone, build_model
from detectron2.projects.deeplab import add_deeplab_config

from rt_detectron.checkpoint.architectures import ARCHITECTURES
from rt_detectron.checkpoint.metadata import Metadata
from rt_detectron.modeling.backbone import resolve_resnet
from rt_detectron.modeling.backbone.resnet import RESNETS
from rt_detectron.utils.errors import InputError

BOTTLENECK = (
    "resnet50",
    pytest.param("wide_resnet50_2", marks=pytest.mark.slow),
    "resnext50_32x4d",
)


def run(cfg, photograph):
    model = build_model(cfg).eval()
    with torch.no_grad():
        (output,) = model([{"image": photograph}])
    return model, output["instances"]


@pytest.mark.parametrize("arch", RESNETS)
def test_arch_fills_in_the_keys(arch, make_cfg):
    cfg = make_cfg(arch)
    cfg.freeze()
    resnets = resolve_resnet(cfg).MODEL.RESNETS
    assert {key: resnets[key] for key in ARCHITECTURES[arch].resnets} == ARCHITECTURES[arch].resnets
    assert resnets.STRIDE_IN_1X1 is False
    assert cfg.MODEL.RESNETS.STRIDE_IN_1X1 is True  # the caller's is left alone
    # The same keys without ARCH, as a project writes them that only imports the package.
    plain = get_cfg()
    plain.MODEL.RESNETS.update(ARCHITECTURES[arch].resnets)
    found = resolve_resnet(plain).MODEL.RESNETS
    assert {**found, "OUT_FEATURES": None} == {**resnets, "OUT_FEATURES": None}


@pytest.mark.parametrize("detector", ["fpn", "retinanet"])
@pytest.mark.parametrize("arch", ["resnet18", "resnext50_32x4d"])
def test_pyramids_run(arch, detector, make_cfg, photograph):
    model, instances = run(make_cfg(arch, detector), photograph)
    levels = {"fpn": ["p2", "p3", "p4", "p5", "p6"], "retinanet": ["p3", "p4", "p5", "p6", "p7"]}
    assert list(model.backbone.output_shape()) == levels[detector]
    assert instances.has("pred_boxes")


@pytest.mark.parametrize("arch", BOTTLENECK)
def test_dc5_runs(arch, make_cfg, photograph):
    model, instances = run(make_cfg(arch, "dc5"), photograph)
    assert model.backbone.output_shape()["res5"].stride == 16
    assert model.backbone.res5[0].conv2.stride == (1, 1)
    assert instances.has("pred_masks")


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("arch", BOTTLENECK)
def test_c4_head_is_a_stage_of_the_same_network(arch, frozen, make_cfg, photograph):
    cfg = make_cfg(arch, "c4")
    if frozen:
        cfg.freeze()
    model, instances = run(cfg, photograph)
    assert instances.has("pred_masks")
    assert cfg.is_frozen() == frozen
    # The head's res5 is the stage that the backbone leaves out.
    cfg = make_cfg(arch, "c4", OUT_FEATURES=["res5"])
    expected = {n: t.shape for n, t in build_backbone(cfg).res5.state_dict().items()}
    assert {n: t.shape for n, t in model.roi_heads.res5.state_dict().items()} == expected
    assert model.roi_heads.res5[0].conv1.stride == (1, 1)
    assert model.roi_heads.res5[0].conv2.stride == (2, 2)


def test_completing_for_c4_is_logged(make_cfg, caplog):
    with caplog.at_level(logging.INFO, logger="rt_detectron"):
        build_backbone(make_cfg("wide_resnet50_2", "c4"))
    assert "MODEL.RESNETS.WIDTH_PER_GROUP 128 MODEL.RESNETS.STRIDE_IN_1X1 False" in caplog.text


def test_deeplab_keeps_its_dilations_and_gets_the_weights_own_stem(make_cfg):
    cfg = make_cfg("resnet50", RES5_DILATION=2, STEM_OUT_CHANNELS=128)
    add_deeplab_config(cfg)  # multi-grid 1, 2, 4
    cfg.MODEL.RESNETS.STEM_TYPE = "deeplab"
    cfg.MODEL.BACKBONE.NAME = "build_robust_resnet_backbone"
    backbone = build_backbone(cfg)
    assert backbone.stem.conv1.weight.shape == (64, 3, 7, 7)
    assert [block.conv2.dilation[0] for block in backbone.res5] == [2, 4, 8]
    assert backbone.output_shape()["res5"].stride == 16
    cfg.MODEL.ROBUST.ARCH = "resnet18"
    with pytest.raises(InputError, match="bottleneck network"):
        build_backbone(cfg)


@pytest.mark.parametrize("arch", ["densenet", "timm/convnext_atto"])
def test_other_networks_are_sent_to_their_builder(arch, make_cfg):
    family = "timm" if "/" in arch else "torchvision"
    with pytest.raises(InputError, match=f"build_robust_{family}_fpn_backbone"):
        build_backbone(make_cfg(arch))


@pytest.mark.parametrize("arch", ["resnet18", "resnet34"])
@pytest.mark.parametrize("detector", ["c4", "dc5"])
def test_c4_and_dc5_need_bottlenecks(arch, detector, make_cfg):
    with pytest.raises(InputError, match="bottleneck network"):
        build_model(make_cfg(arch, detector))


@pytest.mark.parametrize(
    ("arch", "resnets", "line"),
    [
        ("resnet50", {"DEPTH": 101}, "MODEL.RESNETS.DEPTH 50"),
        ("resnet18", {"DEPTH": 34}, "MODEL.RESNETS.DEPTH 18"),
        ("wide_resnet50_2", {"WIDTH_PER_GROUP": 256}, "MODEL.RESNETS.WIDTH_PER_GROUP 128"),
        ("resnet50", {"NUM_GROUPS": 32}, "MODEL.RESNETS.NUM_GROUPS 1"),
        (
            "resnext50_32x4d",
            {"WIDTH_PER_GROUP": 8, "RES2_OUT_CHANNELS": 64},
            "MODEL.RESNETS.WIDTH_PER_GROUP 4 MODEL.RESNETS.RES2_OUT_CHANNELS 256",
        ),
    ],
)
def test_arch_and_resnets_cannot_disagree(arch, resnets, line, make_cfg):
    cfg = make_cfg(arch, **resnets)
    with pytest.raises(InputError) as error:
        build_backbone(cfg)
    assert str(error.value).endswith(f": set {line}")
    cfg.merge_from_list(line.split())
    resolve_resnet(cfg)


def test_unknown_networks(make_cfg):
    with pytest.raises(InputError, match=r"resnext101_32x8d.*did you mean wide_resnet50_2"):
        build_backbone(make_cfg("wide_resnet50-2"))
    with pytest.raises(InputError, match=r"none of the known networks.*RES2_OUT_CHANNELS 64 \(resnet18\)"):
        build_backbone(make_cfg("", DEPTH=18))
    with pytest.raises(InputError, match=r"DEPTH 20 .*MODEL\.ROBUST\.ARCH to one of resnet18"):
        build_backbone(make_cfg("", DEPTH=20))


@pytest.mark.parametrize("norm", ["FrozenBN", "BN", "SyncBN", "GN"])
def test_norms(norm, make_cfg):
    cfg = make_cfg("resnet18", NORM=norm)
    cfg.MODEL.BACKBONE.FREEZE_AT = 0  # freezing turns a stage's BN into FrozenBN
    backbone = build_backbone(cfg).bottom_up
    expected = {
        "FrozenBN": FrozenBatchNorm2d,
        "BN": torch.nn.BatchNorm2d,
        "SyncBN": torch.nn.SyncBatchNorm,
        "GN": torch.nn.GroupNorm,
    }[norm]
    found = [m.norm for m in backbone.modules() if getattr(m, "norm", None) is not None]
    assert len(found) == 20
    assert all(isinstance(module, expected) for module in found)


@pytest.mark.parametrize("freeze_at", [0, 1, 2, 5])
def test_freeze_at(freeze_at, make_cfg):
    cfg = make_cfg("resnet18", NORM="BN")
    cfg.MODEL.BACKBONE.FREEZE_AT = freeze_at
    backbone = build_backbone(cfg).bottom_up
    frozen = {
        name
        for name, module in backbone.named_children()
        if not any(p.requires_grad for p in module.parameters())
    }
    assert frozen == {"stem", "res2", "res3", "res4", "res5"} & {
        "stem" if i == 1 else f"res{i}" for i in range(1, freeze_at + 1)
    }


def test_one_line_says_what_is_built(make_cfg, caplog):
    with caplog.at_level(logging.INFO, logger="rt_detectron"):
        build_backbone(make_cfg("resnet18"))
    (record,) = [r for r in caplog.records if r.name.startswith("rt_detectron")]
    assert "building resnet18" in record.getMessage()
    assert "RES2_OUT_CHANNELS 64" in record.getMessage()


def test_weights_with_the_stride_elsewhere_are_refused(make_cfg, tmp_path):
    """The builder makes torchvision's bottlenecks whatever the config says, so it cannot take Caffe's."""
    pixels = {"pixel_mean": (103.53, 116.28, 123.675), "pixel_std": (1.0, 1.0, 1.0)}
    said = Metadata("resnet50", "l2", 3.0, "BGR", **pixels, stride_in_1x1=True, source="caffe.pth")
    content = {"model": {}, "__author__": "x", "matching_heuristics": False, "rt_detectron": said.to_dict()}
    (tmp_path / "caffe.pkl").write_bytes(pickle.dumps(content))
    cfg = make_cfg("resnet50", "fpn")
    cfg.MODEL.WEIGHTS = str(tmp_path / "caffe.pkl")
    cfg.INPUT.FORMAT, cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD = "BGR", *pixels.values()
    for stride in (True, False):
        cfg.MODEL.RESNETS.STRIDE_IN_1X1 = stride
        with pytest.raises(InputError, match=r"in the 1x1 .* and MODEL.RESNETS.STRIDE_IN_1X1 True$") as error:
            build_backbone(cfg)
        assert "\n" not in str(error.value)
    cfg.MODEL.ROBUST.ARCH = "resnet18"  # has no bottlenecks
    build_backbone(cfg)
