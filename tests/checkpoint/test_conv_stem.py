"""Against the published definition, written out as plain layers, on files of its layout."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from rt_detectron import load_backbone, load_classifier
from rt_detectron.checkpoint.architectures import get_architecture
from rt_detectron.checkpoint.convert import convert_checkpoint
from rt_detectron.utils.errors import InputError

timm = pytest.importorskip("timm")


class Norm(nn.Module):
    """LayerNorm over channels, by its formula."""

    def __init__(self, channels):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))

    def forward(self, x):
        mean = x.mean(1, keepdim=True)
        x = (x - mean) / ((x - mean).square().mean(1, keepdim=True) + 1e-6).sqrt()
        return self.weight.view(-1, 1, 1) * x + self.bias.view(-1, 1, 1)


class Stem(nn.Module):
    def __init__(self, *layers):
        super().__init__()
        self.stem = nn.Sequential(*layers)

    def forward(self, x):
        return self.stem(x)


def block(before, channels, stride=2):
    return nn.Conv2d(before, channels, 3, stride, 1), Norm(channels), nn.GELU()


def published(name):
    """timm's network with its stem replaced, as the authors do it."""
    torch.manual_seed(0)
    network = timm.create_model(name, **({"dynamic_img_size": True} if "patch16" in name else {})).eval()
    if name == "convnext_tiny":
        network.stem = Stem(*block(3, 48), *block(48, 96))
    elif name == "convnext_base":
        network.stem = Stem(*block(3, 64), *block(64, 96), *block(96, 128, 1))
    else:
        layers = (*block(3, 48), *block(48, 96), *block(96, 192), *block(192, 384), nn.Conv2d(384, 384, 1))
        network.patch_embed.proj = Stem(*layers)
    for key, tensor in network.state_dict().items():
        if key.endswith("gamma"):
            tensor.fill_(0.5)
    return network


@pytest.mark.parametrize(
    "name", ["convnext_tiny", "deit_small_patch16_224", pytest.param("convnext_base", marks=pytest.mark.slow)]
)
@torch.no_grad()
def test_features_and_logits_are_the_published_networks(name, tmp_path, photograph):
    network = published(name)
    source, output = str(tmp_path / "source.pt"), str(tmp_path / "backbone.pkl")
    torch.save({"model": {f"module.{key}": tensor for key, tensor in network.state_dict().items()}}, source)
    convert_checkpoint(source, output, f"timm/{name}:stem=conv", input_format="BGR")
    image = photograph[None].float()  # (96, 128)
    mean, std = (torch.tensor(network.default_cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
    normalised = (image / 255 - mean) / std
    found = []
    is_convnext = name.startswith("convnext")
    modules = network.stages if is_convnext else [network.blocks[-1]]
    for module in modules:
        module.register_forward_hook(lambda *args: found.append(args[-1]))
    network(normalised)
    if not is_convnext:
        found = [found[0][:, 1:].transpose(1, 2).reshape(1, 384, 6, 8)]
    backbone = load_backbone(output, detector=None if is_convnext else "sfp").eval()
    own = image.flip(1) - torch.tensor(backbone.metadata.pixel_mean).view(3, 1, 1)
    features = backbone(own) if is_convnext else {"res4": backbone.net(own)["res4"]}
    for feature, expected in zip(features.values(), found, strict=True):
        torch.testing.assert_close(feature, expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())
    classifier = load_classifier(source, arch=f"timm/{name}:stem=conv")
    square = F.interpolate(image / 255, (224, 224))
    torch.testing.assert_close(classifier(square), network((square - mean) / std), rtol=1e-3, atol=1e-3)


def test_a_plain_network_is_not_taken_for_one_with_such_a_stem(tmp_path):
    path = str(tmp_path / "plain.pth")
    torch.save(timm.create_model("convnext_tiny").state_dict(), path)
    with pytest.raises(InputError, match=r"missing stem\.stem\.0\.weight"):
        convert_checkpoint(path, str(tmp_path / "x.pkl"), "timm/convnext_tiny:stem=conv")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("resnet18:stem=conv", "known are convnext_tiny"),
        ("convnext_tiny:stem=deep", "none of stem=conv, act_layer"),
    ],
)
def test_stems_that_are_not_known(name, words):
    with pytest.raises(InputError, match=words):
        get_architecture(f"timm/{name}")
