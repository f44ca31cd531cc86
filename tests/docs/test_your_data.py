"""The guide from photographs to the comparison, walked through on a tiny set: every command that it has."""

import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from documents import REPOSITORY, blocks, joined
from PIL import Image
from tool_process import run_tool

GUIDE = Path("docs/your-data.md")
# What is added to a tool's command to have it done within seconds.
QUICK = {
    "evaluate_robustness": [
        "TEST.ATTACK.STEPS",
        "1",
        "TEST.ATTACK.CHECK_IMAGES",
        "0",
        "DATALOADER.NUM_WORKERS",
        "0",
    ],
    "demo": [],
    "compare": [],
}


def commands() -> list[list[str]]:
    """The words of each command, in the guide's order."""
    found, variables = [], {}
    for block in blocks(GUIDE):
        for _, line in joined(block) if not block.language else ():
            if match := re.fullmatch(r'(\w+)="(.*)"', line):
                variables[match[1]] = match[2]
                continue
            for name, value in variables.items():
                line = line.replace(f"${name}", value)
            found.append(shlex.split(line))
    return found


@pytest.fixture(scope="module")
def folder(tiny_datasets, tmp_path_factory) -> Path:
    """A folder with ``mine`` in it, as the guide has it: six pictures and their annotations."""
    folder = tmp_path_factory.mktemp("walk")
    source = tiny_datasets / "demo" / "detection"
    shutil.copytree(source / "train", folder / "mine" / "photos")
    shutil.copy(source / "annotations" / "instances_train.json", folder / "mine" / "annotations.json")
    (study,) = (block.text for block in blocks(GUIDE) if block.language == "yaml")
    (folder / "mine" / "study.yaml").write_text(study)
    return folder


@pytest.fixture(scope="module")
def walked(folder, tool_server, tiny_opts) -> list[subprocess.CompletedProcess]:
    """Every command but the comparison itself, in order."""
    small = [*tiny_opts, "MODEL.ROBUST.ARCH", "resnet18", "SOLVER.MAX_ITER", "2", "SOLVER.STEPS", "()"]
    quick = {"train_net": small, **QUICK}
    return [
        run_tool([REPOSITORY / tool, *arguments, *quick[Path(tool).stem]], folder)
        for tool, *arguments in commands()[:-1]
    ]


def test_every_command_succeeds(walked):
    assert [Path(str(done.args[0])).stem for done in walked] == [
        "train_net", "train_net", "demo", "evaluate_robustness", "evaluate_robustness", "compare",
    ]  # fmt: skip
    for done in walked:
        assert done.returncode == 0, (done.args, done.stderr)


def test_what_they_leave_is_where_the_guide_says(walked, folder):
    for arm in ("robust", "standard"):
        results = json.loads((folder / "output" / "mine" / arm / "results.json").read_text())
        assert results["datasets"][0]["name"] == "coco:mine/annotations.json:mine/photos@held_out"
        assert results["metrics"]["bbox"].keys() >= {"AP", "AP50", "AP-zero"}
        robustness = json.loads((folder / "output" / "mine" / arm / "robustness.json").read_text())
        assert [attack["eps"] for attack in robustness["attack"]] == [1, 4]
        config = yaml.unsafe_load((folder / "output" / "mine" / arm / "config.yaml").read_text())
        assert config["MODEL"]["ROI_HEADS"]["NUM_CLASSES"] == 10
    pictures, photos = (sorted((folder / path).iterdir()) for path in ("output/mine/pictures", "mine/photos"))
    assert [picture.name for picture in pictures] == [photo.name for photo in photos]
    assert Image.open(pictures[0]).width > 2 * 900  # two detectors side by side


def test_the_dry_run_lists_the_trials(walked):
    assert "robust/faster_rcnn/lr0.01/selection-seed1" in walked[-1].stdout


@pytest.mark.slow
def test_the_comparison(walked, folder, tiny_opts, backbone_file):
    study = yaml.safe_load((folder / "mine" / "study.yaml").read_text())
    for arm in study["arms"].values():
        arm["weights"] = backbone_file
    position = tiny_opts.index("MODEL.WEIGHTS")
    small = [*tiny_opts[:position], *tiny_opts[position + 2 :]]
    drop = ("SOLVER.BASE_LR", "SEED")
    pairs = [pair for pair in zip(small[::2], small[1::2], strict=True) if pair[0] not in drop]
    study["opts"] += [word for pair in pairs for word in pair]
    study["opts"] += ["MODEL.ROBUST.ARCH", "resnet18", "SOLVER.MAX_ITER", 2, "SOLVER.STEPS", "()"]
    study["evaluations"]["attack"] += ["TEST.ATTACK.STEPS", 1, "TEST.ATTACK.CHECK_IMAGES", 0]
    study.update(learning_rates=[0.001, 0.002], seeds=[1], resources={"cpus": 1})
    (folder / "mine" / "study.yaml").write_text(yaml.safe_dump(study))
    tool, *arguments = commands()[-1]
    done = run_tool([REPOSITORY / tool, *arguments], folder)
    assert done.returncode == 0, done.stderr
    assert (folder / "output" / "mine" / "compare" / "report.html").is_file()
