"""ViTDet's pyramid on plain vision transformers, against hooks on timm's own classifiers."""

import logging

import pytest
import torch
import torch.nn.functional as F
from detectron2.modeling import build_backbone, build_model

from rt_detectron import load_backbone
from rt_detectron.checkpoint.convert import convert_checkpoint
from rt_detectron.utils.errors import InputError

timm = pytest.importorskip("timm")

SIZE = (96, 128)
VIT, DINO = "vit_tiny_patch16_224", "vit_small_patch14_reg4_dinov2"
# Plain vision transformers of each kind, with the arguments that a classifier needs for images of any size.
ANY_SIZE = {"dynamic_img_size": True}
NETWORKS = {VIT: ANY_SIZE, "xcit_nano_12_p16_224": {}, DINO: ANY_SIZE, "eva02_tiny_patch14_224": ANY_SIZE}
CLIP = "vit_base_patch16_clip_224"


@pytest.fixture
def converted(tmp_path):
    """``converted(name, format)``: timm's classifier with random weights, and the file of its backbone."""

    def convert(name, input_format="RGB"):
        torch.manual_seed(0)
        network = timm.create_model(name, num_classes=2, **NETWORKS.get(name, ANY_SIZE)).eval()
        for key, tensor in network.state_dict().items():
            if key.endswith(("gamma", "gamma_1", "gamma_2", "gamma1", "gamma2", "gamma3")):
                tensor.fill_(0.5)  # layer scale; near 0 in a new network, so that its blocks would not show
        source, output = tmp_path / "source.pth", tmp_path / f"{input_format}.pkl"
        torch.save(network.state_dict(), source)
        convert_checkpoint(str(source), str(output), f"timm/{name}", input_format=input_format)
        return network, str(output)

    return convert


def last_block(network, images, patch):
    """What the last block makes of the images: (1, C, H / 16, W / 16), the patches row by row."""
    found = []
    network.blocks[-1].register_forward_hook(lambda *args: found.append(args[-1].clone()))
    height, width = (side * patch // 16 for side in SIZE)
    network(F.interpolate(images, (height, width), mode="bilinear", antialias=True))
    tokens = found[0][:, -(height // patch) * (width // patch) :]
    return tokens.transpose(1, 2).reshape(1, -1, height // patch, width // patch)


SLOW = [pytest.param(*case, marks=pytest.mark.slow) for case in ((DINO, "BGR"), (CLIP, "RGB"))]


@pytest.mark.parametrize(
    ("name", "input_format"), [*((name, "RGB") for name in NETWORKS), (VIT, "BGR"), *SLOW]
)
@torch.no_grad()
def test_features_are_the_classifiers_own(name, input_format, converted, photograph, caplog):
    network, path = converted(name, input_format)
    with caplog.at_level(logging.INFO, "rt_detectron"):
        backbone = load_backbone(path, detector="sfp").eval()
    patch = 14 if "patch14" in name else 16
    assert ("images are resized by 14/16" in caplog.text) == (patch == 14)
    image = photograph[None, :, :, : SIZE[1]].float()
    mean, std = (torch.tensor(network.default_cfg[key]).view(3, 1, 1) * 255 for key in ("mean", "std"))
    expected = last_block(network, (image - mean) / std, patch)
    metadata = backbone.metadata
    own = image.flip(1) if input_format == "BGR" else image
    own = (own - torch.tensor(metadata.pixel_mean).view(3, 1, 1)) / torch.tensor(metadata.pixel_std).view(
        3, 1, 1
    )
    found = backbone.net(own)["res4"]
    assert expected.std() > 0.1
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=2e-4 * expected.abs().max().item())
    pyramid = backbone(own)
    assert {level: tuple(feature.shape[2:]) for level, feature in pyramid.items()} == {
        f"p{level}": (SIZE[0] >> level, SIZE[1] >> level) for level in (2, 3, 4, 5)
    } | {"p6": (2, 2)}


def test_a_detector_takes_images_of_any_size(make_cfg, photograph):
    cfg = make_cfg(f"timm/{VIT}:depth=3")
    cfg.MODEL.BACKBONE.NAME = "build_robust_timm_sfp_backbone"
    with torch.no_grad():
        (output,) = build_model(cfg).eval()([{"image": photograph[:, :67, :101]}])
    assert output["instances"].image_size == (67, 101)


def test_retinanets_pyramid(make_cfg, photograph):
    """Its p3 to p5 are those of the other pyramid; the rest comes from p5."""
    cfg = make_cfg(f"timm/{VIT}:depth=3", "retinanet")
    cfg.MODEL.BACKBONE.NAME = "build_robust_timm_sfp_backbone"
    name = "build_retinanet_robust_timm_sfp_backbone"
    with pytest.raises(InputError, match=f"no p2, which this pyramid begins with: set .* to {name}"):
        build_backbone(cfg)
    cfg.MODEL.RETINANET.IN_FEATURES = ["p2", "p3", "p4", "p5", "p6"]
    plain = build_backbone(cfg).eval()
    cfg.MODEL.BACKBONE.NAME = name
    backbone = build_backbone(cfg).eval()
    found = backbone.load_state_dict(plain.state_dict(), strict=False)
    assert all(name.startswith("top_block.") for name in found.missing_keys)
    assert all(name.startswith("simfp_2.") for name in found.unexpected_keys)
    images = (photograph[None, :, :, : SIZE[1]].float() - 120) / 60
    with torch.no_grad():
        features, expected = backbone(images), plain(images)
    assert list(features) == ["p3", "p4", "p5", "p6", "p7"]
    for level in ("p3", "p4", "p5"):
        torch.testing.assert_close(features[level], expected[level])
    assert [tuple(features[level].shape[2:]) for level in ("p6", "p7")] == [(2, 2), (1, 1)]
    assert {level: shape.stride for level, shape in backbone.output_shape().items()} == {
        f"p{level}": 2**level for level in (3, 4, 5, 6, 7)
    }
    torch.testing.assert_close(features["p6"], backbone.top_block.p6(expected["p5"]))


def test_networks_without_a_simple_pyramid(make_cfg, converted):
    cfg = make_cfg("timm/convnext_atto")
    cfg.MODEL.BACKBONE.NAME = "build_robust_timm_sfp_backbone"
    with pytest.raises(InputError, match=r"no plain vision transformer: .* build_robust_timm_fpn_backbone"):
        build_backbone(cfg)
    cfg.MODEL.ROBUST.ARCH = "timm/vit_small_patch32_224"
    with pytest.raises(InputError, match="patches of 32 pixels: choose a network with patches of 16 or 14"):
        build_backbone(cfg)
    cfg.MODEL.ROBUST.ARCH = "resnet18"
    with pytest.raises(InputError, match="resnet18 is a ResNet"):
        build_backbone(cfg)
