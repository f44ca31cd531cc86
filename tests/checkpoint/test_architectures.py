"""Which network a file holds, and what its tensors become in a backbone."""

import pytest
import timm
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling.backbone import build_resnet_backbone

from rt_detectron.checkpoint.architectures import (
    ARCHITECTURES,
    build_classifier,
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


def test_timm_networks_of_other_layers():
    plain, other = get_architecture("timm/resnet18"), get_architecture("timm/resnet18:act_layer=gelu")
    assert other.name == "timm/resnet18:act_layer=gelu"
    assert other.shapes == plain.shapes
    assert type(other.skeleton.act1).__name__ == "GELU"
    assert type(plain.skeleton.act1).__name__ == "ReLU"
    assert other.backbone_names == plain.backbone_names


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "timm/resnet18:checkpoint_path=evil.pth",
            "'checkpoint_path=evil.pth' is none of stem=conv, act_",
        ),
        ("timm/resnet18:act_layer=os.system", "'act_layer=os.system' is none of"),
        ("timm/resnet18:gelu", "'gelu' is none of"),
        ("timm/resnet18:act_layer=nothing", "timm cannot build timm/resnet18:act_layer=nothing"),
        ("timm/convnext_atto:aa_layer=blur", "timm cannot build timm/convnext_atto:aa_layer=blur"),
        ("timm/nothing:act_layer=gelu", "timm has no model 'nothing'"),
        ("timm/hf-hub:someone/resnet18", "'someone/resnet18' is none of"),
    ],
)
def test_layers_that_timm_does_not_take(name, message):
    with pytest.raises(InputError) as error:
        get_architecture(name)
    assert message in str(error.value)
    assert str(error.value).isprintable()
