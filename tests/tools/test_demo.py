"""The tool as a user calls it, with untrained detectors that find something everywhere."""

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from detectron2.modeling import build_model
from PIL import Image

from rt_detectron.detection import load_detector_config

REPOSITORY = Path(__file__).parents[2]
TOOL = str(REPOSITORY / "tools" / "demo.py")
CONFIG = str(REPOSITORY / "configs" / "demo" / "mask_rcnn_r18_fpn.yaml")


@pytest.fixture(scope="module")
def opts(tiny_opts):
    position = tiny_opts.index("MODEL.WEIGHTS")
    return [*tiny_opts[:position], *tiny_opts[position + 2 :], "MODEL.DEVICE", "cpu"]


@pytest.fixture(scope="module")
def weights(opts, tmp_path_factory):
    """Of two untrained detectors."""
    files = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        files.append(tmp_path_factory.mktemp("weights") / f"{seed}.pth")
        torch.save({"model": build_model(load_detector_config(CONFIG, opts)).state_dict()}, files[-1])
    return [str(file) for file in files]


@pytest.fixture
def inputs(tmp_path, photograph):
    """Two photographs of the same name, and five frames that move across one."""
    photo = photograph.numpy().transpose(1, 2, 0)
    for name in ("day", "night"):
        (tmp_path / name).mkdir()
        Image.fromarray(photo).save(tmp_path / name / "china.png")
    size = (96, 64)
    writer = cv2.VideoWriter(str(tmp_path / "day" / "film.mp4"), cv2.VideoWriter_fourcc(*"mp4v"), 5, size)
    for x in range(5):
        writer.write(np.ascontiguousarray(photo[:64, 4 * x : 4 * x + 96, ::-1]))
    writer.release()
    return tmp_path


def test_two_detectors_on_folders_and_a_video(run_here, inputs, weights, opts):
    out = inputs / "out"
    detectors = ["--config-file", CONFIG, "--weights", weights[0], "--weights", weights[1]]
    places = ["--input", str(inputs / "day"), str(inputs / "night"), "--output", str(out)]
    status, printed, _ = run_here(*detectors, *places, "--threshold", "0.05", *opts)
    assert status == 0
    assert printed.splitlines() == [
        str(out / name) for name in ("day/china.png", "day/film.mp4", "night/china.png")
    ]
    day, night = (np.asarray(Image.open(out / name / "china.png")) for name in ("day", "night"))
    np.testing.assert_array_equal(day, night)
    assert day.shape[1] == 2 * 960 + 6
    left, right = day[-720:, :960], day[-720:, -960:]
    plain = np.asarray(Image.open(inputs / "day" / "china.png").resize((960, 720), Image.Resampling.LANCZOS))
    for side in (left, right):
        assert 0.01 < (side != plain).mean() < 1  # something is drawn
    assert (left != right).any()
    capture = cv2.VideoCapture(str(out / "day" / "film.mp4"))
    assert capture.get(cv2.CAP_PROP_FRAME_COUNT) == 5
    assert capture.get(cv2.CAP_PROP_FRAME_WIDTH) == 2 * 960 + 6


def test_bad_inputs_are_lines_and_the_others_go_on(run_here, inputs, weights, opts):
    (inputs / "empty").mkdir()
    (inputs / "bad.jpg").write_bytes(b"no picture")
    given = [str(inputs / name) for name in ("nowhere.jpg", "empty", "bad.jpg", "day/china.png")]
    arguments = ["--config-file", CONFIG, "--weights", weights[0], "--input", *given]
    status, printed, err = run_here(*arguments, "--output", str(inputs / "out"), *opts)
    assert (status, printed) == (1, f"{inputs}/out/day/china.png\n")
    errors = [line.removeprefix("error: ") for line in err.splitlines() if line.startswith("error: ")]
    assert [line.split(": ")[0] for line in errors] == given[:3]
    assert "Traceback" not in err


def test_explanations_of_two_detectors_in_one_picture(run_here, inputs, weights, opts):
    out = inputs / "out"
    detectors = ["--config-file", CONFIG, "--weights", weights[0], "--weights", weights[1]]
    places = ["--input", str(inputs / "day"), "--output", str(out), "--threshold", "0.05"]
    explain = ["--explain", "--steps", "2", "--feature", "res3"]
    status, printed, err = run_here(*detectors, *places, *explain, *opts)
    assert (status, printed) == (1, f"{out}/china.png\n")
    assert f"error: {inputs}/day/film.mp4: --explain takes pictures, not videos" in err
    pixels = np.asarray(Image.open(out / "china.png"))
    assert pixels.shape == (2 * (360 + 32) + 6, 3 * 480 + 2 * 6, 3)
    rows = pixels[32:392], pixels[-360:]
    for left in (0, 486, 972):
        upper, lower = (row[:, left : left + 480] for row in rows)
        assert (upper != lower).any()  # the detectors differ in all of it
        assert upper.std() > 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--input", "nowhere", "--config-file", CONFIG], "nowhere: there is no such file or folder"),
        (["--input", ".", "--config-file", "nowhere.yaml"], "--config-file nowhere.yaml: no such file"),
        (["--input", ".", "--config-file", CONFIG, "--weights", "x.pth"], "there is no weights file x.pth"),
        (["--input", ".", "--config-file", CONFIG, "--steps", "5"], "--steps are for --explain"),
        (
            ["--input", ".", "--config-file", CONFIG, "--explain", "--steps", "0"],
            "--steps 0: give at least 1",
        ),
        (["--input", "film.mp4", "--config-file", CONFIG, "--explain"], "takes pictures, not videos"),
    ],
)
def test_mistakes_are_one_line(run_here, inputs, monkeypatch, arguments, words):
    monkeypatch.chdir(inputs / "day")
    status, printed, err = run_here(*arguments, "--output", "out")
    assert (status, printed) == (2, "")
    assert err.splitlines()[-1].startswith("error: ")
    assert words in err
    assert "Traceback" not in err


def test_a_wrong_feature_is_one_line_before_anything_is_computed(run_here, inputs, weights, opts):
    arguments = ["--config-file", CONFIG, "--weights", weights[0], "--input", str(inputs / "day/china.png")]
    status, printed, err = run_here(
        *arguments, "--output", str(inputs / "out"), "--explain", "--feature", "res6", *opts
    )
    assert (status, printed) == (2, "")
    assert "no feature 'res6'; it has res2, res3, res4, res5, p2" in err.splitlines()[-1]
    assert not (inputs / "out").exists()
