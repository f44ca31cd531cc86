import json
from pathlib import Path

import pytest

from rt_detectron.study.record import is_finished
from rt_detectron.study.run import run_study
from rt_detectron.utils.errors import InputError

OUT = Path("out")
EVALUATIONS = "evaluations: {attack: [TEST.ATTACK.L2_EPS, [0.5, 1], TEST.ATTACK.STEPS, 5]}"


def started(outcomes, script="train_net.py"):
    """How often each trial's script was started, by its log."""
    return [(outcome.folder / "trial.log").read_text().count(f"{script} --config") for outcome in outcomes]


def test_every_trial_runs_once_and_never_again(make_study, tools):
    study = make_study()
    outcomes = run_study(study, OUT, tools)
    assert [o.results["metrics"]["bbox"]["AP"] for o in outcomes] == [20.5, 22.0, 22.0, 23.5]
    assert all(o.error is None and o.robustness is None for o in outcomes)
    trial = outcomes[0].trial
    assert json.loads((OUT / "trials" / trial.name / "trial.json").read_text()) == trial.specification()
    # NaN, which Detectron2 gives for an undefined AP, equals nothing: so the files' text is compared.
    assert str(run_study(study, OUT, tools)) == str(outcomes)
    assert started(outcomes) == [1, 1, 1, 1]


def test_selection_then_final_trials_at_the_best_rate(make_study, tools):
    rates = "{0.1: 1.0, 0.02: 5.0, 0.01: 4.0}"
    study = make_study(["TEST.RATES", rates], learning_rates=[0.1, 0.02, 0.01], more=EVALUATIONS)
    outcomes = run_study(study, OUT, tools)
    assert [outcome.trial.stage for outcome in outcomes] == ["selection"] * 6 + ["final"] * 4
    assert {outcome.trial.learning_rate for outcome in outcomes[6:]} == {0.02}
    assert [outcome.robustness is None for outcome in outcomes] == [True] * 6 + [False] * 4
    assert [attack["eps"] for attack in outcomes[6].robustness["attack"]] == [0.5, 1]
    assert outcomes[6].robustness["clean"]["metrics"]["bbox"]["AP"] == 20.5
    record = json.loads((outcomes[6].folder / "record.json").read_text())
    assert record["selection"]["scores"] == {"0.01": 4.0, "0.02": 5.0, "0.1": 1.0}
    assert record["selection"]["at_border"] is False
    assert json.loads((outcomes[0].folder / "record.json").read_text())["selection"] is None


def test_crashed_trial_is_tried_again_and_recorded(make_study, tools):
    study = make_study(
        robust_opts=["TEST.CRASH_ONCE", "crashed"], seeds=[1], more=f"retries: 1\n{EVALUATIONS}"
    )
    outcomes = run_study(study, OUT, tools)
    assert [outcome.error for outcome in outcomes] == [None, None]
    assert started(outcomes) == [1, 2]
    record = json.loads((outcomes[1].folder / "record.json").read_text())
    assert record["attempts"] == 2
    assert [process["script"] for process in record["processes"]] == [
        "train_net.py",
        "train_net.py",
        "evaluate_robustness.py",
    ]
    assert [process["exit_status"] for process in record["processes"]] == [1, 0, 0]
    assert record["wall_time_s"] == pytest.approx(
        sum(p["wall_time_s"] for p in record["processes"]), abs=0.06
    )
    assert record["trial"] == outcomes[1].trial.specification()
    assert record["results"]["metrics"]["bbox"]["AP"] == 22.0
    assert record["robustness"]["attack"][0]["steps"] == 5
    assert record["config"] == {"SEED": 1, "OMP_NUM_THREADS": 1}
    assert record["hostname"]
    assert set(record["git"]) == {"commit", "dirty"}


def test_crash_is_reported_others_run_and_only_it_runs_again(make_study, tools):
    study = make_study(robust_opts=["TEST.CRASH_ONCE", "crashed"])
    outcomes = run_study(study, OUT, tools)
    # Two trials share the file that decides who crashes: one of them, or both if they looked together.
    crashed = [outcome for outcome in outcomes if outcome.error]
    assert crashed
    assert {outcome.trial.arm for outcome in crashed} == {"robust"}
    assert "train_net.py: exit status 1, no results.json" in crashed[0].error
    assert crashed[0].error.endswith("RuntimeError: CUDA out of memory")
    outcomes = run_study(study, OUT, tools)
    assert all(outcome.results for outcome in outcomes)
    assert sum(started(outcomes)) == 4 + len(crashed)


def test_crashed_evaluation_does_not_train_again(make_study, tools):
    study = make_study(["TEST.CRASH_EVALUATION_ONCE", "crashed"], seeds=[1], more=EVALUATIONS)
    outcomes = run_study(study, OUT, tools)
    failed = [outcome for outcome in outcomes if outcome.error]
    assert failed[0].error.endswith("RuntimeError: no attack today")
    assert failed[0].results is not None
    assert failed[0].robustness is None
    outcomes = run_study(study, OUT, tools)
    assert all(outcome.robustness for outcome in outcomes)
    assert started(outcomes) == [1, 1]
    assert sum(started(outcomes, "evaluate_robustness.py")) == 2 + len(failed)


def test_another_evaluation_keeps_the_training(make_study, tools):
    run_study(make_study(seeds=[1]), OUT, tools)
    outcomes = run_study(make_study(seeds=[1], more=EVALUATIONS), OUT, tools)
    assert [attack["eps"] for attack in outcomes[0].robustness["attack"]] == [0.5, 1]
    outcomes = run_study(make_study(seeds=[1], more=EVALUATIONS.replace("[0.5, 1]", "[2]")), OUT, tools)
    assert [attack["eps"] for attack in outcomes[0].robustness["attack"]] == [2]
    assert started(outcomes) == [1, 1]


def test_half_written_results_are_run_again(make_study, tools):
    study = make_study(seeds=[1])
    outcomes = run_study(study, OUT, tools)
    (outcomes[0].folder / "results.json").write_text('{"metrics": {"bbox"')
    assert not is_finished(OUT, outcomes[0].trial)
    outcomes = run_study(study, OUT, tools)
    assert outcomes[0].results is not None
    assert started(outcomes) == [2, 1]


def test_different_specification_stops_before_anything_runs(make_study, tools):
    outcomes = run_study(make_study(seeds=[1]), OUT, tools)
    with pytest.raises(InputError, match=r"made with a different opts than .* use another --output"):
        run_study(make_study(seeds=[2, 1], opts=["A.B", "2"]), OUT, tools)
    assert sorted((OUT / "trials").rglob("seed*")) == sorted(outcome.folder for outcome in outcomes)


def test_process_that_exits_well_without_results_is_a_failure(make_study, tools):
    (tools / "train_net.py").write_text("print('done')")
    outcome = run_study(make_study(seeds=[1]), OUT, tools)[0]
    assert "exit status 0, no results" in outcome.error
    assert outcome.error.endswith("\ndone")


def test_worker_that_dies_is_a_crash(make_study, tools):
    (tools / "train_net.py").write_text("import os, signal\nos.kill(os.getppid(), signal.SIGKILL)\n")
    outcomes = run_study(make_study(seeds=[1]), OUT, tools)
    assert all(outcome.error.startswith("WorkerCrashedError: ") for outcome in outcomes)
