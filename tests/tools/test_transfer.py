"""The tool as a user runs it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
TOOL = str(REPOSITORY / "tools" / "transfer.py")
CONFIGS = REPOSITORY / "configs" / "transfer"


@pytest.fixture
def transfer(digit_folders, backbone_file, tmp_path):
    """``transfer(METHOD, FOLDER, argument ...)``: the results of a process of its own."""

    def transfer(method: str, folder: str, *arguments: str) -> dict:
        overrides = [
            f"weights={backbone_file}",
            "dataset.name=folder",
            f"dataset.root={digit_folders}",
            "dataset.resize=16",
            "dataset.image_size=16",
            "dataloader.num_workers=0",
            "dataloader.total_batch_size=16",
            "train.epochs=2",
            "train.log_period=1",
            f"train.output_dir={folder}",
        ]
        environment = {"RT_DETECTRON_CACHE": f"{tmp_path}/{folder}-cache", "OMP_NUM_THREADS": "1"}
        environment |= {"PYTHONWARNINGS": "ignore", "CUDA_VISIBLE_DEVICES": ""}
        finished = subprocess.run(
            [sys.executable, TOOL, "--config-file", str(CONFIGS / f"{method}.py"), *arguments, *overrides],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env={**os.environ, **environment},
        )
        assert finished.returncode == 0, finished.stderr
        return json.loads((tmp_path / folder / "results.json").read_text()), finished.stdout

    return transfer


TWO_PROCESSES = ("--num-gpus", "2", "--dist-url", "auto")


def test_two_processes_share_the_features_and_fit_one_layer(transfer, tmp_path):
    alone, _ = transfer("fixed_feature", "one")
    together, _ = transfer("fixed_feature", "two", *TWO_PROCESSES)
    assert alone["metrics"] == together["metrics"]
    first, second = (
        json.loads((tmp_path / name / "predictions.json").read_text()) for name in ("one", "two")
    )
    assert first == second
    assert {"config.yaml", "log.txt", "metrics.json", "classifier.pth"} <= set(os.listdir(tmp_path / "two"))
    again, said = transfer("fixed_feature", "one", "--resume")
    assert again == alone
    assert "one/results.json is there: nothing to do" in said


def test_two_processes_train_one_network(transfer, tmp_path):
    results, _ = transfer("full_network", "out", *TWO_PROCESSES)
    assert results["iterations"] == 8
    predictions = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert len(predictions["keys"]) == len(set(predictions["keys"])) == 40
    assert predictions["labels"] == sorted(predictions["labels"])  # folders in order


def test_help_shows_examples(run_here):
    status, out, _ = run_here("--help")
    assert status == 0
    assert "tools/transfer.py --config-file configs/transfer/fixed_feature.py weights=resnet50_l2_eps3" in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "--config-file (none): no such file; configs/transfer/ holds the shipped ones"),
        (["--config-file", str(CONFIGS / "full_network.py")], "no weights: add weights=NAME"),
        (
            ["--config-file", str(CONFIGS / "full_network.py"), "weights=x.pth", "optimizer.lr=0"],
            "optimizer.lr is 0",
        ),
    ],
)
def test_mistakes_are_one_line(run_here, arguments, words):
    status, out, err = run_here(*arguments)
    assert (status, out) == (2, "")
    assert err.splitlines()[-1].startswith("error: ")
    assert words in err.splitlines()[-1]
    assert "Traceback" not in err
