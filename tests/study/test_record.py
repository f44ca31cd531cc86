import json
import subprocess
import sys
from pathlib import Path

import pytest

from rt_detectron.study.record import (
    check_name,
    git_state,
    is_finished,
    output_folder,
    prepare,
    read_outcome,
    write_record,
)
from rt_detectron.utils.errors import InputError

OUT = Path("out")


@pytest.fixture
def trial(make_study):
    return make_study(seeds=[1]).final_trials()[0]


def test_record_makes_a_trial_finished(trial):
    folder = prepare(OUT, trial)
    (folder / "results.json").write_text('{"metrics": {"bbox": {"AP": 1}}}')
    assert not is_finished(OUT, trial)
    # No processes.jsonl: the driver died before its worker wrote a line.
    write_record(read_outcome(OUT, trial), None)
    assert is_finished(OUT, trial)
    assert json.loads((folder / "record.json").read_text())["processes"] == []


def test_half_a_line_of_a_killed_worker_is_left_out(trial):
    folder = prepare(OUT, trial)
    line = {"finished": False, "wall_time_s": 2.5, "git": None, "hostname": "here"}
    (folder / "processes.jsonl").write_text(json.dumps(line) + '\n{"finished": tr')
    write_record(read_outcome(OUT, trial), None)
    record = json.loads((folder / "record.json").read_text())
    assert (record["wall_time_s"], record["attempts"], record["hostname"]) == (2.5, 2, "here")


def test_broken_trial_json_stops(trial):
    (prepare(OUT, trial) / "trial.json").write_text("{")
    with pytest.raises(InputError, match="cannot be read: delete that folder"):
        is_finished(OUT, trial)


def test_git_state_is_gits():
    head = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True)
    if head.returncode:
        pytest.skip("this is no git checkout")
    assert git_state()["commit"] == head.stdout.strip()


def test_second_comparison_in_one_folder_stops(tmp_path):
    program = (
        "import sys, filelock; lock = filelock.FileLock(sys.argv[1]); lock.acquire();"
        "print('held', flush=True); input()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path / "compare.lock")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as other:
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(InputError, match="another comparison is running"), output_folder(tmp_path):
            pass
        other.kill()
    with output_folder(tmp_path):  # a killed process holds nothing
        pass


def test_output_that_is_a_file(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot write to --output"), output_folder(tmp_path / "file"):
        pass


def test_output_whose_name_no_file_can_hold(tmp_path):
    check_name(tmp_path / "\u00e4")
    with pytest.raises(InputError, match=r"\\xff is no UTF-8"):
        check_name(tmp_path / "\udcff")
