"""Conversion: the Detectron2 backbone computes what torchvision's network computes."""

import hashlib
import json
import pickle
from itertools import pairwise

import numpy as np
import pytest
import timm
import torch
from detectron2.config import get_cfg
from detectron2.modeling import build_backbone, build_model
from safetensors.torch import load_file, save_file

from rt_detectron import load_backbone
from rt_detectron.checkpoint import convert, formats
from rt_detectron.checkpoint.architectures import (
    ARCHITECTURES,
    IMAGENET_MEAN,
    IMAGENET_STD,
    build_classifier,
    get_architecture,
)
from rt_detectron.checkpoint.checkpointer import RobustCheckpointer
from rt_detectron.checkpoint.convert import convert_checkpoint, parse_threat_model
from rt_detectron.utils.errors import InputError

STAGES = ("res2", "res3", "res4", "res5")


def torchvision_features(arch, network, photograph):
    """res2..res5 as torchvision computes them, from RGB (3, H, W) in [0, 255]."""
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    images = (photograph / 255 - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    features, hooks = {}, []
    for stage in STAGES:
        taps = ARCHITECTURES[arch].taps or {f"res{i + 1}": f"layer{i}" for i in (1, 2, 3, 4)}
        # torchvision's DenseNet applies its last ReLU by a function, to all of its features.
        module = network.get_submodule("features" if taps[stage] == "relu" else taps[stage])
        hooks.append(
            module.register_forward_hook(
                # a clone, since later layers work in place
                lambda _, __, output, stage=stage, last=taps[stage] == "relu": features.update(
                    {stage: output.relu() if last else output.clone()}
                )
            )
        )
    with torch.no_grad():
        network(images[None])
    for hook in hooks:
        hook.remove()
    return features


def largest_difference(found, expected):
    """Largest over the stages of max |found - expected| / max |expected|."""
    assert set(found) == set(expected) == set(STAGES)
    return max(float((found[s] - expected[s]).abs().max() / expected[s].abs().max()) for s in STAGES)


# The largest have the layouts of smaller ones, and take longest.
LARGEST = (
    "wide_resnet50_2",
    "wide_resnet50_4",
    "wide_resnet101_2",
    "resnext101_32x8d",
    "resnet152",
    "ra_resnet101",
    "ra_wrn101_2",
)
TAPPED = [arch for arch, known in ARCHITECTURES.items() if known.taps and arch not in LARGEST]


@pytest.mark.parametrize(
    "arch",
    [pytest.param(arch, marks=pytest.mark.slow) if arch in LARGEST else arch for arch in ARCHITECTURES],
)
def test_features_equal_torchvision(arch, tmp_path, random_classifier, make_cfg, photograph):
    network = random_classifier(arch)
    source, output = tmp_path / f"{arch}.pth", tmp_path / f"{arch}.pkl"
    torch.save(network.state_dict(), source)
    # In double precision, since rounding alone differs by more than the bound on some processors.
    photograph = photograph.double()
    expected = torchvision_features(arch, network.double(), photograph)
    del network
    assert convert_checkpoint(str(source), str(output)).metadata.arch == arch
    source.unlink()  # the largest is 0.9 GB, and pytest keeps its temporary folders
    cfg = make_cfg(arch)
    cfg.MODEL.BACKBONE.NAME = "build_robust_torchvision_backbone"
    cfg.MODEL.RESNETS.OUT_FEATURES = list(STAGES)
    with torch.device("meta"):  # loading must fill every tensor, so initialise none
        backbone = build_backbone(cfg).eval()
    backbone.to_empty(device="cpu")
    RobustCheckpointer(backbone).load(str(output))
    backbone.double()
    output.unlink()
    mean, std = torch.tensor(cfg.MODEL.PIXEL_MEAN), torch.tensor(cfg.MODEL.PIXEL_STD)
    with torch.no_grad():
        found = backbone(((photograph - mean.view(3, 1, 1)) / std.view(3, 1, 1))[None])
    assert largest_difference(found, expected) < 1e-4


@pytest.mark.parametrize(
    "arch",
    [
        pytest.param(arch, marks=pytest.mark.slow) if arch == "vgg16_bn" else arch
        for arch in ("resnet18", "resnet50", "resnext50_32x4d", *TAPPED)
    ],
)
def test_folded_weights_serve_detectron2s_default_preprocessing(
    arch, tmp_path, random_classifier, make_cfg, photograph
):
    """The model's own preprocessing included, from a BGR uint8 image under get_cfg()'s values."""
    network = random_classifier(arch)
    torch.save(network.state_dict(), tmp_path / "c.pth")
    output = str(tmp_path / "b.pkl")
    convert_checkpoint(str(tmp_path / "c.pth"), output, input_format="BGR")
    cfg = make_cfg(arch, "retinanet")
    cfg.MODEL.BACKBONE.NAME = "build_retinanet_robust_torchvision_fpn_backbone"
    default = get_cfg()
    cfg.INPUT.FORMAT = default.INPUT.FORMAT
    cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD = default.MODEL.PIXEL_MEAN, default.MODEL.PIXEL_STD
    cfg.MODEL.RESNETS.OUT_FEATURES = cfg.MODEL.FPN.IN_FEATURES = list(STAGES)
    model = build_model(cfg).eval()
    RobustCheckpointer(model).load(output)
    with torch.no_grad():
        found = model.backbone.bottom_up(model.preprocess_image([{"image": photograph.flip(0)}]).tensor)
    # Rounding, which random weights amplify differently with every number of threads and kind of CPU: up to
    # 1.02e-4 was seen. That the RGB weights compute torchvision's features, too, is the test above.
    assert largest_difference(found, torchvision_features(arch, network, photograph)) < 5e-4


@pytest.mark.parametrize(
    ("name", "stem"), [("vit_tiny_r_s16_p8_224", "StdConv2dSame"), ("nf_regnet_b0", "ScaledStdConv2d")]
)
def test_nothing_is_folded_into_standardised_weights(tmp_path, name, stem):
    """timm's weight-standardised convolutions scale away whatever their weights are multiplied by."""
    torch.manual_seed(0)
    network = timm.create_model(name)
    architecture = get_architecture(f"timm/{name}")
    assert type(network.get_submodule(architecture.stem)).__name__ == stem
    torch.save(network.state_dict(), tmp_path / "c.pth")
    with pytest.raises(InputError, match=r"c\.pth: the first convolution .* standardises its own weights"):
        convert_checkpoint(tmp_path / "c.pth", tmp_path / "b.pkl", architecture.name, input_format="BGR")
    assert not (tmp_path / "b.pkl").exists()


@pytest.mark.parametrize(
    ("name", "activation", "input_format"),
    [("resnet18", "gelu", "BGR"), ("resnet18", "silu", "RGB"), ("resnetblur18", None, "BGR")],
)
def test_lookalikes_of_resnets_are_built_as_they_were(tmp_path, photograph, name, activation, input_format):
    """The tensors are those of a plain ResNet; its features are another's."""
    torch.manual_seed(0)
    network = timm.create_model(name, **({"act_layer": activation} if activation else {})).eval()
    torch.save(network.state_dict(), tmp_path / "c.pth")
    arch = f"timm/{name}:act_layer={activation}" if activation else f"timm/{name}"
    convert_checkpoint(tmp_path / "c.pth", tmp_path / "b.pkl", arch, input_format=input_format)
    backbone = load_backbone(tmp_path / "b.pkl").eval()
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    images = (photograph - mean) / std
    with torch.no_grad():
        found = backbone((images if input_format == "RGB" else (photograph - mean).flip(0))[None])
        expected = network.forward_features(images[None])
    torch.testing.assert_close(found["res5"], expected, rtol=1e-3, atol=1e-4)


def test_folding_an_unusual_normalisation_records_its_own_mean(tmp_path, random_classifier):
    network = random_classifier("resnet18")
    tensors = {f"module.model.{n}": t for n, t in network.state_dict().items()}
    tensors["module.normalizer.new_mean"] = torch.tensor([0.2, 0.4, 0.6]).view(3, 1, 1)
    tensors["module.normalizer.new_std"] = torch.tensor([0.1, 0.2, 0.4]).view(3, 1, 1)
    torch.save({"model": tensors}, tmp_path / "c.ckpt")
    output = str(tmp_path / "b.pkl")
    metadata = convert_checkpoint(str(tmp_path / "c.ckpt"), output, input_format="BGR").metadata
    assert metadata.pixel_mean == pytest.approx([153, 102, 51])
    assert metadata.pixel_std == (1, 1, 1)
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
        == conversion.metadata.to_dict()
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


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("resnet50_l2_eps3.ckpt", ("l2", 3.0)),
        ("a/resnet50_l2_eps0.1.ckpt", ("l2", 0.1)),
        ("resnet50_linf_eps4.0.ckpt", ("linf", 4.0)),
        ("wide_resnet50_4_l2_eps0.ckpt", ("l2", 0.0)),
        ("resnet50.pth", (None, None)),
        ("resnet50_l2_eps3_finetuned.pth", (None, None)),
        ("resnet50_train_45_epochs_combined_IN_SF-2a0d100e.pth.tar", (None, None)),
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
    assert (metadata.norm, metadata.eps) == ("linf", 2.0)
    assert metadata.pixel_mean == (125.3, 123.0, 113.9)
    metadata = convert_checkpoint(str(source), output, norm="l2", eps=0.0).metadata
    assert (metadata.norm, metadata.eps) == ("l2", 0.0)


def test_standard_training_stays_eps_0_whatever_the_file_is_called(source, tmp_path):
    content = torch.load(source, weights_only=True)
    content["rt_detectron"].update(norm=None, eps=0.0)
    torch.save(content, source)  # resnet18_l2_eps3.pth
    metadata = convert_checkpoint(str(source), str(tmp_path / "b.pkl")).metadata
    assert (metadata.norm, metadata.eps) == (None, 0.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"norm": "l2"}, "go together"),
        ({"norm": "l0", "eps": 1.0}, "unknown norm 'l0'"),
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
        ({"input_format": "BGR"}, "for BGR images: convert the file it was made from"),
        ({"pixel_std": [1.0, 0.0, 1.0]}, "pixel_std is not three numbers"),
        ({"pixel_mean": "grey"}, "pixel_mean is not three numbers"),
        ({"eps": None}, "eps must be a number"),
        ({"norm": "l0"}, "unknown norm 'l0'"),
        ({"arch": ["resnet18"]}, "arch is .* it must be a name"),
        ({"stride_in_1x1": "no"}, "stride_in_1x1 is 'no'; it must be true or false"),
        ({"input_format": None}, "unknown input format None"),
        ({"sha256": 7}, "sha256 is 7"),
    ],
)
def test_damaged_metadata(source, tmp_path, change, message):
    content = torch.load(source)
    content["rt_detectron"].update(change)
    torch.save(content, source)
    with pytest.raises(InputError, match=message):
        convert_checkpoint(str(source), str(tmp_path / "b.pkl"))


KEYS = ("arch", "norm", "eps", "input_format", "pixel_mean", "pixel_std", "stride_in_1x1", "source")


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("ending", [".pth", ".pkl", ".safetensors"])
def test_partial_metadata_names_file_and_key(source, tmp_path, key, ending):
    content = torch.load(source)
    metadata = content["rt_detectron"]
    del metadata[key]
    path = tmp_path / f"partial{ending}"
    if ending == ".pth":
        torch.save(content, path)
    elif ending == ".pkl":
        path.write_bytes(pickle.dumps({"model": {}, "__author__": "rt_detectron", "rt_detectron": metadata}))
    else:
        save_file(content["model"], path, metadata={"rt_detectron": json.dumps(metadata)})
    with pytest.raises(InputError, match=rf"partial\{ending}: its metadata is damaged \({key} missing\)"):
        convert_checkpoint(str(path), str(tmp_path / "b.pth" if ending == ".pkl" else tmp_path / "b.pkl"))


def test_metadata_that_is_no_mapping(source, tmp_path):
    torch.save({**torch.load(source), "rt_detectron": "resnet18"}, source)
    with pytest.raises(InputError, match="its metadata is damaged"):
        convert_checkpoint(str(source), str(tmp_path / "b.pkl"))


def test_the_architecture_is_looked_up_once(source, tmp_path, monkeypatch):
    asked = []
    original = convert.get_architecture

    def counted(name):
        asked.extend([name] if isinstance(name, str) else [])
        return original(name)

    for module in (convert, formats):
        monkeypatch.setattr(module, "get_architecture", counted)
    convert_checkpoint(str(source), str(tmp_path / "b.pkl"), input_format="BGR")
    assert asked == ["resnet18"]


def test_impossible_outputs(source, tmp_path):
    with pytest.raises(InputError, match=r"must end in \.pkl, \.pth, \.ckpt, \.safetensors"):
        convert_checkpoint(str(source), str(tmp_path / "b.onnx"))
    with pytest.raises(InputError, match=r"give a \.pkl"):
        convert_checkpoint(str(source), str(tmp_path / "b.pth"), input_format="BGR")
    (tmp_path / "folder.pkl").mkdir()
    with pytest.raises(InputError, match="is a folder"):
        convert_checkpoint(str(source), str(tmp_path / "folder.pkl"))
    with pytest.raises(InputError, match="cannot write"):
        convert_checkpoint(str(source), str(source / "b.pkl"))
    link = tmp_path / "link.pkl"
    link.symlink_to(source)
    with pytest.raises(InputError, match="is the input itself"):
        convert_checkpoint(str(source), str(link))


def read(path):
    """A file's tensors, each by an independent reader."""
    if path.suffix == ".pkl":
        with open(path, "rb") as file:
            return {name: torch.as_tensor(array) for name, array in pickle.load(file)["model"].items()}
    if path.suffix == ".safetensors":
        return load_file(path)
    content = torch.load(path, weights_only=True)
    if path.suffix == ".pth":
        return content
    plain, attacked = (
        {n.removeprefix(p): t for n, t in content["model"].items() if n.startswith(p)}
        for p in ("module.model.", "module.attacker.model.")
    )
    assert_equal(plain, attacked)
    return plain


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("arch", ["resnet18", "shufflenet", "mobilenet"])
def test_round_trips_are_bit_equal(arch, tmp_path, random_classifier):
    network = random_classifier(arch)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    paths = [tmp_path / name for name in ("a.pth", "b.ckpt", "c.safetensors", "d.pth", "e.pkl")]
    torch.save(network.to(memory_format=torch.channels_last).state_dict(), paths[0])
    for source, output in pairwise(paths):
        convert_checkpoint(str(source), str(output), norm="l2", eps=3.0)
    for path in paths[1:4]:
        assert_equal(read(path), before)
    build_classifier(arch, 5).load_state_dict(torch.load(tmp_path / "d.pth", weights_only=True))
    # From the backbone back to every format, and once more to the backbone.
    backbone = {
        name: tensor
        for name, tensor in before.items()
        if not name.startswith(ARCHITECTURES[arch].head) and not name.endswith("num_batches_tracked")
    }
    for ending in (".pth", ".ckpt", ".safetensors"):
        back, again = tmp_path / f"f{ending}", tmp_path / f"g{ending}.pkl"
        convert_checkpoint(str(tmp_path / "e.pkl"), str(back))
        assert_equal(read(back), backbone)
        convert_checkpoint(str(back), str(again))
        assert_equal(read(again), read(tmp_path / "e.pkl"))


@pytest.mark.parametrize("ending", [".ckpt", ".safetensors"])
def test_metadata_survives_a_round_trip(ending, source, tmp_path):
    first = convert_checkpoint(str(source), str(tmp_path / "a.pkl")).metadata
    convert_checkpoint(str(source), str(tmp_path / f"b{ending}"))
    assert convert_checkpoint(str(tmp_path / f"b{ending}"), str(tmp_path / "c.pkl")).metadata == first
    convert_checkpoint(str(tmp_path / "a.pkl"), str(tmp_path / f"d{ending}"))
    assert convert_checkpoint(str(tmp_path / f"d{ending}"), str(tmp_path / "e.pkl")).metadata == first


def test_robustness_layout_is_complete(source, tmp_path):
    """The names that robustness.attacker.AttackerModel's state dict has, under DataParallel."""
    convert_checkpoint(str(source), str(tmp_path / "a.ckpt"))
    content = torch.load(tmp_path / "a.ckpt", weights_only=True)
    network = set(build_classifier("resnet18").state_dict())
    statistics = {"new_mean", "new_std"}
    assert set(content["model"]) == {
        *(f"module.{part}.{name}" for part in ("model", "attacker.model") for name in network),
        *(f"module.{part}.{name}" for part in ("normalizer", "attacker.normalize") for name in statistics),
    }
    mean = content["model"]["module.normalizer.new_mean"]
    assert mean.shape == (3, 1, 1)
    torch.testing.assert_close(mean.flatten(), torch.tensor([125.3, 123.0, 113.9]) / 255)


def test_folded_weights_do_not_go_back(source, tmp_path):
    convert_checkpoint(str(source), str(tmp_path / "a.pkl"), input_format="BGR")
    with pytest.raises(InputError, match="for BGR images: convert the file it was made from"):
        convert_checkpoint(str(tmp_path / "a.pkl"), str(tmp_path / "b.pth"))


def test_foreign_pickles_do_not_go_back(tmp_path):
    with open(tmp_path / "R-50.pkl", "wb") as file:
        pickle.dump({"model": {"stem.conv1.weight": np.zeros((64, 3, 7, 7))}, "__author__": "x"}, file)
    with pytest.raises(InputError, match="not written by rt_detectron"):
        convert_checkpoint(str(tmp_path / "R-50.pkl"), str(tmp_path / "b.pth"))


def test_a_full_disk_is_one_line(source, tmp_path, monkeypatch):
    def fail(state_dict, metadata, path):
        raise RuntimeError("[enforce fail at inline_container.cc:668] . unexpected pos\n 64 vs 0")

    monkeypatch.setitem(convert.WRITERS, ".pth", fail)
    with pytest.raises(InputError, match=r"cannot write .*b\.pth: \[enforce fail") as error:
        convert_checkpoint(str(source), str(tmp_path / "b.pth"))
    assert "\n" not in str(error.value)
