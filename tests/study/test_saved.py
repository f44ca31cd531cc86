import json
import shutil

import numpy as np
import pandas as pd
import pytest

from rt_detectron.study.evaluations import compared
from rt_detectron.study.saved import saved_study
from rt_detectron.utils.errors import InputError


@pytest.fixture
def elsewhere(whole_report, tmp_path):
    """The report's own files where none of the trials' is."""
    for name in ("results.json", "resampled.npz"):
        shutil.copy(whole_report.folder / name, tmp_path)
    content = json.loads((tmp_path / "results.json").read_text())
    for trial in content["trials"]:
        trial["folder"] = "/gone"
        for dataset in (trial["results"] or {}).get("datasets", ()):
            dataset["predictions"] = "/gone/predictions.json"
    (tmp_path / "results.json").write_text(json.dumps(content))
    return tmp_path


def test_a_report_is_enough_for_its_intervals_and_types_of_error(elsewhere, whole_report):
    study, outcomes, _ = saved_study(elsewhere)
    again, first = compared(study, outcomes), compared(whole_report.study, whole_report.outcomes)
    pd.testing.assert_frame_equal(again.table, first.table)
    pd.testing.assert_frame_equal(again.scores, first.scores, rtol=1e-4)
    assert set(first.scores["over"]) == {"", "seeds", "seeds and images"}
    assert not any("Error" in note for note in again.notes)
    (elsewhere / "resampled.npz").unlink()
    study, outcomes, _ = saved_study(elsewhere)
    without = compared(study, outcomes)
    assert set(without.scores["over"]) == {"", "seeds"}
    assert any("FileNotFoundError" in note for note in without.notes)


def test_resampled_values_of_another_report_are_refused(elsewhere):
    np.savez(elsewhere / "resampled.npz", names=np.array([], str), values=np.array([]))
    with pytest.raises(InputError, match=r"resampled\.npz was not written with this file"):
        saved_study(elsewhere)


def change(folder, edit) -> None:
    content = json.loads((folder / "results.json").read_text())
    edit(content)
    (folder / "results.json").write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda content: content.pop("command"), "no file of a study .KeyError: 'command'"),
        (lambda content: content["trials"][0].update(results="text"), "no file of a study .TypeError"),
        (
            lambda content: content["trials"][0]["results"].update(metrics=None),
            "no file of a study .TypeError",
        ),
        (lambda content: content["trials"].append(content["trials"][0]), "1 trials are there more than once"),
    ],
)
def test_a_report_that_was_changed_by_hand_is_one_line(elsewhere, edit, words):
    change(elsewhere, edit)
    with pytest.raises(InputError, match=words) as error:
        saved_study(elsewhere)
    assert "\n" not in str(error.value)


def test_a_trial_that_the_study_does_not_ask_for_is_left_out(elsewhere, whole_report):
    change(elsewhere, lambda content: content["trials"][-1].update(arm="unknown"))
    _, outcomes, _ = saved_study(elsewhere)
    assert len(outcomes) == len(whole_report.outcomes) - 1
