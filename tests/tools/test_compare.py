import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from rt_detectron.study.record import output_folder

REPOSITORY = Path(__file__).parents[2]
COMPARE = ["tools/compare.py", "--study", "study.yaml", "--output", "out"]
COMMAND = "python tools/compare.py --study study.yaml --output out"


@pytest.fixture
def project(tmp_path):
    """tools/compare.py beside stand-ins for the tools it starts. Gives a writer of a study of two trials.

    The writer takes config keys for the robust one.
    """
    (tmp_path / "tools").mkdir()
    for name in ("compare.py", "_packages.py"):
        shutil.copy(REPOSITORY / "tools" / name, tmp_path / "tools")
    for name in ("train_net.py", "evaluate_robustness.py"):
        shutil.copy(REPOSITORY / f"tests/study/fake_{name}", tmp_path / "tools" / name)
    (tmp_path / "std.pkl").write_text("20")
    (tmp_path / "l2.pkl").write_text("21.5")
    (tmp_path / "mask.yaml").write_text("A: 1\n")

    def write(*opts):
        (tmp_path / "study.yaml").write_text(
            "name: test\nbaseline: standard\n"
            f"arms: {{standard: {{weights: std.pkl}}, robust: {{weights: l2.pkl, opts: {list(opts)}}}}}\n"
            "detectors: {mask_rcnn: {config: mask.yaml}}\n"
            "learning_rates: [0.02]\nseeds: [1]\n"
        )
        return tmp_path

    return write


@pytest.fixture
def run(project, monkeypatch, capsys, ray_here):
    """Runs the tool as a script, but in this process, which saves importing torch and starting Ray."""
    handler = signal.getsignal(signal.SIGTERM)

    def run(folder, *arguments):
        monkeypatch.chdir(folder)
        monkeypatch.setattr(sys, "argv", [*COMPARE, *arguments])
        monkeypatch.syspath_prepend(folder / "tools")  # as for a script
        with pytest.raises(SystemExit) as end:
            runpy.run_path(COMPARE[0], run_name="__main__")
        return end.value.code, *capsys.readouterr()

    yield run
    signal.signal(signal.SIGTERM, handler)


def test_crash_then_resume(project, run):
    folder = project("TEST.CRASH_ONCE", "crashed")
    status, out, err = run(folder)
    assert status == 1
    assert out.splitlines()[-1] == "out/report.html"
    assert "RuntimeError: CUDA out of memory" in err
    assert f"missing trials: 1; run them with: {COMMAND} --resume" in err
    status, out, _ = run(folder, "--resume")
    assert status == 0
    assert "+1.50" in out
    assert "undecided" in out  # by a single seed without predictions
    assert out.splitlines()[-1] == "out/report.html"
    assert (folder / "out/report.html").is_file()


def test_dry_run_touches_nothing(project, run):
    folder = project()
    before = sorted(folder.rglob("*"))
    status, out, _ = run(folder, "--dry-run")
    assert status == 0
    assert "2 of 2 trials to run" in out
    assert "--config-file mask.yaml --resume SOLVER.MAX_TO_KEEP 1 OUTPUT_DIR out/trials/" in out
    assert sorted(folder.rglob("*")) == before


def test_the_dry_run_says_how_many_seeds_resolve_a_difference(project, run):
    folder = project()
    status, out, _ = run(folder, "--dry-run", "--resolve", "0.3", "--sd", "0.2")
    assert status == 0
    assert "mask_rcnn: 9 seeds of each arm resolve 0.3 box AP in 80% of studies" in out
    status, out, err = run(folder, "--resolve", "0.3")
    assert (status, out) == (2, "")
    assert "--resolve goes with --dry-run" in err


def test_a_report_needs_the_result_files_only(project, run, monkeypatch):
    """Also beside a running study, without its file, weights and configs, and without Ray."""
    folder = project()
    assert run(folder, "--only", "arm=standard")[0] == 1
    page = (folder / "out/report.html").read_text()
    for name in ("std.pkl", "l2.pkl", "mask.yaml", "study.yaml", "out/report.html"):
        (folder / name).unlink()
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.setattr(sys.modules[__name__], "COMPARE", ["tools/compare.py", "--output", "out"])
    with output_folder(folder / "out"):  # as a running study holds it
        status, _, err = run(folder, "--report")
    assert status == 1
    assert f"missing trials: 1; run them with: {COMMAND} --resume" in err
    assert (folder / "out/report.html").read_text() == page
    for name in ("study.json", "results.json"):
        (folder / "out" / name).rename(folder / name)
        status, _, err = run(folder, "--report")
        assert status == (1 if name == "study.json" else 2)  # then from the report's results.json
    assert err.startswith("error: out has neither study.json nor results.json of a study")


HEAVY = ("torch", "torchvision", "detectron2", "ray", "faster_coco_eval")
# Not as None in sys.modules: SciPy takes that for a torch that has been imported.
BARE = f"""
import runpy, sys
class Hidden:
    def find_spec(name, path=None, target=None):
        if name.split(".")[0] in {HEAVY}:
            raise ModuleNotFoundError("hidden: " + name, name=name)
if sys.argv.pop(1) == "missing":
    sys.meta_path.insert(0, Hidden)
sys.argv = sys.argv[1:]
sys.path.insert(0, "tools")
try:
    runpy.run_path("tools/compare.py", run_name="__main__")
finally:
    assert not {{*{HEAVY}}} & set(sys.modules)
"""


@pytest.mark.parametrize(("name", "heavy"), [("coco-subset", "missing"), ("transfer", "installed")])
def test_shipped_results_are_rendered_without_torch_detectron2_and_ray(project, name, heavy):
    folder = project()
    shutil.copytree(REPOSITORY / "docs/results" / name, folder / "out")
    (folder / "out/report.html").unlink()
    before = json.loads((folder / "out/results.json").read_text())
    command = [sys.executable, "-c", BARE, heavy, "tools/compare.py", "--output", "out", "--report"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[-1] == "out/report.html"
    after = json.loads((folder / "out/results.json").read_text())
    assert [trial["results"] for trial in after["trials"]] == [trial["results"] for trial in before["trials"]]
    assert len(after["answers"]) == (3 if name == "coco-subset" else 1)
    assert (folder / "out/report.html").stat().st_size > 100_000


def test_wrong_study_is_one_line(project, run):
    folder = project()
    (folder / "std.pkl").unlink()
    status, out, err = run(folder)
    assert (status, out) == (2, "")
    assert err.startswith("error: study.yaml: arms.standard.weights: no file std.pkl")
    assert err.count("\n") == 1


@pytest.fixture
def start(project):
    """Starts the tool as a user does; gives its process, and the id of the robust trial's, that waits."""
    processes = []

    def start(folder, in_background=False):
        # A shell starts its background jobs, such as these tests may be, with SIGINT ignored.
        interrupted = signal.SIG_IGN if in_background else signal.SIG_DFL
        process = subprocess.Popen(
            [sys.executable, "-W", "ignore", *COMPARE],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, interrupted),
        )
        processes.append(process)
        finished = folder / "out/trials/standard/mask_rcnn/lr0.02/seed1/record.json"
        wait_for(lambda: (folder / "pid").is_file() and (folder / "pid").read_text() and finished.is_file())
        return process, int((folder / "pid").read_text())

    yield start
    for process in processes:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("stop", [pytest.param(signal.SIGINT, marks=pytest.mark.slow), signal.SIGTERM])
def test_interrupt_stops_the_trial_too(project, run, start, stop):
    folder = project("TEST.SLEEP_ONCE", "pid")
    process, trial = start(folder, in_background=stop == signal.SIGTERM)
    second_status, _, second_error = run(folder)
    process.send_signal(stop)
    _, error = process.communicate(timeout=30)
    assert process.returncode == 130
    assert f"stopped; continue with: {COMMAND} --resume" in error
    assert "Traceback" not in error
    wait_for(lambda: is_gone(trial), seconds=10)
    assert second_status == 2
    assert second_error.count("\n") == 1
    assert "another comparison is running in out" in second_error


def test_killed_driver_leaves_no_process_and_is_resumed(project, run, start):
    folder = project("TEST.SLEEP_ONCE", "pid")
    process, trial = start(folder)
    process.kill()
    process.wait()
    wait_for(lambda: is_gone(trial), seconds=20)
    status, _, err = run(folder, "--resume")
    assert status == 0
    assert "robust/mask_rcnn/lr0.02/seed1 finished" in err
    assert "standard/mask_rcnn" not in err  # that one was done before


@pytest.mark.slow
def test_a_study_that_is_killed_again_and_again_loses_no_finished_trial(project, run):
    """12 trials, the driver killed at 20 random moments: finished trials stay, and no file is left over."""
    folder = project("TEST.SLEEP", "0.7")
    text = (folder / "study.yaml").read_text().replace("seeds: [1]", "seeds: [1, 2, 3, 4, 5, 6]")
    (folder / "study.yaml").write_text(text)
    random = np.random.default_rng(0)
    finished = {}
    for _ in range(20):
        process = subprocess.Popen(
            [sys.executable, "-W", "ignore", *COMPARE],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
            stderr=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )
        time.sleep(random.uniform(4, 12))
        process.kill()
        process.wait()
        now = {path: path.read_text() for path in (folder / "out").rglob("record.json")}
        assert finished.items() <= now.items()
        finished = now
    status, _, _ = run(folder)
    assert status == 0
    records = {path: path.read_text() for path in (folder / "out").rglob("record.json")}
    assert len(records) == 12
    assert finished.items() <= records.items()
    left = [path for path in (folder / "out").rglob("*") if path.suffix in (".tmp", ".pth")]
    assert left == []


def is_gone(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"


def wait_for(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)
    return value
