import runpy
import sys

import pytest
from tool_process import run_tool


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
def run(request, tool_server, tmp_path):
    """The test file's TOOL with its CONFIG on the demo set, in a process of its own, on CPUs:
    ``run(arguments ...)`` gives the completed process."""
    module = request.module
    return lambda *arguments: run_tool([module.TOOL, "--config-file", module.CONFIG, *arguments], tmp_path)
