"""The network is found wherever it is in a file, and its backbone computes what the source network does."""

import pytest
import timm
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from rt_detectron import load_backbone, load_classifier
from rt_detectron.checkpoint.architectures import ARCHITECTURES, build_classifier, get_architecture
from rt_detectron.checkpoint.convert import convert_checkpoint, read_network
from rt_detectron.checkpoint.formats import WeightsFile
from rt_detectron.checkpoint.layouts import Choice, find_network
from rt_detectron.utils.errors import InputError

ANY = Choice()


class Normalize(nn.Module):
    """The normalisation that others put in front of a network, under any names of its buffers."""

    def __init__(self, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), names=("mean", "std"), scale=1):
        super().__init__()
        self.names, self.scale = names, scale
        for name, values in zip(names, (mean, std), strict=True):
            self.register_buffer(name, scale * torch.tensor(values).view(3, 1, 1))

    def forward(self, images):
        mean, std = (getattr(self, name) for name in self.names)
        return (self.scale * images - mean) / std


def prefixed(tensors, prefix):
    return {prefix + name: tensor for name, tensor in tensors.items()}


# From a network to what a program saves of it.
LAYOUTS = {
    "plain": lambda network: network.state_dict(),
    "model": lambda network: {"model": network.state_dict(), "epoch": 3},
    "state_dict": lambda network: {"state_dict": network.state_dict(), "acc": torch.tensor(55.0)},
    "model_state_dict": lambda network: {"model_state_dict": network.state_dict()},
    "net of a CIFAR script": lambda network: {"net": nn.DataParallel(network).state_dict(), "acc": 55.0},
    "nested": lambda network: {"checkpoint": {"weights": {"network": network.state_dict()}}},
    "torch.compile": lambda network: prefixed(network.state_dict(), "_orig_mod."),
    "DataParallel, torch.compile": lambda network: prefixed(network.state_dict(), "module._orig_mod."),
    "Lightning": lambda network: {"state_dict": prefixed(network.state_dict(), "net.")},
    "encoder": lambda network: prefixed(network.state_dict(), "encoder."),
    "Sequential": lambda network: nn.Sequential(nn.Identity(), network).state_dict(),
    "backbone, and a head of its own": lambda network: {
        **prefixed(network.features.state_dict(), "backbone.features."),
        **prefixed(nn.Linear(16, 9).state_dict(), "head.fc."),
    },
    "a prefix nobody has seen": lambda network: prefixed(network.state_dict(), "a.b.c.d."),
    "our pretraining": lambda network: {"model": prefixed(network.state_dict(), "module.network.")},
    "AveragedModel": lambda network: AveragedModel(network).state_dict(),
    "counters of thop": lambda network: {**network.state_dict(), "total_ops": torch.zeros(1)},
    "one network twice": lambda network: {"model": network.state_dict(), "best": network.state_dict()},
    "an optimizer with names": lambda network: {
        "model": network.state_dict(),
        "optimizer": {"momentum": {name: torch.ones(2) for name in network.state_dict()}},
    },
}


@pytest.fixture
def images():
    return torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))


def converted(content, folder, **kwargs):
    """Content as its converted backbone, and the conversion."""
    torch.save(content, folder / "c.pth")
    conversion = convert_checkpoint(folder / "c.pth", folder / "b.pkl", **kwargs)
    return load_backbone(folder / "b.pkl").eval(), conversion


def assert_same_features(backbone, network, normalize, images):
    """``backbone`` is what a detector has; ``normalize`` and ``network`` are what was saved."""
    metadata = backbone.metadata
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (metadata.pixel_mean, metadata.pixel_std))
    pixels = 255 * (images if metadata.input_format == "RGB" else images.flip(1))
    with torch.no_grad():
        found = backbone((pixels - mean) / std)
        expected = network.features[0](normalize(images))
        for number, stage in enumerate(("res2", "res3", "res4", "res5"), start=1):
            expected = network.features[number](expected)
            torch.testing.assert_close(found[stage], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_backbone_computes_what_the_saved_network_does(tiny, tmp_path, images, layout):
    network = tiny()
    backbone, conversion = converted(LAYOUTS[layout](network), tmp_path)
    assert conversion.metadata.arch == "tiny"
    assert conversion.remarks == []
    assert [guess.split()[1] for guess in conversion.guesses] == ["network", "file"]  # and its mean and std
    assert_same_features(backbone, network, Normalize(), images)


NORMALIZED = {
    "Sequential": lambda normalize, network: nn.Sequential(normalize, network),
    "normalize, model": lambda normalize, network: nn.ModuleDict({"normalize": normalize, "model": network}),
    "norm, net": lambda normalize, network: nn.ModuleDict({"norm": normalize, "net": network}),
    "normalizer, backbone": lambda *parts: nn.ModuleDict(zip(("normalizer", "backbone"), parts, strict=True)),
}


@pytest.mark.parametrize(
    "names", [("mean", "std"), ("mu", "sigma"), ("new_mean", "new_std"), ("_mean", "_std")]
)
@pytest.mark.parametrize("wrapper", NORMALIZED)
def test_the_normalisation_in_front_comes_along(tiny, tmp_path, images, wrapper, names):
    network = tiny()
    normalize = Normalize((0.4, 0.5, 0.6), (0.2, 0.3, 0.4), names, scale=255 if names[0] == "mu" else 1)
    whole = nn.DataParallel(NORMALIZED[wrapper](normalize, network))
    for input_format in ("RGB", "BGR"):
        backbone, conversion = converted(whole.state_dict(), tmp_path, input_format=input_format)
        assert len(conversion.guesses) == 1  # the network
        assert_same_features(backbone, network, normalize, images)


def test_buffers_of_the_network_itself_are_its_normalisation(tiny, tmp_path, images):
    network = tiny()
    normalize = Normalize((0.4, 0.5, 0.6), (0.2, 0.3, 0.4))
    backbone, _ = converted({**network.state_dict(), **normalize.state_dict()}, tmp_path)
    assert_same_features(backbone, network, normalize, images)


@pytest.mark.parametrize("num_classes", [1, 2, 3])
def test_classifiers_of_few_classes(tiny, tmp_path, images, num_classes):
    """Three classes have three numbers in their bias, which are no mean."""
    network = tiny(num_classes=num_classes)
    backbone, _ = converted(prefixed(network.state_dict(), "module."), tmp_path)
    assert_same_features(backbone, network, Normalize(), images)
    classifier = load_classifier(tmp_path / "c.pth")
    with torch.no_grad():
        torch.testing.assert_close(classifier(images), network(Normalize()(images)), rtol=1e-4, atol=1e-5)


def file_of(content):
    """What read_weights makes of these state dicts."""
    return WeightsFile("c.pth", content)


AVERAGED = {
    "timm": ("state_dict", "state_dict_ema", ""),
    "timm, during the training": ("model", "model_ema", "module."),
    "DINO": ("student", "teacher", "backbone."),
    "ours": ("model", "ema", ""),
    "swa_utils": ("model", "averaged_model", "module."),
}


@pytest.mark.parametrize("program", AVERAGED)
def test_averaged_weights_are_preferred(tiny, program):
    plain, averaged, prefix = AVERAGED[program]
    networks = {plain: tiny(1).state_dict(), averaged: tiny(2).state_dict()}
    file = file_of({key: prefixed(tensors, prefix) for key, tensors in networks.items()})
    for choice in (ANY, Choice(ema=True), Choice(key=averaged)):
        network, _ = find_network(file, None, choice)
        assert torch.equal(network.state_dict["fc.weight"], networks[averaged]["fc.weight"])
    for choice in (Choice(ema=False), Choice(key=plain)):
        network, _ = find_network(file, None, choice)
        assert torch.equal(network.state_dict["fc.weight"], networks[plain]["fc.weight"])


def test_the_choice_is_told(tiny, tmp_path):
    torch.save({"model": tiny(1).state_dict(), "model_ema": tiny(2).state_dict()}, tmp_path / "c.pth")
    assert read_network(tmp_path / "c.pth").remarks == [
        "read the state dict 'model_ema', not the state dict 'model': --ema and --no-ema choose"
    ]
    assert read_network(tmp_path / "c.pth", choice=Choice("model")).remarks == []


def test_prefixes_choose(tiny):
    one, other = tiny(1).state_dict(), tiny(2).state_dict()
    file = file_of({"state_dict": {**prefixed(one, "encoder_q."), **prefixed(other, "encoder_k.")}})
    with pytest.raises(
        InputError,
        match=r"^c\.pth holds several networks \(state dict 'state_dict', behind 'encoder_k\.'; "
        r".*'encoder_q\.'\): choose by --key or --prefix ",
    ):
        find_network(file, None, ANY)
    for prefix in ("encoder_q", "encoder_q."):
        network, _ = find_network(file, None, Choice(prefix=prefix))
        assert torch.equal(network.state_dict["fc.weight"], one["fc.weight"])


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        (Choice(key="ema"), r"c\.pth has no state dict 'ema': it has 'model'"),
        (Choice(prefix="module"), r"c\.pth: no known architecture fits"),
        (Choice(ema=True), r"c\.pth holds no averaged weights: its network is the state dict 'model'"),
    ],
)
def test_choices_that_the_file_does_not_have(tiny, choice, message):
    with pytest.raises(InputError, match=message):
        find_network(file_of({"model": tiny().state_dict()}), None, choice)


@pytest.mark.parametrize("key", ["teacher", "model_ema"])
def test_only_averaged_weights(tiny, key):
    file = file_of({key: tiny().state_dict()})
    assert find_network(file, None, ANY)[0].averaged
    with pytest.raises(InputError, match="holds no weights but averaged ones"):
        find_network(file, None, Choice(ema=False))


def meta(arch, **kwargs):
    with torch.device("meta"):
        return dict(build_classifier(arch, **kwargs).state_dict())


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_detection(arch):
    state_dict, head = meta(arch), ARCHITECTURES[arch].head

    def found(tensors):
        network, _ = find_network(file_of({"": tensors}), None, ANY)
        return network.architecture.name

    assert found(state_dict) == arch
    assert found({n: t for n, t in state_dict.items() if not n.startswith(head)}) == arch
    assert found({n: t for n, t in state_dict.items() if not n.endswith("num_batches_tracked")}) == arch


def test_misfits_are_named():
    tensors = meta("resnet50")
    del tensors["layer2.1.bn2.running_var"]
    tensors["layer5.0.conv1.weight"] = torch.empty(4)
    tensors["layer1.0.conv1.weight"] = torch.empty(64, 32, 1, 1)
    named = (
        r"resnet50: missing layer2\.1\.bn2\.running_var; unexpected layer5\.0\.conv1\.weight; "
        r"misshaped layer1\.0\.conv1\.weight \(64, 32, 1, 1\) instead of \(64, 64, 1, 1\)"
    )
    with pytest.raises(InputError, match=f"no known architecture fits; the nearest is {named}; a timm"):
        find_network(file_of({"": tensors}), None, ANY)
    with pytest.raises(InputError, match=rf"c\.pth: the tensors do not fit {named}; give the file's"):
        find_network(file_of({"": tensors}), get_architecture("resnet50"), ANY)


@pytest.mark.parametrize(
    ("arch", "message"),
    [
        ("resnet101", r"do not fit resnet101: missing layer3\.6.* and \d+ more"),
        ("vgg16_bn", "do not fit vgg16_bn: missing"),
        ("resnext101_32x8d", "do not fit resnext101_32x8d: missing"),
    ],
)
def test_another_architecture(arch, message):
    with pytest.raises(InputError, match=message):
        find_network(file_of({"": meta("resnet50")}), get_architecture(arch), ANY)


@pytest.mark.parametrize(
    "tensors",
    [
        {"weight": torch.ones(3, 3)},
        {f"blocks.{n}.attn.qkv.weight": torch.ones(4, 4) for n in range(40)},
        {"features.0.weight": torch.ones(64, 3, 3, 3), "features.2.weight": torch.ones(64, 64, 3, 3)},
    ],
)
def test_no_name_is_guessed_where_nothing_fits(tensors):
    with pytest.raises(InputError, match=r"c\.pth: no known .* fits; known are resnet18, .*timm/NAME$"):
        find_network(file_of({"": tensors}), None, ANY)


def test_a_timm_network_must_be_named():
    convnext = meta("timm/convnext_atto")
    with pytest.raises(InputError, match="a timm network needs --arch timm/NAME"):
        find_network(file_of({"": convnext}), None, ANY)
    architecture = get_architecture("timm/convnext_atto")
    for prefix in ("", "module.model.", "1."):
        network, _ = find_network(file_of({"": prefixed(convnext, prefix)}), architecture, ANY)
        assert (network.prefix, network.state_dict.keys()) == (prefix, convnext.keys())
    with pytest.raises(InputError, match=r"do not fit timm/convnext_atto: missing stem\.0\.weight"):
        find_network(file_of({"": meta("resnet50")}), architecture, ANY)


@pytest.mark.parametrize("prefix", ["", "module.", "1."])
def test_names_of_the_original_authors_behind_a_prefix(prefix):
    """ConvNeXt's own, which timm translates."""
    torch.manual_seed(0)
    network = timm.create_model("convnext_atto").state_dict()
    theirs = {_convnext_name(name): tensor for name, tensor in network.items()}
    assert theirs.keys() != network.keys()
    file = file_of({"model": prefixed(theirs, prefix)})
    found, _ = find_network(file, get_architecture("timm/convnext_atto"), ANY)
    assert found.state_dict.keys() == network.keys()
    for name, tensor in network.items():
        assert torch.equal(found.state_dict[name].flatten(), tensor.flatten()), name


def _convnext_name(name: str) -> str:
    """facebookresearch/ConvNeXt's name of a tensor of timm's."""
    parts = name.split(".")
    if parts[0] == "stem":
        return ".".join(["downsample_layers.0", *parts[1:]])
    if parts[0] == "stages" and parts[2] == "downsample":
        return ".".join(["downsample_layers", parts[1], *parts[3:]])
    if parts[0] == "stages":
        renamed = {"conv_dw": "dwconv", "fc1": "pwconv1", "fc2": "pwconv2"}
        return ".".join(["stages", parts[1], *(renamed.get(p, p) for p in parts[3:] if p != "mlp")])
    return name.removeprefix("head.").replace("fc.", "head.")


# The layers that tonylins/pytorch-mobilenet-v2 and its many copies list in one Sequential for a block.
def older_mobilenet(network: nn.Module) -> nn.Module:
    """``network``, torchvision's, with the modules where they were before torchvision nested them."""
    for number, block in enumerate(network.features):
        if 0 < number < 18:
            flat = [m for m in block.conv.modules() if not isinstance(m, nn.Sequential)]
            block.conv = nn.Sequential(*flat)
    return network


@pytest.mark.parametrize("head", [True, False], ids=["classifier", "bottleneck"])
def test_the_older_layout_of_mobilenet(tmp_path, random_classifier, images, head):
    network = older_mobilenet(random_classifier("mobilenet"))
    tensors = network.state_dict()
    if not head:
        tensors = {name: tensor for name, tensor in tensors.items() if name.startswith("features.")}
        assert len(tensors) == 312
    assert "features.2.conv.7.running_var" in tensors
    backbone, conversion = converted(tensors, tmp_path)
    assert conversion.metadata.arch == "mobilenet"
    with torch.no_grad():
        found, expected = backbone(images), network.features(images)
    torch.testing.assert_close(found["res5"], expected, rtol=1e-4, atol=1e-4)


def test_torchvisions_own_file_of_densenet_has_older_names():
    tensors = meta("densenet")
    older = {name.replace("norm1.", "norm.1.").replace("conv2.", "conv.2."): t for name, t in tensors.items()}
    assert "features.denseblock1.denselayer1.norm.1.weight" in older
    network, _ = find_network(file_of({"": older}), None, ANY)
    assert network.state_dict.keys() == tensors.keys()
