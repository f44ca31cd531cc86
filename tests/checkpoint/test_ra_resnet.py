"""RaResNets, against their description by plain functions on tensors under their published names."""

import re

import pytest
import torch
import torch.nn.functional as F

from rt_detectron import load_backbone
from rt_detectron.checkpoint import architectures, zoo
from rt_detectron.checkpoint.architectures import ARCHITECTURES, TORCHVISION, get_architecture
from rt_detectron.checkpoint.convert import convert_checkpoint, read_network

DEPTHS, WIDTHS = (2, 1, 3, 1), (32, 48, 64, 96)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@pytest.fixture
def tiny(monkeypatch):
    """The name of a small RaResNet in the table of networks."""
    monkeypatch.setitem(ARCHITECTURES, "ra_tiny", architectures._ra_resnet("ra_tiny", DEPTHS, WIDTHS))
    return "ra_tiny"


def published(tensors):
    """Under the names of the authors' code: a network that begins with its normalisation."""
    found = {"normalization.mean": torch.tensor(MEAN), "normalization.std": torch.tensor(STD)}
    for name, tensor in tensors.items():
        name = re.sub(r"^stem\.", "stem.stem.stem.", name)
        name = re.sub(r"^trunk_output\.block\d\.block(\d)-(\d+)\.", r"stages.stage\1.stage\1-block\2.", name)
        found[re.sub(r"(block\d+)\.f\.", r"\1.F.", name)] = tensor
    return found


def features(tensors, images):
    """The stages' outputs for images in [0, 1], from the tensors under their published names."""

    def norm(x, name):
        numbers = (tensors[f"{name}.{part}"] for part in ("running_mean", "running_var", "weight", "bias"))
        return F.batch_norm(x, *numbers)

    def block(x, name, stride):
        y = F.silu(F.conv2d(x, tensors[f"{name}.F.a.0.weight"]))  # without a norm
        y = F.conv2d(y, tensors[f"{name}.F.b.0.weight"], stride=stride, padding=1, groups=2)
        y = F.silu(norm(y, f"{name}.F.b.1"))
        scale = y.mean(dim=(2, 3), keepdim=True)
        for layer, activation in (("fc1", F.relu), ("fc2", torch.sigmoid)):
            weight, bias = (tensors[f"{name}.F.se.{layer}.{part}"] for part in ("weight", "bias"))
            scale = activation(F.conv2d(scale, weight, bias))
        y = norm(F.conv2d(scale * y, tensors[f"{name}.F.c.0.weight"]), f"{name}.F.c.1")
        if f"{name}.proj.0.weight" in tensors:
            x = norm(F.conv2d(x, tensors[f"{name}.proj.0.weight"], stride=stride), f"{name}.proj.1")
        return F.silu(x + y)

    x = (images - tensors["normalization.mean"].view(3, 1, 1)) / tensors["normalization.std"].view(3, 1, 1)
    x = F.conv2d(x, tensors["stem.stem.stem.0.weight"], stride=2, padding=3)
    x, found = F.relu(norm(x, "stem.stem.stem.1")), []
    for stage, depth in enumerate(DEPTHS, start=1):
        for index in range(depth):
            x = block(x, f"stages.stage{stage}.stage{stage}-block{index}", 1 if index else 2)
        found.append(x)
    return found


@torch.no_grad()
def test_a_published_file_computes_what_its_authors_describe(tiny, tmp_path, random_classifier, photograph):
    network = random_classifier(tiny)
    tensors = published(network.state_dict())
    source, output = str(tmp_path / "tiny.pt"), str(tmp_path / "tiny.pkl")
    saved = {f"module.{name}": tensor for name, tensor in tensors.items()}
    torch.save({"epoch": 9, "state_dict": saved, "optimizer": {"state": {}}}, source)
    convert_checkpoint(source, output, tiny, "linf", 4.0)
    backbone = load_backbone(output).eval()
    assert backbone.metadata.pixel_mean == pytest.approx([255 * value for value in MEAN])
    mean, std = (torch.tensor(getattr(backbone.metadata, f"pixel_{key}")) for key in ("mean", "std"))
    found = backbone((photograph[None] - mean.view(3, 1, 1)) / std.view(3, 1, 1))
    expected = features(tensors, photograph[None] / 255)
    for feature, own in zip(found.values(), expected, strict=True):
        assert own.std() > 0.01
        torch.testing.assert_close(feature, own, rtol=1e-4, atol=1e-4 * own.abs().max().item())
    assert read_network(source, tiny).state_dict.keys() == network.state_dict().keys()


@pytest.mark.parametrize("name", [entry.name for entry in zoo.list(source="robust-principles")])
def test_published_files_have_the_networks_size(name):
    """They hold each number of the network and, of those that train, its momentum, in four bytes each."""
    entry = zoo.find(name)
    architecture = get_architecture(entry.arch)
    assert architecture.family is TORCHVISION
    trained = sum(parameter.numel() for parameter in architecture.skeleton.parameters())
    stored = sum(tensor.numel() for tensor in architecture.skeleton.state_dict().values())
    assert 0 < entry.size - 4 * (stored + trained) < 0.003 * entry.size
