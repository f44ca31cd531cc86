"""The tool as a user runs it."""

import importlib.util
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rt_detectron.checkpoint.formats import read_pickle
from rt_detectron.checkpoint.metadata import Metadata
from rt_detectron.checkpoint.mmdetection import DetectorConversion

UNIT_PIXELS = ["--pixel-mean", "0.485", "0.456", "0.406", "--pixel-std", "0.229", "0.224", "0.225"]
TOOL = Path(__file__).parents[2] / "tools" / "convert_checkpoint.py"


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("convert_checkpoint", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def source(tmp_path_factory, random_classifier):
    path = tmp_path_factory.mktemp("source") / "resnet18_l2_eps3.ckpt"
    tensors = {f"module.model.{n}": t for n, t in random_classifier("resnet18").state_dict().items()}
    torch.save({"model": tensors, "schedule": print}, path)
    return path


def test_converts_and_prints_the_config_lines(source, tmp_path):
    output = tmp_path / "b.pkl"
    result = subprocess.run(
        [sys.executable, "-W", "ignore", TOOL, source, output, "--input-format", "BGR"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(TOOL.parents[1])},
    )
    assert result.returncode == 0, result.stderr
    with open(output, "rb") as file:
        metadata = pickle.load(file)["rt_detectron"]
    assert f"resnet18, l2 eps 3, sha256 {metadata['sha256']}" in result.stdout
    assert f"wrote  {output}: 100 tensors\n" in result.stdout
    for line in (
        f'MODEL.WEIGHTS "{output}"',
        'MODEL.BACKBONE.NAME "build_robust_resnet_fpn_backbone"',
        'MODEL.ROBUST.ARCH "resnet18"',
        'INPUT.FORMAT "BGR"',
        "MODEL.PIXEL_MEAN [103.53, 116.28, 123.675]",
        "MODEL.PIXEL_STD [1.0, 1.0, 1.0]",
        "MODEL.RESNETS.STRIDE_IN_1X1 False",
    ):
        assert f"  {line}\n" in result.stdout


def test_a_detector_of_mmdetection(tool, source, tmp_path, capsys, monkeypatch):
    with pytest.raises(SystemExit):
        tool.main([str(source), str(tmp_path / "d.pth"), "--detector"])
    (line,) = capsys.readouterr().err.splitlines()
    assert "holds no Faster R-CNN of mmdetection: it has module.model." in line
    pixels = (1.0, 2.0, 3.0), (4.0, 5.0, 6.0)
    metadata = Metadata("resnet50", "linf", 4.0, "RGB", *pixels, False, "frcnn_at.pth")
    done = DetectorConversion(metadata, 300, 80, {"MODEL.ROI_HEADS.NUM_CLASSES": "80"}, ["something"])
    monkeypatch.setattr(tool, "convert_detector", lambda *arguments: done)
    tool.main(["frcnn_at.pth", "d.pth", "--detector"])
    printed = capsys.readouterr().out
    assert "read   frcnn_at.pth: Faster R-CNN, resnet50, 80 classes\nguess  something\n" in printed
    assert "  MODEL.ROI_HEADS.NUM_CLASSES 80\n" in printed
    assert "  MODEL.PIXEL_STD [4.0, 5.0, 6.0]\n" in printed


def test_other_formats_come_without_config_lines(tool, source, tmp_path, capsys):
    tool.main([str(source), str(tmp_path / "c.safetensors")])
    printed = capsys.readouterr().out
    assert "c.safetensors: 122 tensors\n" in printed  # the counters and the last layer, too
    assert "MODEL" not in printed


@pytest.mark.parametrize(
    ("arguments", "mean", "std"),
    [
        (["--pixel-mean", "none"], [0, 0, 0], [255, 255, 255]),
        (["--pixel-mean", "none", "--pixel-std", "none"], [0, 0, 0], [255, 255, 255]),
        (["--pixel-mean", "127.5", "127.5", "127.5", "--pixel-std", "1", "2", "3"], [127.5] * 3, [1, 2, 3]),
    ],
)
def test_a_normalisation_that_is_given(tool, source, tmp_path, capsys, arguments, mean, std):
    tool.main([str(source), str(tmp_path / "b.pkl"), *arguments])
    metadata = read_pickle(tmp_path / "b.pkl")["rt_detectron"]
    assert (metadata["pixel_mean"], metadata["pixel_std"]) == (mean, std)
    assert "\nguess" not in capsys.readouterr().out  # the file's name says what network it is


def test_guesses_and_choices_are_printed(tool, tmp_path, random_classifier, capsys):
    tensors = random_classifier("resnet18").state_dict()
    torch.save({"model": tensors, "model_ema": {n: t + 1 for n, t in tensors.items()}}, tmp_path / "c.pth")
    tool.main([str(tmp_path / "c.pth"), str(tmp_path / "b.pkl")])
    printed = capsys.readouterr().out
    assert "read the state dict 'model_ema', not the state dict 'model'" in printed
    assert "guess  the network is taken for resnet18 by its tensors, its activations for ReLU" in printed
    assert "guess  the file holds no mean and std: taken for 123.675" in printed
    tool.main([str(tmp_path / "c.pth"), str(tmp_path / "b.pkl"), "--no-ema", "--arch", "resnet18"])
    stem = read_pickle(tmp_path / "b.pkl")["model"]["stem.conv1.weight"]
    assert torch.equal(torch.as_tensor(stem), tensors["conv1.weight"])
    assert capsys.readouterr().out.count("\nguess  ") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("{source}", "{folder}/b.onnx"), "must end in .pkl"),
        (("{folder}/none.ckpt", "{folder}/b.pkl"), "cannot read"),
        (("{source}", "{folder}/b.pkl", "--arch", "resnet34"), "do not fit resnet34: missing layer1.2"),
        (("{source}", "{folder}/b.pkl", "--norm", "l2"), "go together"),
        (("{source}", "{folder}/b.pkl", "--pixel-mean", "1", "2", "3"), "--pixel-std go together"),
        (("{source}", "{folder}/b.pkl", "--pixel-mean", "none", "--pixel-std", "1", "1", "1"), "go together"),
        (("{source}", "{folder}/b.pkl", *UNIT_PIXELS), "three numbers in 0..255 each"),
        (("{source}", "{folder}/b.pkl", "--key", "ema"), "has no state dict 'ema': it has 'model'"),
        (("{source}", "{folder}/b.pkl", "--prefix", "net."), "no known architecture fits"),
        (("{source}", "{folder}/b.pkl", "--ema"), "holds no averaged weights"),
    ],
)
def test_mistakes_are_one_line(tool, source, tmp_path, capsys, arguments, message):
    with pytest.raises(SystemExit) as stop:
        tool.main([a.format(source=source, folder=tmp_path) for a in arguments])
    assert stop.value.code == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: ")
    assert printed.count("\n") == 1
    assert message in printed
    assert not list(tmp_path.iterdir())
