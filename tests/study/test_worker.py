import os
import subprocess
import sys
import time

import pytest

from rt_detectron.study.worker import Step, read_json, run_steps


@pytest.mark.parametrize("text", ["", "[]", '{"metrics": 3}', "null", "{"])
def test_a_result_is_an_object_with_its_key(tmp_path, text):
    (tmp_path / "results.json").write_text(text)
    assert read_json(tmp_path / "results.json", "metrics") is None


def test_data_workers_left_behind_are_ended(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(
        "import pathlib, subprocess, sys\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        "pathlib.Path('pid').write_text(str(child.pid))\n"
        "pathlib.Path('results.json').write_text('{\"metrics\": {}}')\n"
    )
    assert run_steps([Step((str(script),), "results.json", "metrics")], ".", str(tmp_path), None) is None
    assert ends(int((tmp_path / "pid").read_text()))


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a process with its parent")
def test_process_ends_with_its_worker(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(
        "import os, pathlib, time\npathlib.Path('pid').write_text(str(os.getpid()))\ntime.sleep(60)"
    )
    program = (
        "import sys; sys.path.insert(0, sys.argv[2]); import worker;"  # as a Ray worker: without the package
        "worker.run_steps([worker.Step((sys.argv[1],), 'r.json', 'r')], '.', '.', None)"
    )
    room = os.path.dirname(sys.modules[run_steps.__module__].__file__)
    worker = subprocess.Popen([sys.executable, "-c", program, str(script), room], cwd=tmp_path)
    deadline = time.monotonic() + 30
    while not ((tmp_path / "pid").exists() and (tmp_path / "pid").read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    worker.kill()
    worker.wait()
    assert ends(int((tmp_path / "pid").read_text()))


def ends(pid: int) -> bool:
    """Whether the process is gone, or a zombie that nobody waits for, within some seconds."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            with open(f"/proc/{pid}/stat") as stat:
                if stat.read().rpartition(")")[2].split()[0] == "Z":
                    return True
        except FileNotFoundError:
            return True
        time.sleep(0.02)
    return False
