"""The tool as a user runs it."""

import json
import os
import runpy
import warnings
from pathlib import Path

import pytest
from detectron2.engine import default_argument_parser
from detectron2.utils import comm

from rt_detectron.transfer.recipe import load_transfer_config
from rt_detectron.transfer.trainer import do_transfer

REPOSITORY = Path(__file__).parents[2]
TOOL = str(REPOSITORY / "tools" / "transfer.py")
CONFIGS = REPOSITORY / "configs" / "transfer"


@pytest.fixture
def overrides(digit_folders, backbone_file, tmp_path, monkeypatch):
    """``overrides(FOLDER)``: of a transfer to digits of 16 pixels, for seconds; its features are its own."""

    def overrides(folder: str) -> list[str]:
        monkeypatch.setenv("RT_DETECTRON_CACHE", f"{tmp_path}/{folder}-cache")
        return [
            f"weights={backbone_file}",
            "dataset.name=folder",
            f"dataset.root={digit_folders}",
            "dataset.resize=16",
            "dataset.image_size=16",
            "dataloader.num_workers=0",
            "dataloader.total_batch_size=16",
            "train.device=cpu",
            "train.epochs=2",
            f"train.output_dir={tmp_path}/{folder}",
        ]

    return overrides


def read(folder: Path) -> tuple[dict, dict]:
    return tuple(json.loads((folder / f"{name}.json").read_text()) for name in ("results", "predictions"))


def each_on_a_machine_of_its_own(runs: list[list[str]]) -> None:
    """The tool's main() in one of two processes, which share all files."""
    warnings.simplefilter("ignore")
    comm.get_local_rank = lambda: 0
    main = runpy.run_path(TOOL)["main"]
    for arguments in runs:
        main(default_argument_parser().parse_args(arguments))


def test_two_machines_share_the_features_and_fit_one_layer(overrides, launch, tmp_path):
    runs = [
        ["--config-file", str(CONFIGS / f"{method}.py"), *overrides(method)]
        for method in ("full_network", "fixed_feature")
    ]
    launch(each_on_a_machine_of_its_own, runs)

    results, predictions = read(tmp_path / "full_network")
    assert results["iterations"] == 8
    assert len(predictions["keys"]) == len(set(predictions["keys"])) == 40
    assert predictions["labels"] == sorted(predictions["labels"])  # folders in order

    results, predictions = read(tmp_path / "fixed_feature")
    files = set(os.listdir(tmp_path / "fixed_feature"))
    assert {"config.yaml", "log.txt", "metrics.json", "classifier.pth"} <= files
    (tmp_path / "one").mkdir()
    do_transfer(load_transfer_config(str(CONFIGS / "fixed_feature.py"), overrides("one")))
    expected = read(tmp_path / "one")
    assert (results["metrics"], predictions) == (expected[0]["metrics"], expected[1])
    assert results["config_sha256"] == expected[0]["config_sha256"]


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
