"""The library call: whole networks by a zoo name or a file."""

from dataclasses import replace

import pytest
import torch
from detectron2.modeling import FPN
from torchvision.models.feature_extraction import create_feature_extractor

from rt_detectron import load_backbone, load_classifier
from rt_detectron.checkpoint import zoo
from rt_detectron.checkpoint.architectures import get_architecture
from rt_detectron.checkpoint.convert import convert_checkpoint, read_network
from rt_detectron.checkpoint.formats import write_pickle
from rt_detectron.utils.errors import InputError


@pytest.fixture
def mirror(tmp_path, monkeypatch):
    """A folder for files under published names, whatever is in them, with a cache beside it."""
    folder = tmp_path / "zoo"
    folder.mkdir()
    monkeypatch.setenv("RT_DETECTRON_ZOO", str(folder))
    monkeypatch.setenv("RT_DETECTRON_CACHE", str(tmp_path / "cache"))
    entries = {name: replace(entry, size=None, sha256=None) for name, entry in zoo._entries().items()}
    monkeypatch.setattr(zoo, "_entries", lambda: entries)
    return folder


@pytest.fixture
def publish(mirror, random_classifier):
    """``publish(arch)`` puts ``{arch}_l2_eps3.ckpt`` into the mirror and returns torchvision's network."""

    def publish(arch):
        network = random_classifier(arch, 7)
        tensors = {f"module.model.{name}": tensor for name, tensor in network.state_dict().items()}
        torch.save({"model": tensors}, mirror / f"{arch}_l2_eps3.ckpt")
        return network

    return publish


def normalised(photograph):
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    return ((photograph / 255 - mean) / std)[None]


@pytest.mark.parametrize(
    ("detector", "levels"),
    [
        (None, ["res2", "res3", "res4", "res5"]),
        ("fpn", ["p2", "p3", "p4", "p5", "p6"]),
        ("retinanet", ["p3", "p4", "p5", "p6", "p7"]),
    ],
)
@pytest.mark.parametrize("arch", ["resnet18", "shufflenet"])
def test_backbones_come_with_their_weights(arch, detector, levels, publish, photograph):
    network = publish(arch)
    backbone = load_backbone(f"{arch}_l2_eps3", detector)
    assert list(backbone.output_shape()) == levels
    assert isinstance(backbone, FPN) == (detector is not None)
    images = normalised(photograph)
    if detector is None:
        last = {"resnet18": "layer4", "shufflenet": "conv5"}[arch]
        expected = []
        network.get_submodule(last).register_forward_hook(lambda _, __, output: expected.append(output))
        with torch.no_grad():
            network(images)
            found = backbone.eval()(images)["res5"]
        torch.testing.assert_close(found, expected[0], rtol=1e-4, atol=1e-4 * float(expected[0].abs().max()))
    else:
        features = backbone(images)
        assert {name: 96 // feature.shape[2] for name, feature in features.items()}[levels[0]] == (
            4 if detector == "fpn" else 8
        )
    metadata = backbone.metadata
    assert (metadata.arch, metadata.norm, metadata.eps) == (arch, "l2", 3.0)


def test_folded_backbone_says_what_it_takes(publish):
    publish("resnet18")
    assert load_backbone("resnet18_l2_eps3-bgr").metadata.input_format == "BGR"


def test_timm_backbone_from_a_file(tmp_path, random_classifier, photograph):
    network = random_classifier("timm/convnext_atto", 7)
    torch.save(network.state_dict(), tmp_path / "c.pth")
    output = str(tmp_path / "convnext.pkl")
    convert_checkpoint(str(tmp_path / "c.pth"), output, arch="timm/convnext_atto", norm="linf", eps=4.0)
    expected = []
    network.stages[3].register_forward_hook(lambda _, __, output: expected.append(output))
    images = normalised(photograph)
    backbone = load_backbone(output)
    with torch.no_grad():
        network(images)
        found = backbone.eval()(images)["res5"]
    torch.testing.assert_close(found, expected[0])
    assert load_classifier(str(tmp_path / "c.pth"), arch="timm/convnext_atto").num_classes == 7
    pyramid = load_backbone(output, "fpn", out_norm="LN")  # whose norms are in no file
    assert len(pyramid.bottom_up.out_norms) == 4
    assert torch.equal(pyramid.bottom_up.trunk.stem_0.weight, network.stem[0].weight)


def test_norm_and_freezing(publish):
    publish("resnet18")
    backbone = load_backbone("resnet18_l2_eps3", norm="BN", freeze_at=0)
    assert all(parameter.requires_grad for parameter in backbone.parameters())
    backbone = load_backbone("resnet18_l2_eps3", freeze_at=5)
    assert not any(parameter.requires_grad for parameter in backbone.parameters())


@pytest.mark.parametrize("arch", ["resnet18", "mobilenet"])
def test_classifier_takes_pixels_in_0_to_1(arch, publish, mirror, photograph):
    network = publish(arch)
    for name in (f"{arch}_l2_eps3", str(mirror / f"{arch}_l2_eps3.ckpt")):
        classifier = load_classifier(name)
        assert not classifier.training
        with torch.no_grad():
            logits = classifier(photograph[None] / 255)
            torch.testing.assert_close(logits, network(normalised(photograph)), rtol=1e-3, atol=1e-3)
        assert logits.shape == (1, 7)


def test_stylized_imagenet_classifiers(tmp_path, random_classifier, photograph):
    """The public layout of Geirhos et al., who document ImageNet's mean and std for the input."""
    name = "resnet50_train_60_epochs-c8e5653e.pth.tar"
    network = random_classifier("resnet50", 7)
    tensors = {f"module.{key}": tensor for key, tensor in network.state_dict().items()}
    path = str(tmp_path / name)
    torch.save({"epoch": 60, "arch": "resnet50", "state_dict": tensors, "best_prec1": 60.2}, path)
    classifier = load_classifier(path)
    assert classifier.arch == "resnet50"
    with torch.no_grad():
        logits = classifier(photograph[None] / 255)
        torch.testing.assert_close(logits, network(normalised(photograph)), rtol=1e-3, atol=1e-3)
    convert_checkpoint(path, str(tmp_path / "backbone.pkl"))
    metadata = load_backbone(str(tmp_path / "backbone.pkl")).metadata
    assert (metadata.arch, metadata.norm, metadata.eps) == ("resnet50", None, None)
    assert metadata.source == name


def test_wrong_requests_are_named(publish, mirror, tmp_path, backbone_file):
    publish("resnet18")
    with pytest.raises(InputError, match="did you mean resnet18_l2_eps3"):
        load_backbone("resnet18_l2_eps33")
    with pytest.raises(InputError, match="unknown detector 'yolo': None, 'fpn', 'retinanet', 'sfp', 'retin"):
        load_backbone("resnet18_l2_eps3", "yolo")
    with pytest.raises(InputError, match="cannot read"):
        load_backbone(str(tmp_path / "none.pkl"))
    with pytest.raises(InputError, match="cannot read"):
        load_classifier("resnet18_l2_eps3.ckpt")
    with pytest.raises(InputError, match="cannot read"):
        load_classifier("resnet50_train_60_epochs-c8e5653e.pth.tar")
    with pytest.raises(InputError, match="backbone without the classifier's last layer"):
        load_classifier(backbone_file)


@pytest.mark.parametrize("arch", ["resnet18", "mobilenet", "mnasnet", "shufflenet"])
def test_a_fresh_last_layer_and_all_else_from_the_file(arch, publish, mirror):
    network = publish(arch)
    for name in (f"{arch}_l2_eps3", f"robust://{arch}_l2_eps3.pkl"):
        classifier = load_classifier(name, num_classes=3)
        last = classifier.network.get_submodule(classifier.last_linear)
        assert (last.out_features, classifier.num_classes) == (3, 3)
        found = classifier.network.state_dict()
        for key, tensor in network.state_dict().items():
            assert key.startswith(classifier.last_linear) or torch.equal(found[key], tensor), key
    assert {key: getattr(classifier.metadata, key) for key in ("arch", "norm", "eps")} == {
        "arch": arch,
        "norm": "l2",
        "eps": 3.0,
    }


def test_a_backbone_becomes_a_classifier_if_a_last_layer_is_all_it_lacks(random_classifier, mirror):
    for arch in ("resnet18", "vgg16_bn"):
        expected = random_classifier(arch).state_dict()
        backbone = {new: expected[name] for name, new in get_architecture(arch).backbone_names.items()}
        torch.save(expected, mirror / f"{arch}.pth")
        metadata = read_network(mirror / f"{arch}.pth").metadata
        write_pickle(backbone, metadata, str(mirror / f"my_{arch}.pkl"))
    expected = random_classifier("resnet18").state_dict()
    for name in (str(mirror / "my_resnet18.pkl"), "robust://my_resnet18.pkl"):
        found = load_classifier(name, num_classes=3).network.state_dict()
        assert torch.equal(found["layer4.1.conv2.weight"], expected["layer4.1.conv2.weight"])
        assert torch.equal(found["bn1.running_var"], expected["bn1.running_var"])
    with pytest.raises(InputError, match=r"a backbone without classifier\.0\.weight: give the classifier's"):
        load_classifier(str(mirror / "my_vgg16_bn.pkl"), num_classes=3)


def test_a_timm_network_gets_a_fresh_last_layer(tmp_path, random_classifier):
    torch.save(random_classifier("timm/convnext_atto", 7).state_dict(), tmp_path / "c.pth")
    classifier = load_classifier(str(tmp_path / "c.pth"), "timm/convnext_atto", num_classes=3)
    assert classifier(torch.rand(1, 3, 32, 32)).shape == (1, 3)


@pytest.mark.parametrize("arch", ["resnet18", "mobilenet"])
def test_a_loaded_network_is_torchvisions_own(arch, publish):
    """So that tools for torchvision's networks work on it."""
    publish(arch)
    network = load_classifier(f"{arch}_l2_eps3").network
    for module in network.modules():
        assert type(module).__module__.startswith(("torch.nn.", "torchvision.")), type(module)
    images = torch.rand(2, 3, 64, 64)  # the last maps have 2x2 pixels
    with torch.no_grad():
        logits = network(images)
        last = {"resnet18": "layer4", "mobilenet": "features"}[arch]
        features = create_feature_extractor(network, [last])(images)[last]
        assert features.shape[2:] == (2, 2)
        torch.testing.assert_close(torch.jit.script(network)(images), logits)
        torch.testing.assert_close(torch.jit.trace(network, images)(images), logits)
        zeros = {name: torch.zeros_like(parameter) for name, parameter in network.named_parameters()}
        assert not torch.func.functional_call(network, zeros, (images,)).any()
        torch.testing.assert_close(torch.func.functional_call(network, {}, (images,)), logits)
    per_image = torch.func.vmap(torch.func.grad(lambda image: network(image[None]).sum()))(images)
    assert per_image.shape == images.shape
