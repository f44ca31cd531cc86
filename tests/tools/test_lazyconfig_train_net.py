"""The tool as a user runs it; what it does with a config: tests/engine/test_lazy.py."""

import json
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
TOOL = str(REPOSITORY / "tools" / "lazyconfig_train_net.py")
CONFIG = str(REPOSITORY / "configs" / "lazy" / "mask_rcnn_robust_r50_eps3.py")


@pytest.fixture
def run(run, tiny_lazy_opts):
    """``run(arguments ...)`` as of all tools' tests, with what makes the training tiny."""
    sets = ["dataloader.train.dataset.names=rt_demo_train", "dataloader.test.dataset.names=rt_demo_val"]
    return lambda *arguments: run(*arguments, *sets, *tiny_lazy_opts)


@pytest.mark.slow  # what is distributed about it is the other tool's, too
def test_two_processes_train_then_one_evaluates_the_same(run, two_processes, tmp_path):
    trained = run(*two_processes(), "train.output_dir=trained", "train.seed=1")
    assert trained.returncode == 0, trained.stderr
    assert trained.stdout.rstrip().endswith("Wrote trained/results.json")
    results = json.loads((tmp_path / "trained/results.json").read_text())
    assert (results["iterations"], results["seed"]) == (2, 1)
    assert (tmp_path / "trained/config.yaml").is_file()
    evaluated = run(
        "--eval-only", "train.init_checkpoint=trained/model_final.pth", "train.output_dir=evaluated"
    )
    assert evaluated.returncode == 0, evaluated.stderr
    again = json.loads((tmp_path / "evaluated/results.json").read_text())
    assert again["metrics"] == results["metrics"]
    assert (again["iterations"], again["weights"]) == (0, "trained/model_final.pth")
    assert again["datasets"][0]["predictions"] == "evaluated/inference/coco_instances_results.json"


def test_help_shows_examples(run_here):
    status, out, _ = run_here("--help")
    assert status == 0
    assert "--config-file configs/lazy/mask_rcnn_robust_r50_eps3.py --num-gpus 8" in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "--config-file (none): no such file; configs/lazy/ holds the shipped ones"),
        (["--config-file", CONFIG, "train.max_iters=1"], "unknown configuration key 'train.max_iters'"),
        (["--config-file", CONFIG, "dataloader.train.dataset.names=zzz"], "'zzz' is not registered"),
    ],
)
def test_mistakes_are_one_line(run_here, arguments, words):
    status, out, err = run_here(*arguments)
    assert (status, out) == (2, "")
    assert err.splitlines()[-1].startswith("error: ")
    assert words in err.splitlines()[-1]
    assert "Traceback" not in err
