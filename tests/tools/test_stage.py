import os
import signal
from pathlib import Path

import pytest
from tool_process import run_tool

TOOL = str(Path(__file__).resolve().parents[2] / "tools" / "_stage.py")
MAKES = (
    "import os, pathlib, sys\n"
    "print('babble', os.environ['OMP_NUM_THREADS'])\n"
    "pathlib.Path(sys.argv[1]).touch()\n"
)


@pytest.fixture
def commands(tmp_path, monkeypatch):
    """``commands(name=program)``: results and commands of Python programs, which get their result's path."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.syspath_prepend(str(Path(TOOL).parent))

    def make(**programs):
        for name, program in programs.items():
            (tmp_path / f"{name}.py").write_text(program)
            result = tmp_path / name / "result"
            yield from (str(result), f"{tmp_path / name}.py {result}")

    return lambda **programs: list(make(**programs))


def test_noise_goes_to_files_and_finished_results_are_kept(commands, tmp_path, run_here):
    arguments = commands(one=MAKES, two=MAKES)
    status, out, err = run_here("1 of 1, trying", *arguments)
    assert status == 0
    assert "babble" not in out + err
    assert out.startswith("1 of 1, trying: done after 00:0")
    assert str(tmp_path / "two" / "stage.log") in out
    log = tmp_path / "one" / "stage.log"
    assert log.read_text().splitlines()[1] == f"babble {max(1, os.cpu_count() // 2)}"
    assert run_here("again", *arguments) == (0, "", "")
    assert log.read_text().count("babble") == 1


def test_a_failure_shows_the_end_of_its_log_and_the_others_go_on(commands, tmp_path, run_here):
    fails = "print('\\n' * 50 + 'why'); raise SystemExit(0)"  # as a training ends that is told to stop
    status, out, err = run_here("trying", *commands(bad=fails, good=MAKES))
    assert status == 1
    assert "trying: 1 failed" in out
    log = tmp_path / "bad" / "stage.log"
    assert f"the end of {log}:\n" in err
    assert err.rstrip().endswith("why")
    assert err.count("\n") < 15
    assert (tmp_path / "good" / "result").is_file()


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_stopped_it_lets_the_commands_write_their_checkpoints(commands, tmp_path, tool_server, signum):
    waits = (
        "import pathlib, signal, sys, time\n"
        "result = pathlib.Path(sys.argv[1])\n"
        "def end(*_): time.sleep(0.1); (result.parent / 'checkpoint').touch(); sys.exit(0)\n"
        "signal.signal(signal.SIGTERM, end); (result.parent / 'ready').touch(); time.sleep(60)\n"
    )
    stops = (  # once the other waits, as a user would
        "import os, pathlib, sys, time\n"
        "result = pathlib.Path(sys.argv[1])\n"
        "while not (result.parent.parent / 'waits' / 'ready').is_file(): time.sleep(0.01)\n"
        f"os.kill(os.getppid(), {signum:d}); time.sleep(60)\n"
    )
    done = run_tool([TOOL, "trying", *commands(waits=waits, stops=stops)], tmp_path)
    stopped = "trying: stopped; the same command continues\n"
    assert (done.returncode, done.stdout, done.stderr) == (130, "", stopped)
    assert (tmp_path / "waits" / "checkpoint").is_file()
