import json
import os
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from rt_detectron.study.grid import Resources
from rt_detectron.study.load import trials_only
from rt_detectron.study.record import Outcome, is_finished, with_copied_configs
from rt_detectron.study.run import (
    _short_folder,
    describe,
    import_ray,
    missing_trials,
    parallel_trials,
    ray_session,
    run_study,
)
from rt_detectron.utils.errors import InputError

OUT, TOOLS = Path("out"), Path("tools")
MACHINES = [{"CPU": 16.0, "GPU": 8.0}, {"CPU": 16.0, "GPU": 4.0}, {"CPU": 6.0}]
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
    assert [outcome.trial.stage for outcome in outcomes] == ["selection"] * 12 + ["final"] * 4
    assert {outcome.trial.learning_rate for outcome in outcomes[12:]} == {0.02}
    assert [outcome.robustness is None for outcome in outcomes] == [True] * 12 + [False] * 4
    assert [attack["eps"] for attack in outcomes[12].robustness["attack"]] == [0.5, 1]
    assert outcomes[12].robustness["clean"]["metrics"]["bbox"]["AP"] == 20.5
    record = json.loads((outcomes[12].folder / "record.json").read_text())
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
    keep = "keep_checkpoints: true\n"
    run_study(make_study(seeds=[1], more=keep), OUT, tools)
    outcomes = run_study(make_study(seeds=[1], more=keep + EVALUATIONS), OUT, tools)
    assert [attack["eps"] for attack in outcomes[0].robustness["attack"]] == [0.5, 1]
    changed = keep + EVALUATIONS.replace("[0.5, 1]", "[2]")
    outcomes = run_study(make_study(seeds=[1], more=changed), OUT, tools)
    assert [attack["eps"] for attack in outcomes[0].robustness["attack"]] == [2]
    assert started(outcomes) == [1, 1]
    assert all((outcome.folder / "model_final.pth").is_file() for outcome in outcomes)


def test_weights_are_deleted_once_a_trial_has_its_record(make_study, tools):
    outcomes = run_study(make_study(seeds=[1]), OUT, tools)
    assert not list(OUT.rglob("*.pth"))
    record = json.loads((outcomes[0].folder / "record.json").read_text())
    assert record["weights_bytes"] == len("20.5")
    with pytest.raises(InputError, match=r"its weights are deleted \(keep_checkpoints: true keeps them\)"):
        run_study(make_study(seeds=[1], more=EVALUATIONS), OUT, tools)
    (outcomes[0].folder / "model_final.pth").write_text("left by a driver that was killed")
    run_study(make_study(seeds=[1]), OUT, tools)
    assert not list(OUT.rglob("*.pth"))


def test_trials_run_at_no_niceness_without_gpus_and_with_the_drivers_environment(
    make_study, tools, monkeypatch
):
    monkeypatch.setenv("DETECTRON2_DATASETS", "/data/of/mine")
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tools / ("x" * 60)))  # too long for sockets
    (tools / "train_net.py").write_text(
        "import json, os\n"
        "seen = [os.nice(0), os.environ['CUDA_VISIBLE_DEVICES'], os.environ['DETECTRON2_DATASETS']]\n"
        "seen += [os.environ['TMPDIR']]\n"
        "open('seen', 'w').write(json.dumps(seen))\n"
    )
    run_study(make_study(seeds=[1]), OUT, tools, only=lambda trial: trial.arm == "robust")
    assert json.loads((tools / "seen").read_text()) == [os.nice(0), "", "/data/of/mine", "/tmp"]


def test_only_some_trials_run(make_study, tools):
    study = make_study(seeds=[1, 2])
    outcomes = run_study(study, OUT, tools, only=trials_only(study, "arm=robust"))
    assert {outcome.trial.arm for outcome in outcomes} == {"robust"}
    assert len(outcomes) == 2
    outcomes = run_study(study, OUT, tools)
    assert started(outcomes) == [1] * 4
    for text, message in (
        ("arm=x", "unknown arm 'x'; known are standard, robust"),
        ("a=b", "unknown key 'a'"),
    ):
        with pytest.raises(InputError, match=message):
            trials_only(study, text)


def test_an_edited_config_changes_nothing_of_a_study_that_has_begun(make_study, tools):
    study, notes = with_copied_configs(make_study(seeds=[1]), OUT, make=True)
    run_study(study, OUT, tools, only=lambda trial: trial.arm == "robust")
    (tools / "mask.yaml").write_text("DATASETS:\n  TRAIN: ('other_train',)\n")
    study, notes = with_copied_configs(make_study(seeds=[1]), OUT, make=False)
    assert notes == ["mask.yaml has changed since the study began; out/configs/mask_rcnn/mask.yaml is used"]
    outcomes = run_study(study, OUT, tools)
    assert started(outcomes) == [1, 1]
    log = (outcomes[0].folder / "trial.log").read_text()
    assert "--config-file out/configs/mask_rcnn/mask.yaml" in log
    assert "tiny_train" in (OUT / "configs/mask_rcnn/mask.yaml").read_text()


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


def test_lost_workers_are_replaced_and_are_no_crashes(make_study, tools):
    """A trial whose worker or machine is lost starts again, though ``retries`` of crashes is 0."""
    (tools / "really_train.py").write_text((tools / "train_net.py").read_text())
    (tools / "train_net.py").write_text(
        "import os, pathlib, runpy, signal\n"
        "if not pathlib.Path('lost').exists():\n"
        "    pathlib.Path('lost').touch()\n"
        "    os.kill(os.getppid(), signal.SIGKILL)\n"
        "runpy.run_path(str(pathlib.Path(__file__).with_name('really_train.py')), run_name='__main__')\n"
    )
    study = make_study(seeds=[1])
    (outcome,) = run_study(study, OUT, tools, only=lambda trial: trial.arm == "robust")
    assert outcome.error is None
    assert started([outcome]) == [2]


@pytest.mark.slow
def test_worker_that_always_dies_is_a_crash(make_study, tools):
    (tools / "train_net.py").write_text("import os, signal\nos.kill(os.getppid(), signal.SIGKILL)\n")
    outcomes = run_study(make_study(seeds=[1]), OUT, tools)
    assert all(outcome.error.startswith("WorkerCrashedError: ") for outcome in outcomes)


def test_nothing_is_known_at_first(make_study):
    text = describe(make_study(learning_rates=[0.02, 0.01]), OUT, TOOLS, None)
    assert "standard/mask_rcnn/lr0.02/selection-seed1  to run" in text
    assert "robust/mask_rcnn, seeds 1, 2               after the selection" in text
    assert "12 of 12 trials to run" in text
    assert text.count("python tools/train_net.py") == 8
    assert text.endswith(
        "time of 12 trials: unknown until one of each group has finished: "
        "mask_rcnn (final), mask_rcnn (selection)\ndisk: unknown until one trial has finished"
    )
    assert not OUT.exists()


def test_missing_are_the_failed_and_those_they_hold_up(make_study):
    study = make_study(learning_rates=[0.02, 0.01])
    results = {"metrics": {"bbox": {"AP": 1.0}}}
    outcomes = [Outcome(trial, OUT, results) for trial in study.selection_trials()]
    assert missing_trials(study, outcomes) == (4, [])
    outcomes[0] = Outcome(outcomes[0].trial, OUT, None, error="exit status 1")
    missing, reasons = missing_trials(study, outcomes)
    assert missing == 5
    assert reasons == [
        "trial standard/mask_rcnn/lr0.02/selection-seed1 failed: exit status 1",
        "no learning rate for standard on mask_rcnn: standard/mask_rcnn/lr0.02/selection-seed1 failed",
    ]


def test_estimate_is_from_finished_trials(make_study, tools, ray_here):
    study = make_study(seeds=[1])
    for outcome in run_study(study, OUT, tools):
        record = json.loads((outcome.folder / "record.json").read_text())
        record["wall_time_s"] = 600 if outcome.trial.arm == "standard" else 1200
        (outcome.folder / "record.json").write_text(json.dumps(record))
    text = describe(make_study(seeds=[1, 2, 3]), OUT, TOOLS, None)
    parallel = int(ray_here.cluster_resources()["CPU"])
    assert "standard/mask_rcnn/lr0.02/seed1  finished" in text
    assert "4 of 6 trials to run" in text
    assert "time: about 1:00:00 in all" in text
    assert f"with {parallel} trials at a time" in text
    if parallel == 2:
        assert "30:00 with 2" in text
    assert re.search(r"disk: about \S+ GB for all trials, without their checkpoints", text)


@pytest.mark.parametrize(
    ("resources", "fits"),
    [
        (Resources(), 16 + 16 + 6),
        (Resources(cpus=4), 4 + 4 + 1),
        (Resources(gpus=1), 8 + 4),
        (Resources(gpus=8), 1),
        (Resources(cpus=4, gpus=2), 4 + 2),
        (Resources(gpus=0.5), 16 + 8),
        (Resources(gpus=0.4), 16 + 8),  # the last fifth of each GPU is left
    ],
)
def test_trials_that_fit_the_machines(resources, fits):
    nodes = [{"Alive": True, "Resources": machine} for machine in MACHINES]
    dead = {"Alive": False, "Resources": {"CPU": 99.0, "GPU": 99.0}}
    assert parallel_trials(SimpleNamespace(nodes=lambda: [*nodes, dead]), resources) == fits


def test_a_cluster_may_still_add_machines(capsys):
    ray = SimpleNamespace(nodes=lambda: [{"Alive": True, "Resources": {"CPU": 2.0}}])
    assert parallel_trials(ray, Resources(gpus=8), waits=True) == 1
    assert (
        "no machine of the cluster has them yet (2 CPUs, 0 GPUs): waiting for one" in capsys.readouterr().err
    )


def test_ray_gets_a_folder_with_a_short_path(monkeypatch, tmp_path):
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setattr("tempfile.gettempdir", lambda: "/tmp")
    assert _short_folder() == {}
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path / ("x" * 60)))
    (folder,) = _short_folder().values()
    assert len(folder) < 30
    monkeypatch.setattr("os.access", lambda *_: False)
    with pytest.raises(InputError, match="too long a path for Ray's sockets: set RAY_TMPDIR to one of"):
        _short_folder()


def test_ray_that_does_not_start_is_tried_again(monkeypatch, capsys):
    starts = []

    def init(*_, **__):
        starts.append(1)
        if len(starts) < 3 or fails:
            raise Exception("The current node timed out during startup.\nRay's log")

    ray = SimpleNamespace(init=init, shutdown=lambda: None, is_initialized=lambda: False)
    monkeypatch.setattr("rt_detectron.study.run.import_ray", lambda: ray)
    fails = False
    with ray_session(None) as session:
        assert session is ray
    assert len(starts) == 3
    assert capsys.readouterr().err.count("trying again") == 2
    fails = True
    message = r"Ray did not start on this machine .* run the same command again"
    with pytest.raises(InputError, match=message), ray_session(None):
        pass


def test_trial_that_no_machine_can_run():
    ray = SimpleNamespace(nodes=lambda: [{"Alive": True, "Resources": {"CPU": 2.0}}])
    with pytest.raises(InputError, match="needs 1 CPUs and 8 GPUs, which no machine has"):
        parallel_trials(ray, Resources(gpus=8))


def test_ray_is_this_machines(ray_here):
    assert parallel_trials(ray_here, Resources()) == len(os.sched_getaffinity(0))


def test_missing_ray_is_one_line(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with pytest.raises(InputError, match='pip install "ray'):
        import_ray()
