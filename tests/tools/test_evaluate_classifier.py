"""The tool as a user runs it."""

import json
import random
import time
from pathlib import Path

import pytest
import torch
from tool_process import ToolProcess, run_tool

REPOSITORY = Path(__file__).parents[2]
TOOL = str(REPOSITORY / "tools" / "evaluate_classifier.py")
CONFIG = str(REPOSITORY / "configs" / "pretrain" / "demo_l2.py")


def test_two_processes_evaluate_what_one_does(
    tiny_datasets, random_classifier, tmp_path, rendezvous, tool_server
):
    torch.save(random_classifier("resnet18", 10).state_dict(), tmp_path / "weights.pth")
    found = []
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        arguments = ["--config-file", CONFIG, "--weights", str(tmp_path / "weights.pth"), "--attacks", "pgd2"]
        arguments += ["--num-gpus", str(processes), "--dist-url", rendezvous(), "--output", str(folder)]
        arguments += [f"dataloader.test.dataset.root={tiny_datasets}/demo/classification/val"]
        arguments += ["dataloader.test.num_workers=0", "dataloader.test.batch_size=4"]
        arguments += ["dataloader.test.dataset.transform.transforms.0.size=16"]
        finished = run_tool([TOOL, *arguments], tmp_path)
        assert finished.returncode == 0, finished.stderr
        assert {"evaluation.json", "evaluation.md", "eps_curve.png"} <= {
            path.name for path in folder.iterdir()
        }
        found.append(json.loads((folder / "evaluation.json").read_text()))
    assert found[0] == found[1]
    assert found[0]["accuracy"]["pgd2"]["images"] == 10
    assert found[0]["classes"]["3"] == "3"


def killed_at_random_moments(folder, start, kills: int, seed: int) -> None:
    """``start(output folder)`` evaluates; killed so often, it finds what it finds when it is not."""
    start(folder / "whole").wait(300)
    generator = random.Random(seed)
    found = folder / "out" / "measurements-0.jsonl"
    for _ in range(kills):
        seen = found.stat().st_size if found.exists() else 0
        process = start(folder / "out")
        while not found.exists() or found.stat().st_size == seen:
            assert process.poll() is None, process.stderr
            time.sleep(0.005)
        time.sleep(generator.uniform(0, 0.05))
        assert process.poll() is None, "it ended before it could be killed"
        process.kill()
        process.wait()
    assert start(folder / "out").wait(300) == 0
    for name in ("evaluation.json", "evaluation.md"):
        assert (folder / "out" / name).read_bytes() == (folder / "whole" / name).read_bytes()


@pytest.mark.parametrize(("kills", "batch_size"), [(1, 20), pytest.param(20, 1, marks=pytest.mark.slow)])
def test_a_killed_evaluation_goes_on_bit_by_bit(
    digit_folders, random_classifier, tmp_path, tool_server, kills, batch_size
):
    torch.save(random_classifier("resnet18", 2).state_dict(), tmp_path / "weights.pth")
    arguments = ["--config-file", CONFIG, "--weights", tmp_path / "weights.pth", "--attacks", "pgd2x2,pgd5"]
    overrides = ["model.classifier.num_classes=2", f"dataloader.test.dataset.root={digit_folders}/val"]
    overrides += ["dataloader.test.dataset.transform.transforms.0.size=16", "dataloader.test.num_workers=0"]
    overrides.append(f"dataloader.test.batch_size={batch_size}")

    def start(output: Path) -> ToolProcess:
        return ToolProcess([TOOL, *arguments, "--output", output, *overrides], tmp_path)

    killed_at_random_moments(tmp_path, start, kills, seed=0)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--weights", "nowhere.pth"], "nowhere.pth"),
        (["--weights", "x.pth", "--attacks", "fgsm"], "attack 'fgsm' is unknown"),
        (["--weights", "x.pth", "--images", "0"], "--images is 0"),
    ],
)
def test_mistakes_are_one_line(run_here, arguments, words, monkeypatch, tiny_datasets, tmp_path):
    for set_up in ("engine.default_setup", "utils.logger.setup_logger"):  # they are for whole processes
        monkeypatch.setattr(f"detectron2.{set_up}", lambda *_, **__: None)
    if "--attacks" not in arguments:
        arguments = [*arguments, "--attacks", "pgd2"]
    status, _, err = run_here("--config-file", CONFIG, "--output", str(tmp_path), *arguments)
    assert status == 2
    assert err.splitlines()[-1].startswith("error: ")
    assert words in err.splitlines()[-1]
    assert "Traceback" not in err


def test_without_weights_the_parser_says_so(run_here):
    _, _, err = run_here("--config-file", CONFIG)
    assert "required: --weights" in err
