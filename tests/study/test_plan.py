import json
from pathlib import Path

from rt_detectron.study.plan import describe, missing_trials
from rt_detectron.study.record import Outcome
from rt_detectron.study.run import run_study

OUT, TOOLS = Path("out"), Path("tools")


def test_nothing_is_known_at_first(make_study):
    text = describe(make_study(learning_rates=[0.02, 0.01]), OUT, TOOLS, None)
    assert "standard/mask_rcnn/lr0.02/selection-seed1  to run" in text
    assert "robust/mask_rcnn, seeds 1, 2               after the selection" in text
    assert "8 of 8 trials to run" in text
    assert text.count("python tools/train_net.py") == 4
    assert text.endswith(
        "time of 8 trials: unknown until one of their kind has finished: "
        "mask_rcnn (final), mask_rcnn (selection)"
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
