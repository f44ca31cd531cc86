import runpy
import sys

import pytest


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
