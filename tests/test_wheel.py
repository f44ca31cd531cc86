"""The wheel, installed into an environment of its own outside the clone."""

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

REPOSITORY = Path(__file__).parents[1]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def environment(tmp_path_factory) -> Path:
    """A virtual environment that sees this one's packages, but rt_detectron from the wheel."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--wheel-dir", str(folder), str(REPOSITORY)], check=True)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder / "venv")], check=True)
    packages = subprocess.run(
        [folder / "venv" / "bin" / "python", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        capture_output=True, text=True, check=True,
    ).stdout.strip()  # fmt: skip
    Path(packages, "outer.pth").write_text(sysconfig.get_path("purelib"))
    (wheel,) = folder.glob("*.whl")
    # By the new environment's Python, which the installed script then starts with.
    install = ["-m", "pip", "install", "--quiet", "--no-deps", "--force-reinstall", str(wheel)]
    subprocess.run([folder / "venv" / "bin" / "python", *install], check=True)
    return folder / "venv" / "bin"


def run(environment, folder, *command, **variables) -> subprocess.CompletedProcess:
    kept = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    path = f"{environment}{os.pathsep}{kept['PATH']}"
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, env={**kept, "PATH": path, **variables}
    )
    assert done.returncode == 0, done.stderr
    return done


def test_configs_and_backbones_come_by_name(environment, tmp_path, random_classifier):
    torch.save(random_classifier("resnet18").state_dict(), tmp_path / "resnet18_l2_eps3.pth")
    run(environment, tmp_path, "rt-detectron", "convert", "resnet18_l2_eps3.pth", "resnet18_l2_eps3.pkl")
    code = (
        "import rt_detectron\nfrom rt_detectron import model_zoo\n"
        "print(rt_detectron.__file__)\nprint(model_zoo.get_config_file('robust_r50_eps3.yaml'))\n"
        "print(rt_detectron.load_backbone('resnet18_l2_eps3', detector='fpn').metadata.eps)"
    )
    done = run(environment, tmp_path, "python", "-c", code, RT_DETECTRON_ZOO=str(tmp_path))
    package, config, eps = done.stdout.splitlines()
    assert package.startswith(str(environment.parent))
    assert config.startswith(str(environment.parent))
    assert eps == "3.0"


def test_the_command_lists_and_starts_the_tools(environment, tmp_path):
    assert "evaluate-robustness" in run(environment, tmp_path, "rt-detectron", "--help").stdout
    assert "--config-file" in run(environment, tmp_path, "rt-detectron", "train", "--help").stdout
    study = ("--study", "configs/study/transfer_small.yaml", "--output", "out")
    command = ["rt-detectron", "compare", *study, "--dry-run"]
    path = f"{environment}{os.pathsep}{os.environ['PATH']}"
    kept = {**os.environ, "PATH": path}
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=kept)
    # The shipped study is found; the weights of its arms, which one trains oneself, are not here.
    assert "transfer_small.yaml: arms." in done.stderr
