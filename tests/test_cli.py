"""The command rt-detectron, and what tools say where something is missing."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).parents[1] / "tools"
SCRIPT = str(TOOLS / "rt-detectron")
CLI = runpy.run_path(SCRIPT, run_name="rt_detectron_cli")


@pytest.fixture
def rt_detectron(monkeypatch):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["rt-detectron", *arguments])
        monkeypatch.setattr(sys, "path", [*sys.path])
        CLI["main"]()

    return run


def test_it_lists_every_tool_without_importing_anything_heavy():
    code = (
        "import sys, runpy\nsys.argv[1:] = ['--help']\n"
        "try:\n    runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "finally:\n    assert not {'torch', 'detectron2', 'numpy'} & sys.modules.keys()"
    )
    code = code.replace("sys.argv[0]", repr(SCRIPT))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for command, (_, what) in CLI["COMMANDS"].items():
        assert f"  {command} " in done.stdout
        assert what in done.stdout
    for_users = {path.stem for path in TOOLS.glob("[a-z]*.py")} - {"setup_environment", "update_zoo"}
    assert {tool for tool, _ in CLI["COMMANDS"].values()} == for_users


def test_it_runs_the_tool_as_a_script(monkeypatch, rt_detectron):
    calls = []
    monkeypatch.setattr(runpy, "run_path", lambda path, run_name: calls.append((path, run_name, sys.argv)))
    rt_detectron("convert", "a.pth", "b.pkl")
    argv = ["rt-detectron convert", "a.pth", "b.pkl"]
    assert calls == [(str(TOOLS / "convert_checkpoint.py"), "__main__", argv)]


def test_a_tools_own_help_and_errors_arrive(rt_detectron, capsys):
    with pytest.raises(SystemExit) as left:
        rt_detectron("convert", "--help")
    assert left.value.code == 0
    assert "--input-format" in capsys.readouterr().out
    with pytest.raises(SystemExit) as left:
        rt_detectron("convert", "nowhere.pth", "b.pkl")
    assert left.value.code == 2
    assert "cannot read nowhere.pth" in capsys.readouterr().err


def test_an_unknown_command_is_refused(rt_detectron, capsys):
    with pytest.raises(SystemExit) as left:
        rt_detectron("trian")
    assert left.value.code == 2
    assert "invalid choice: 'trian' (choose from" in capsys.readouterr().err


def test_every_tool_can_be_typed_as_the_documents_do():
    for path in [*TOOLS.glob("[a-z]*.py"), Path(SCRIPT)]:
        assert path.read_text().startswith("#!/usr/bin/env python"), path.name
        assert os.access(path, os.X_OK), path.name


# setup_environment.py is what installs Detectron2, and runs without it.
@pytest.mark.parametrize(
    "tool", [path.name for path in sorted(TOOLS.glob("[a-z]*.py")) if path.stem != "setup_environment"]
)
def test_without_detectron2_a_tool_says_how_to_get_it(tool):
    code = (
        "import sys, importlib.util as u, runpy\n"
        "find = u.find_spec\n"
        "u.find_spec = lambda name, *rest: None if name == 'detectron2' else find(name, *rest)\n"
        "sys.path.insert(0, sys.argv[1])\n"
        "runpy.run_path(sys.argv[2], run_name='__main__')"
    )
    command = [sys.executable, "-c", code, str(TOOLS), str(TOOLS / tool)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert "has no detectron2: in a clone run `make setup`" in done.stderr
    assert done.stderr.count("\n") == 1


def test_the_package_without_detectron2_says_how_to_get_it():
    code = (
        "import sys\nsys.modules['detectron2'] = None\n"
        "import rt_detectron, rt_detectron.study.report\n"
        "try:\n    from rt_detectron import load_backbone\n"
        "except ModuleNotFoundError as error:\n    print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "rt_detectron needs Detectron2" in done.stdout, done.stderr


@pytest.mark.parametrize("tool", ["train_net.py", "transfer.py"])
def test_a_tool_starts_without_remarks_of_other_packages(tool):
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONWARNINGS"}
    command = [sys.executable, str(TOOLS / tool), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0
    assert done.stderr == ""
