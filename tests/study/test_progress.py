import json
from types import SimpleNamespace

import pytest

from rt_detectron.study.progress import left, seconds_left, state, times
from rt_detectron.study.record import Outcome


def test_a_training_tells_its_iteration_loss_and_time_left(tmp_path):
    assert state(tmp_path) == "starting"
    lines = [
        {"iteration": n, "total_loss": 3 / (n + 1), "eta_seconds": 4000 - n, "filler": "x" * 900}
        for n in range(20)
    ]
    text = "\n".join(map(json.dumps, lines))
    (tmp_path / "metrics.json").write_text(text + '\n{"iteration": 20, "total_l')  # being written
    assert state(tmp_path) == "iteration 19, loss 0.150, 1:06:21 left"
    (tmp_path / "metrics.json").write_text('{"iteration": 3, "total_loss": NaN}\n')
    assert state(tmp_path) == "iteration 3"


def test_the_time_that_is_left_is_that_of_finished_trials(make_study, tmp_path):
    study = make_study(learning_rates=[0.1, 0.01], seeds=[1, 2])
    assert left(study, {}) == {("mask_rcnn", "final"): 4, ("mask_rcnn", "selection"): 8}
    finished = {}
    final = study.final_trials({("robust", "mask_rcnn"): 0.1})[0]
    for trial, seconds in ((study.selection_trials()[0], 10), (final, 30)):
        folder = tmp_path / trial.name
        folder.mkdir(parents=True)
        (folder / "record.json").write_text(json.dumps({"results": {}, "wall_time_s": seconds}))
        finished[trial.name] = Outcome(trial, folder, {})
    remaining = left(study, finished)
    assert seconds_left(remaining, times(finished.values())) == 3 * 30 + 7 * 10
    selection = [outcome for outcome in finished.values() if outcome.trial.stage == "selection"]
    assert seconds_left(remaining, times(selection)) is None

    # A running trial tells how long those of its group take, and its part that is done is not left.
    (tmp_path / "metrics.json").write_text('{"iteration": 9, "time": 2.0, "eta_seconds": 5.0}\n')
    running = [(final, tmp_path)]
    assert seconds_left(remaining, times(selection), running) == 3 * 25 + 7 * 10 - 20
    assert seconds_left(remaining, times(finished.values()), running) == 3 * 30 + 7 * 10 - 20


def test_lines_of_running_trials_are_shown(make_study, tmp_path, monkeypatch):
    from rt_detectron.study import progress as module

    shown = []

    class Bar:
        disable = False

        def __init__(self, **options):
            self.options = options

        def set_description_str(self, text):
            shown.append(text)

        def set_postfix_str(self, text, refresh):
            shown.append(text)

        def refresh(self): ...
        def close(self): ...

        format_interval = staticmethod(module.tqdm.format_interval)

    monkeypatch.setattr(module, "tqdm", Bar)
    study = make_study()
    (tmp_path / "metrics.json").write_text('{"iteration": 7, "total_loss": 1.5}\n')
    with module.Progress(study, 1, parallel=2) as progress:
        progress.show([(SimpleNamespace(name="a/b/seed1"), tmp_path)], 600.0)
        progress.show([], None)  # too soon after the last time
    assert shown == ["05:00 left", "  a/b/seed1: iteration 7, loss 1.500"]
    assert progress.bar.options["total"] == 4


@pytest.mark.parametrize("known", [{}, {("t", "final"): 3.0}])
def test_nothing_is_left(known):
    assert seconds_left({}, known) == 0
