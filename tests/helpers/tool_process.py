"""Tools in processes of their own that start in 0.1 s instead of 5.

Each is forked from a server that has imported what the tools import, but has computed nothing. Some tests of
tests/test_cli.py and tests/tools/test_pretrain.py start tools as users do.
"""

import atexit
import functools
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterable
from multiprocessing import forkserver
from pathlib import Path
from unittest import mock

ENVIRONMENT = {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "CUDA_VISIBLE_DEVICES": ""}
_IMPORTED = (
    "pytest",
    "torch.distributed",
    "torch.utils.tensorboard",
    "rt_detectron.detection",
    "rt_detectron.evaluation.robustness",
    "rt_detectron.pretrain.trainer",
    "rt_detectron.transfer.trainer",
    "rt_detectron.visualization.plots",
)
_CONTEXT = multiprocessing.get_context("forkserver")


def start_server(**environment: str) -> None:
    """Start the server, once. ``environment`` is for what packages read as they are imported."""
    _CONTEXT.set_forkserver_preload(list(_IMPORTED))
    with mock.patch.dict(os.environ, {**ENVIRONMENT, **environment}):
        forkserver.ensure_running()


class ToolProcess:
    """A tool that runs in the folder ``cwd`` and writes to the files ``stdout`` and ``stderr`` there.

    Args:
        command: the tool's path and its arguments.
        prepare: called in the process before the tool, such as to set limits; must be picklable.
    """

    def __init__(
        self, command: Iterable, cwd: Path, prepare: Callable[[], object] | None = None, **environment
    ):
        self.cwd = Path(cwd)
        environment = {**os.environ, **ENVIRONMENT, **environment}
        arguments = [str(word) for word in command], str(cwd), environment, prepare
        self._process = _CONTEXT.Process(target=_run, args=arguments)
        self._process.start()
        self.pid = self._process.pid

    @property
    def stdout(self) -> str:
        return (self.cwd / "stdout").read_text()

    @property
    def stderr(self) -> str:
        return (self.cwd / "stderr").read_text()

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, seconds: float | None = None) -> int:
        self._process.join(seconds)
        assert self._process.exitcode is not None, f"still running after {seconds} s: {self.stderr}"
        return self._process.exitcode

    def send_signal(self, signum: int) -> None:
        os.kill(self.pid, signum)

    def kill(self) -> None:
        self._process.kill()


def run_tool(command: Iterable, cwd: Path, **options) -> subprocess.CompletedProcess:
    """As subprocess.run: the finished :class:`ToolProcess`."""
    process = ToolProcess(command, cwd, **options)
    status = process.wait()
    return subprocess.CompletedProcess(list(command), status, process.stdout, process.stderr)


def launch_two(function: Callable, arguments: tuple, dist_url: str) -> None:
    """Detectron2's launch of ``function(*arguments)`` in two processes; it must be importable by its name."""
    import torch
    from detectron2.engine import launch

    start = functools.partial(torch.multiprocessing.start_processes, start_method="forkserver")
    with mock.patch.object(torch.multiprocessing, "start_processes", start):
        launch(_called, 2, dist_url=dist_url, args=(dict(os.environ), function, arguments))


def _called(environment: dict[str, str], function: Callable, arguments: tuple) -> None:
    _as_started_alone()
    os.environ.update(environment)
    function(*arguments)


def _as_started_alone() -> None:
    """Loaders start their workers by default, as from a shell; a server of their own would outlive a kill."""
    multiprocessing.set_start_method(None, force=True)


def _run(command: list[str], cwd: str, environment: dict[str, str], prepare: Callable | None) -> None:
    import torch

    _as_started_alone()
    os.chdir(cwd)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644), descriptor)
    os.environ.clear()
    os.environ.update(environment)
    # A shell starts its background jobs, such as these tests may be, with SIGINT ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    # Detectron2's launch spawns the processes of a distributed run, which would import everything again.
    torch.multiprocessing.start_processes = functools.partial(
        torch.multiprocessing.start_processes, start_method="fork"
    )
    sys.argv = command
    sys.path.insert(0, str(Path(command[0]).parent))  # as for a script
    if prepare is not None:
        prepare()
    try:
        runpy.run_path(command[0], run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # a forked process ends without
