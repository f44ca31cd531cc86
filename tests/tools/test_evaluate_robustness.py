"""The tool as a user runs it, in two processes at once."""

import json
from pathlib import Path

import pytest

from rt_detectron.checkpoint.checkpointer import RobustCheckpointer
from rt_detectron.detection import Trainer, load_detector_config

REPOSITORY = Path(__file__).parents[2]
TOOL = str(REPOSITORY / "tools" / "evaluate_robustness.py")
CONFIG = str(REPOSITORY / "configs" / "demo" / "mask_rcnn_r18_fpn.yaml")


@pytest.fixture
def detector(tiny_opts, tmp_path) -> str:
    """The file of an untrained detector."""
    cfg = load_detector_config(CONFIG, tiny_opts)
    RobustCheckpointer(Trainer.build_model(cfg), str(tmp_path)).save("detector")
    return str(tmp_path / "detector.pth")


def test_two_processes_measure_then_one_has_nothing_left_to_do(
    run, two_processes, tiny_opts, detector, tmp_path
):
    opts = [*tiny_opts, "MODEL.WEIGHTS", detector, "OUTPUT_DIR", "out"]
    opts += ["TEST.ATTACK.L2_EPS", "[0.5]", "TEST.ATTACK.STEPS", 1, "TEST.ATTACK.SURROGATE", detector]
    opts += ["TEST.ATTACK.CHECK_IMAGES", 1, "TEST.ATTACK.QUERIES", 2]
    opts += ["TEST.ATTACK.MAX_IMAGES", 3, "TEST.CORRUPTION.NAMES", "['fog']", "TEST.PICTURES", 3]
    opts += ["TEST.CORRUPTION.SEVERITIES", "[3]"]
    first = run(*two_processes(), *opts)
    assert first.returncode == 0, first.stderr
    assert first.stdout.rstrip().endswith("Wrote out/robustness.json")
    assert "L2 eps 0.5, random noise" in first.stdout
    content = json.loads((tmp_path / "out" / "robustness.json").read_text())
    assert (content["clean"]["images"], content["attack"][0]["images"]) == (4, 3)
    assert content["corruption"]["results"][0]["corruption"] == "fog"
    assert content["attack"][0]["objective"]["images"] == 3
    checks = ["objective", "noise", "huge eps", "random search", "transfer"]
    assert [check["check"] for check in content["attack"][0]["checks"]] == checks
    # Both processes' pictures, once each.
    files = {picture["file"] for picture in content["pictures"]}
    assert len(files) == len(content["pictures"]) == 6
    assert all((tmp_path / "out" / file).is_file() for file in files)
    assert "building resnet18" in (tmp_path / "out" / "robustness" / "log.txt").read_text()

    again = run(*opts)
    assert again.returncode == 0, again.stderr
    assert "Inference done" not in again.stdout
    resumed = json.loads((tmp_path / "out" / "robustness.json").read_text())
    assert resumed["attack"] == content["attack"]
    assert resumed["wall_time_s"] == content["wall_time_s"]


def test_only_a_trained_detector_is_evaluated(run, tiny_opts):
    done = run(*tiny_opts, "OUTPUT_DIR", "refused", "TEST.ATTACK.L2_EPS", "[0.5]")
    assert done.returncode == 2
    assert "not a backbone" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_help_teaches(run_here):
    status, out, _ = run_here("--help")
    assert status == 0
    assert "TEST.ATTACK.LINF_EPS" in out
    assert "tools/evaluate_robustness.py --config-file configs/robust_r50_eps3.yaml " in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "nothing to evaluate: set TEST.ATTACK.LINF_EPS"),
        (["TEST.ATTACK.LINF_EPS", "[0.03]"], "a linf eps is written in units of 1/255"),
        (["TEST.ATTACK.LINF_EPS", "4"], "TEST.ATTACK.LINF_EPS"),
        (["TEST.CORRUPTION.NAMES", "['smog']"], "unknown corruption 'smog'"),
        (["TEST.ATTACK.L2_EPS", "[1]", "DATASETS.TEST", "('zzz',)"], "'zzz' is not registered"),
    ],
)
def test_mistakes_are_one_line(run_here, arguments, words):
    status, out, err = run_here("--config-file", CONFIG, *arguments)
    assert (status, out) == (2, "")
    assert err.splitlines()[-1].startswith("error: ")
    assert words in err.splitlines()[-1]
    assert "Traceback" not in err
