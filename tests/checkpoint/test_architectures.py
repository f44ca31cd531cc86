"""Which network a file holds, and what its tensors become in a backbone."""

import pytest
import timm
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling.backbone import build_resnet_backbone

from rt_detectron.checkpoint.architectures import (
    ARCHITECTURES,
    build_classifier,
    check_architecture,
    detect_architecture,
    get_architecture,
)
from rt_detectron.utils.errors import InputError


def shapes(arch):
    with torch.device("meta"):
        network = build_classifier(arch)
    return {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}


@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
def test_resnets_get_detectron2s_names(arch, make_cfg):
    cfg = make_cfg(arch, NORM="BN", STRIDE_IN_1X1=False)
    cfg.MODEL.RESNETS.update(ARCHITECTURES[arch].resnets)
    cfg.MODEL.BACKBONE.FREEZE_AT = 0
    backbone = build_resnet_backbone(cfg, ShapeSpec(channels=3)).state_dict()
    expected = {name: tuple(t.shape) for name, t in backbone.items() if "num_batches" not in name}
    found = shapes(arch)
    assert {new: found[old] for old, new in get_architecture(arch).backbone_names.items()} == expected


@pytest.mark.parametrize(
    "name", ["convnext_atto", "swin_tiny_patch4_window7_224", "resnet18", "vit_tiny_patch16_224"]
)
def test_timm_networks_get_the_names_of_their_feature_extractor(name):
    with torch.device("meta"):
        features = timm.create_model(name, features_only=True).state_dict()
    expected = {f"trunk.{n}": tuple(t.shape) for n, t in features.items() if "num_batches" not in n}
    found = shapes(f"timm/{name}")
    assert {
        new: found[old] for old, new in get_architecture(f"timm/{name}").backbone_names.items()
    } == expected


def test_other_torchvision_networks_keep_theirs():
    names = get_architecture("densenet").backbone_names
    assert names["features.conv0.weight"] == "trunk.features.conv0.weight"
    assert not any(name.startswith("classifier") for name in names)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_detection(arch):
    state_dict = {name: torch.empty(shape, device="meta") for name, shape in shapes(arch).items()}
    head = ARCHITECTURES[arch].head
    assert detect_architecture(state_dict).name == arch
    assert detect_architecture({n: t for n, t in state_dict.items() if not n.startswith(head)}).name == arch
    counters = {n: t for n, t in state_dict.items() if not n.endswith("num_batches_tracked")}
    assert detect_architecture(counters).name == arch


@pytest.fixture
def meta_resnet50():
    return {name: torch.empty(shape, device="meta") for name, shape in shapes("resnet50").items()}


def test_misfits_are_named(meta_resnet50):
    del meta_resnet50["layer2.1.bn2.running_var"]
    meta_resnet50["layer5.0.conv1.weight"] = torch.empty(1)
    meta_resnet50["layer1.0.conv1.weight"] = torch.empty(64, 32, 1, 1)
    named = (
        r"resnet50: missing layer2\.1\.bn2\.running_var; unexpected layer5\.0\.conv1\.weight; "
        r"misshaped layer1\.0\.conv1\.weight \(64, 32, 1, 1\) instead of \(64, 64, 1, 1\)"
    )
    with pytest.raises(InputError, match=f"nearest is {named}"):
        detect_architecture(meta_resnet50)
    with pytest.raises(InputError, match=f"do not fit {named}"):
        check_architecture(meta_resnet50, "resnet50")


def test_wrong_and_unknown_architecture(meta_resnet50):
    with pytest.raises(InputError, match=r"do not fit resnet101: missing layer3\.6.* and \d+ more"):
        check_architecture(meta_resnet50, "resnet101")
    with pytest.raises(InputError, match="did you mean resnet50"):
        check_architecture(meta_resnet50, "resnet5")
    meta_resnet50["fc.weight"] = torch.empty(10, 512)
    with pytest.raises(InputError, match=r"fc\.weight \(10, 512\)"):
        detect_architecture(meta_resnet50)


def test_a_timm_network_must_be_named(meta_resnet50):
    convnext = {n: torch.empty(s, device="meta") for n, s in shapes("timm/convnext_atto").items()}
    with pytest.raises(InputError, match="a timm network needs --arch timm/NAME"):
        detect_architecture(convnext)
    check_architecture(convnext, "timm/convnext_atto")
    with pytest.raises(InputError, match=r"do not fit timm/convnext_atto: missing stem\.0\.weight"):
        check_architecture(meta_resnet50, "timm/convnext_atto")
