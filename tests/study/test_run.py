import json
import subprocess
import sys
from pathlib import Path

import pytest

from rt_detectron.errors import InputError
from rt_detectron.study.run import is_finished, output_folder, read_results, run_trials, write_atomically

OUT = Path("out")


def started(trials):
    """How often each trial's process was started, by its log."""
    return [(OUT / "trials" / t.name / "train.log").read_text().count("$ ") for t in trials]


def test_every_trial_runs_once_and_never_again(make_study, train_net):
    trials = make_study().trials()
    outcomes = run_trials(trials, OUT, train_net)
    assert [o.results["metrics"]["bbox"]["AP"] for o in outcomes] == [20.5, 22.0, 22.0, 23.5]
    assert all(o.error is None for o in outcomes)
    assert (
        json.loads((OUT / "trials" / trials[0].name / "trial.json").read_text()) == trials[0].specification()
    )
    again = run_trials(trials, OUT, train_net)
    assert [o.results["metrics"]["segm"] for o in again] == [o.results["metrics"]["segm"] for o in outcomes]
    assert started(trials) == [1, 1, 1, 1]


def test_crash_is_reported_others_run_and_only_it_runs_again(make_study, train_net):
    trials = make_study(robust_opts=["TEST.CRASH_ONCE", "crashed"]).trials()
    outcomes = run_trials(trials, OUT, train_net)
    assert [o.results is None for o in outcomes] == [False, True, False, False]
    assert "exit status 1" in outcomes[1].error
    assert outcomes[1].error.endswith("RuntimeError: CUDA out of memory")
    outcomes = run_trials(trials, OUT, train_net)
    assert all(o.results for o in outcomes)
    assert started(trials) == [1, 2, 1, 1]


def test_half_written_results_are_run_again(make_study, train_net):
    trials = make_study(seeds=[1]).trials()
    run_trials(trials, OUT, train_net)
    (OUT / "trials" / trials[0].name / "results.json").write_text('{"metrics": {"bbox"')
    assert not is_finished(OUT, trials[0])
    assert run_trials(trials, OUT, train_net)[0].results is not None
    assert started(trials) == [2, 1]


def test_different_specification_stops_before_anything_runs(make_study, train_net):
    run_trials(make_study(seeds=[1]).trials(), OUT, train_net)
    trials = make_study(seeds=[2, 1], opts=["A.B", "2"]).trials()
    with pytest.raises(InputError, match=r"made with a different opts than .* use another --output"):
        run_trials(trials, OUT, train_net)
    assert not (OUT / "trials" / trials[0].name).exists()


def test_broken_trial_json_stops(make_study, train_net):
    trials = make_study(seeds=[1]).trials()
    run_trials(trials, OUT, train_net)
    (OUT / "trials" / trials[0].name / "trial.json").write_text("{")
    with pytest.raises(InputError, match="cannot be read: delete that folder"):
        is_finished(OUT, trials[0])


def test_process_that_exits_well_without_results_is_a_failure(make_study, tmp_path):
    silent = tmp_path / "silent.py"
    silent.write_text("print('done')")
    outcome = run_trials(make_study(seeds=[1]).trials(), OUT, silent)[0]
    assert "exit status 0, no results" in outcome.error


@pytest.mark.parametrize("text", ["", "[]", '{"metrics": 3}', "null", "{"])
def test_read_results_wants_metrics(tmp_path, text):
    (tmp_path / "results.json").write_text(text)
    assert read_results(tmp_path) is None


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


def test_failed_write_keeps_the_old_file(tmp_path):
    write_atomically(tmp_path / "a", "old")
    with pytest.raises(UnicodeEncodeError):
        write_atomically(tmp_path / "a", "new \ud800")
    assert (tmp_path / "a").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
