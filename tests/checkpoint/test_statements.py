"""What a file says of its mean and std and of its activations is used, or the conversion stops."""

import argparse

import pytest
import torch

from rt_detectron.checkpoint.convert import UNIT_PIXELS, convert_checkpoint, read_network
from rt_detectron.utils.errors import InputError

MEAN, STD = torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.2, 0.3, 0.4])
PIXELS = ((102.0, 127.5, 153.0), (51.0, 76.5, 102.0))


@pytest.fixture
def saved(tiny, tmp_path):
    """``saved(tensors, name, **entries)``: a file with the tiny network and these tensors beside it."""

    def save(beside=None, name="c.pth", **entries):
        tensors = {f"model.{n}": t for n, t in tiny().state_dict().items()}
        torch.save({"state_dict": {**tensors, **(beside or {})}, **entries}, tmp_path / name)
        return tmp_path / name

    return save


def pixels(weights):
    return weights.metadata.pixel_mean, weights.metadata.pixel_std


@pytest.mark.parametrize(
    "beside",
    [
        {"mean": MEAN, "std": STD},
        {"norm.mean": MEAN.view(1, 3, 1, 1), "norm.std": STD.view(1, 3, 1, 1)},
        {"normalizer.new_mean": MEAN, "normalizer.new_std": STD, "attacker.normalize.new_mean": MEAN}
        | {"attacker.normalize.new_std": STD},
        {"0.mu": MEAN, "0.sigma": STD},
        {"preprocess.image_mean": MEAN * 255, "preprocess.image_std": STD * 255},
        {"model.pixel_mean": MEAN * 255, "model.pixel_std": STD * 255},
        {"normalize.mean": MEAN.half().float(), "normalize.std": STD, "iterations": torch.tensor([7.0])},
    ],
)
def test_stored_numbers_are_used(saved, beside):
    weights = read_network(saved(beside))
    assert pixels(weights)[0] == pytest.approx(PIXELS[0], abs=0.05)
    assert pixels(weights)[1] == pytest.approx(PIXELS[1], abs=0.05)
    assert weights.pixels_are_known
    assert len(weights.guesses) == 1  # the network


def test_one_number_for_all_colours(saved):
    weights = read_network(saved({"norm.mean": torch.tensor(0.5), "norm.std": torch.tensor([0.25])}))
    assert pixels(weights) == ((127.5,) * 3, (63.75,) * 3)


@pytest.mark.parametrize(
    ("mean", "std"), [((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)), ((0.0, 0.0, 0.0), (255.0, 255.0, 255.0))]
)
def test_numbers_that_change_nothing(saved, mean, std):
    weights = read_network(saved({"norm.mean": torch.tensor(mean), "norm.std": torch.tensor(std)}))
    assert pixels(weights) == UNIT_PIXELS


@pytest.mark.parametrize(
    "entries",
    [
        {"mean": [0.4, 0.5, 0.6], "std": (0.2, 0.3, 0.4)},
        {"args": {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.4], "betas": [0.9, 0.99, 0.999]}},
        {"args": argparse.Namespace(mean=[0.4, 0.5, 0.6], std=[0.2, 0.3, 0.4], model="tiny", lr=0.1)},
        {"transform": {"mean": MEAN, "std": STD}},
    ],
)
def test_settings_in_the_file_are_used(saved, entries):
    assert pixels(read_network(saved(**entries))) == PIXELS


@pytest.mark.parametrize(
    ("beside", "message"),
    [
        (
            {"normalize.offset": MEAN},
            "state_dict.normalize.offset, three numbers that may be its mean",
        ),
        ({"mean": MEAN}, "state_dict.mean, three numbers"),
        ({"a.mean": MEAN, "b.std": STD}, "state_dict.a.mean, state_dict.b.std, three numbers"),
        ({"0.running_mean": MEAN, "0.running_var": STD}, "0.running_mean"),
        ({"mean": MEAN, "std": STD, "norm.mean": STD, "norm.std": STD}, "several means and stds that differ"),
        (
            {"mean": torch.tensor([103.53, 116.28, 123.675]), "std": torch.ones(3)},
            "ImageNet's mean in the order of BGR",
        ),
    ],
)
def test_what_is_unclear_stops(saved, beside, message):
    path = saved(beside)
    with pytest.raises(InputError) as error:
        convert_checkpoint(path, path.with_name("b.pkl"))
    assert str(error.value).startswith(f"{path} holds ")
    assert message in str(error.value)
    assert "say them by --pixel-mean and --pixel-std of" in str(error.value)
    assert not path.with_name("b.pkl").exists()
    assert pixels(read_network(path, pixels=PIXELS)) == PIXELS  # the way out


@pytest.mark.parametrize("number", [float("nan"), -0.1, 300.0])
def test_impossible_numbers_name_the_file(saved, number):
    path = saved({"norm.mean": torch.tensor([number, 0.5, 0.5]), "norm.std": STD})
    with pytest.raises(InputError, match=r"c\.pth: pixel_mean is not three numbers in 0..255"):
        read_network(path)


def test_metadata_that_contradicts_the_tensors(saved):
    metadata = read_network(saved(), pixels=PIXELS).metadata.to_dict()
    same = {"norm.mean": MEAN, "norm.std": STD}
    assert pixels(read_network(saved(same, rt_detectron=metadata))) == PIXELS
    path = saved({"norm.mean": STD, "norm.std": STD}, rt_detectron=metadata)
    with pytest.raises(InputError, match=r"c\.pth holds 51 76\.5 102 and .* says 102 127\.5 153 and"):
        read_network(path)


def test_what_is_assumed_is_told(saved):
    network, normalization = read_network(saved()).guesses
    assert network == "the network is taken for tiny by its tensors; --arch says it for certain"
    assert normalization.startswith(
        "the file holds no mean and std: taken for 123.675 116.28 103.53 and 58.395"
    )
    assert len(read_network(saved(), arch="tiny").guesses) == 1
    assert len(read_network(saved(name="tiny_l2_eps0.5.pth")).guesses) == 1
    assert len(read_network(saved(arch="tiny")).guesses) == 1
    assert read_network(saved(), arch="tiny", pixels=PIXELS).guesses == []


@pytest.mark.parametrize(
    "name",
    [
        "tiny_gelu.pth",
        "tiny-silu-linf.pth",
        "resnet50_swish.pth",
        "resnetblur50-84f4748f.pth",
        "resnetaa50_a1h.pth",
        "ARES_ResNet152_AT.pth",
        "ARES_Wide_ResNet50_2_AT.pth",
        "wresnet50_at.pth",
        "resnet50_caffe-788b5fa3.pth",
        "deeplabv3_resnet50_coco-cd0a2569.pth",
    ],
)
def test_names_of_networks_that_only_look_alike(saved, name):
    path = saved(name=name)
    with pytest.raises(InputError, match=rf"{name}: its tensors fit tiny, but its name says '\w+': perhaps "):
        read_network(path)
    weights = read_network(path, arch="tiny")  # the way out
    assert weights.metadata.arch == "tiny"
    assert weights.guesses[0].startswith("the network is taken for tiny as you say, but its name says ")


@pytest.mark.parametrize(
    "entries",
    [
        {"arch": "resnetblur50"},
        {"config": {"act_layer": "gelu"}},
        {"config": {"act_gelu": True}},
        {"args": argparse.Namespace(model="resnet50", act_layer="nn.SiLU")},
        {"hyper_parameters": {"backbone": "resnet50d_mish"}},
    ],
)
def test_settings_of_networks_that_only_look_alike(saved, entries):
    with pytest.raises(InputError, match=r"c\.pth: .* fit tiny, but its entry \S+ says '\w+': perhaps"):
        read_network(saved(**entries))


@pytest.mark.parametrize(
    "entries",
    [
        {"arch": "tiny"},
        {"config": {"act_gelu": False, "act_layer": "relu", "optimizer": "adamw"}},
        {"args": argparse.Namespace(model="evaluation", label_smoothing=0.1, notes="x" * 500 + " gelu")},
    ],
)
def test_settings_that_say_nothing_against_it(saved, entries):
    assert read_network(saved(name="resnet50_at_home.pth", **entries)).metadata.arch == "tiny"
