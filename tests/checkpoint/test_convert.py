"""Conversion: the Detectron2 backbone computes what torchvision's network computes."""

import hashlib
import pickle

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.modeling import build_backbone, build_model

from rt_detectron.checkpoint import convert
from rt_detectron.checkpoint.architectures import ARCHITECTURES
from rt_detectron.checkpoint.convert import (
    check_architecture,
    convert_checkpoint,
    detect_architecture,
    parse_threat_model,
    to_detectron2_name,
    to_torchvision_name,
)
from rt_detectron.checkpoint.detection_checkpointer import RobustCheckpointer
from rt_detectron.errors import InputError

STAGES = ("res2", "res3", "res4", "res5")


def torchvision_features(network, photograph):
    """res2..res5 as torchvision computes them, from uint8 RGB (3, H, W)."""
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    images = (photograph / 255 - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    features = {}
    hooks = [
        getattr(network, f"layer{i}").register_forward_hook(
            lambda _, __, output, i=i: features.update({f"res{i + 1}": output})
        )
        for i in (1, 2, 3, 4)
    ]
    with torch.no_grad():
        network(images[None])
    for hook in hooks:
        hook.remove()
    return features


def largest_difference(found, expected):
    """Largest over the stages of max |found - expected| / max |expected|."""
    assert set(found) == set(expected) == set(STAGES)
    return max(float((found[s] - expected[s]).abs().max() / expected[s].abs().max()) for s in STAGES)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_features_equal_torchvision(arch, tmp_path, random_classifier, make_cfg, photograph):
    network = random_classifier(arch)
    expected = torchvision_features(network, photograph)
    source, output = tmp_path / f"{arch}.pth", tmp_path / f"{arch}.pkl"
    torch.save(network.state_dict(), source)
    del network
    assert convert_checkpoint(str(source), str(output)).metadata["arch"] == arch
    source.unlink()  # the largest is 0.9 GB, and pytest keeps its temporary folders
    cfg = make_cfg(arch)
    with torch.device("meta"):  # loading must fill every tensor, so initialise none
        backbone = build_backbone(cfg).bottom_up.eval()
    backbone.to_empty(device="cpu")
    RobustCheckpointer(backbone).load(str(output))
    output.unlink()
    mean, std = torch.tensor(cfg.MODEL.PIXEL_MEAN), torch.tensor(cfg.MODEL.PIXEL_STD)
    with torch.no_grad():
        found = backbone(((photograph - mean.view(3, 1, 1)) / std.view(3, 1, 1))[None])
    assert largest_difference(found, expected) < 1e-4


@pytest.mark.parametrize("arch", ["resnet18", "resnet50", "resnext50_32x4d"])
def test_folded_weights_serve_detectron2s_default_preprocessing(
    arch, tmp_path, random_classifier, make_cfg, photograph
):
    """The model's own preprocessing included, from a BGR uint8 image under get_cfg()'s values."""
    network = random_classifier(arch)
    torch.save(network.state_dict(), tmp_path / "c.pth")
    features = {}
    for input_format in ("RGB", "BGR"):
        output = str(tmp_path / f"{input_format}.pkl")
        convert_checkpoint(str(tmp_path / "c.pth"), output, input_format=input_format)
        cfg = make_cfg(arch, "retinanet")
        if input_format == "BGR":
            default = get_cfg()
            cfg.INPUT.FORMAT = default.INPUT.FORMAT
            cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD = default.MODEL.PIXEL_MEAN, default.MODEL.PIXEL_STD
        cfg.MODEL.RESNETS.OUT_FEATURES = list(STAGES)
        model = build_model(cfg).eval()
        RobustCheckpointer(model).load(output)
        image = photograph if input_format == "RGB" else photograph.flip(0)
        with torch.no_grad():
            features[input_format] = model.backbone.bottom_up(
                model.preprocess_image([{"image": image}]).tensor
            )
    assert largest_difference(features["BGR"], features["RGB"]) < 1e-4
    assert largest_difference(features["BGR"], torchvision_features(network, photograph)) < 1e-4


def test_folding_an_unusual_normalisation_records_its_own_mean(tmp_path, random_classifier):
    network = random_classifier("resnet18")
    tensors = {f"module.model.{n}": t for n, t in network.state_dict().items()}
    tensors["module.normalizer.new_mean"] = torch.tensor([0.2, 0.4, 0.6]).view(3, 1, 1)
    tensors["module.normalizer.new_std"] = torch.tensor([0.1, 0.2, 0.4]).view(3, 1, 1)
    torch.save({"model": tensors}, tmp_path / "c.ckpt")
    output = str(tmp_path / "b.pkl")
    metadata = convert_checkpoint(str(tmp_path / "c.ckpt"), output, input_format="BGR").metadata
    assert metadata["pixel_mean"] == pytest.approx([153, 102, 51])
    assert metadata["pixel_std"] == [1, 1, 1]
    with open(output, "rb") as file:
        stem = torch.as_tensor(pickle.load(file)["model"]["stem.conv1.weight"])
    blue = network.conv1.weight[:, 2].detach() / (0.4 * 255)
    torch.testing.assert_close(stem[:, 0], blue, rtol=1e-5, atol=0)


def test_file_contents(tmp_path, random_classifier):
    source, output = tmp_path / "resnet18_linf_eps4.0.ckpt", tmp_path / "new" / "b.pkl"
    torch.save(random_classifier("resnet18").state_dict(), source)
    conversion = convert_checkpoint(str(source), str(output))
    with open(output, "rb") as file:
        content = pickle.load(file)
    assert content["__author__"] == "rt_detectron"
    assert content["matching_heuristics"] is True
    assert (
        content["rt_detectron"]
        == conversion.metadata
        == {
            "arch": "resnet18",
            "norm": "linf",
            "eps": 4.0,
            "input_format": "RGB",
            "pixel_mean": [123.675, 116.28, 103.53],
            "pixel_std": [58.395, 57.12, 57.375],
            "stride_in_1x1": False,
            "source": "resnet18_linf_eps4.0.ckpt",
            "sha256": hashlib.sha256(source.read_bytes()).hexdigest(),
        }
    )
    assert len(content["model"]) == conversion.num_tensors == 100  # 20 convolutions, 20 norms of 4
    assert all(name.split(".")[0] in ("stem", *STAGES) for name in content["model"])
    assert [p.name for p in output.parent.iterdir()] == ["b.pkl"]


@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
def test_names_are_inverse(arch):
    names = [n for n in convert._shapes(arch) if not n.startswith("fc.")]
    converted = [to_detectron2_name(name) for name in names]
    assert [to_torchvision_name(name) for name in converted] == names
    assert len(set(converted)) == len(names)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_detection(arch):
    shapes = convert._shapes(arch)
    state_dict = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    assert detect_architecture(state_dict) == arch
    assert detect_architecture({n: t for n, t in state_dict.items() if not n.startswith("fc.")}) == arch
    counters = {n: t for n, t in state_dict.items() if not n.endswith("num_batches_tracked")}
    assert detect_architecture(counters) == arch


@pytest.fixture
def meta_resnet50():
    shapes = convert._shapes("resnet50")
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


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
    with pytest.raises(InputError, match="did you mean 'resnet50'"):
        check_architecture(meta_resnet50, "resnet5")
    meta_resnet50["fc.weight"] = torch.empty(10, 512)
    with pytest.raises(InputError, match=r"fc\.weight \(10, 512\)"):
        detect_architecture(meta_resnet50)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("resnet50_l2_eps3.ckpt", ("l2", 3.0)),
        ("a/resnet50_l2_eps0.1.ckpt", ("l2", 0.1)),
        ("resnet50_linf_eps4.0.ckpt", ("linf", 4.0)),
        ("wide_resnet50_4_l2_eps0.ckpt", ("l2", 0.0)),
        ("resnet50.pth", (None, None)),
        ("resnet50_l2_eps3_finetuned.pth", (None, None)),
    ],
)
def test_threat_model_of_file_names(name, expected):
    assert parse_threat_model(name) == expected


@pytest.fixture
def source(tmp_path, random_classifier):
    """classifier.pth of our pretraining, for a mean and a threat model of its own."""
    path = tmp_path / "resnet18_l2_eps3.pth"
    metadata = {
        "arch": "resnet18",
        "norm": "linf",
        "eps": 2.0,
        "input_format": "RGB",
        "pixel_mean": [125.3, 123.0, 113.9],
        "pixel_std": [63.0, 62.1, 66.7],
        "stride_in_1x1": False,
        "source": "pretrain",
    }
    torch.save({"model": random_classifier("resnet18").state_dict(), "rt_detectron": metadata}, path)
    return path


def test_given_values_precede_metadata_and_metadata_the_file_name(source, tmp_path):
    output = str(tmp_path / "b.pkl")
    metadata = convert_checkpoint(str(source), output).metadata
    assert (metadata["norm"], metadata["eps"]) == ("linf", 2.0)
    assert metadata["pixel_mean"] == [125.3, 123.0, 113.9]
    metadata = convert_checkpoint(str(source), output, norm="l2", eps=0.0).metadata
    assert (metadata["norm"], metadata["eps"]) == ("l2", 0.0)


def test_standard_training_stays_eps_0_whatever_the_file_is_called(source, tmp_path):
    content = torch.load(source, weights_only=True)
    content["rt_detectron"].update(norm=None, eps=0.0)
    torch.save(content, source)  # resnet18_l2_eps3.pth
    metadata = convert_checkpoint(str(source), str(tmp_path / "b.pkl")).metadata
    assert (metadata["norm"], metadata["eps"]) == (None, 0.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"norm": "l2"}, "go together"),
        ({"norm": "l1", "eps": 1.0}, "unknown norm 'l1'"),
        ({"norm": "l2", "eps": -1.0}, "from 0 on"),
        ({"norm": "l2", "eps": float("nan")}, "from 0 on"),
        ({"arch": "resnet50"}, "do not fit resnet50: missing"),
        ({"input_format": "HSV"}, "RGB or BGR"),
    ],
)
def test_wrong_arguments_write_nothing(source, tmp_path, arguments, message):
    output = tmp_path / "b.pkl"
    output.write_bytes(b"before")
    with pytest.raises(InputError, match=message):
        convert_checkpoint(str(source), str(output), **arguments)
    assert output.read_bytes() == b"before"
    assert {p.name for p in tmp_path.iterdir()} == {"b.pkl", source.name}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input_format": "BGR"}, "only RGB"),
        ({"pixel_std": [1.0, 0.0, 1.0]}, "pixel_std is not three numbers"),
        ({"pixel_mean": "grey"}, "pixel_mean is not three numbers"),
        ({"eps": None}, "eps must be a number"),
    ],
)
def test_damaged_metadata(source, tmp_path, change, message):
    content = torch.load(source)
    content["rt_detectron"].update(change)
    torch.save(content, source)
    with pytest.raises(InputError, match=message):
        convert_checkpoint(str(source), str(tmp_path / "b.pkl"))


def test_impossible_outputs(source, tmp_path):
    with pytest.raises(InputError, match=r"must end in \.pkl"):
        convert_checkpoint(str(source), str(tmp_path / "b.pth"))
    (tmp_path / "folder.pkl").mkdir()
    with pytest.raises(InputError, match="is a folder"):
        convert_checkpoint(str(source), str(tmp_path / "folder.pkl"))
    with pytest.raises(InputError, match="cannot write"):
        convert_checkpoint(str(source), str(source / "b.pkl"))
    link = tmp_path / "link.pkl"
    link.symlink_to(source)
    with pytest.raises(InputError, match="is the input itself"):
        convert_checkpoint(str(source), str(link))
