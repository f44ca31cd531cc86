import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def run_here(request, monkeypatch, capfd):
    """The test file's TOOL within this process, for runs that end before anything is set up:
    ``run_here(arguments ...)`` gives (exit status, out, err)."""
    tool = request.module.TOOL

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", [tool, *arguments])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(tool, run_name="__main__")
        return end.value.code, *capfd.readouterr()

    return run


@pytest.fixture
def run(request, tiny_datasets, tmp_path):
    """The test file's TOOL with its CONFIG on the demo set, in a process of its own, on CPUs:
    ``run(arguments ...)`` gives the completed process."""
    tool = [sys.executable, request.module.TOOL, "--config-file", request.module.CONFIG]
    environment = {"DETECTRON2_DATASETS": str(tiny_datasets), "PYTHONPATH": str(REPOSITORY)}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "CUDA_VISIBLE_DEVICES": ""}

    def run(*arguments):
        return subprocess.run(
            [*tool, *map(str, arguments)],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env={**os.environ, **environment},
        )

    return run
