"""The tool as a user runs it."""

import importlib.util
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

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


def test_other_formats_come_without_config_lines(tool, source, tmp_path, capsys):
    tool.main([str(source), str(tmp_path / "c.safetensors")])
    printed = capsys.readouterr().out
    assert "c.safetensors: 122 tensors\n" in printed  # the counters and the last layer, too
    assert "MODEL" not in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("{source}", "{folder}/b.onnx"), "must end in .pkl"),
        (("{folder}/none.ckpt", "{folder}/b.pkl"), "cannot read"),
        (("{source}", "{folder}/b.pkl", "--arch", "resnet34"), "do not fit resnet34: missing layer1.2"),
        (("{source}", "{folder}/b.pkl", "--norm", "l2"), "go together"),
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
