"""A study as it lies in its output folder: all that a report needs, without Ray, weights, configs or data."""

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from rt_detectron.study.grid import FINAL, Study, Trial
from rt_detectron.study.load import described_study
from rt_detectron.study.record import (
    RECORD,
    RESULTS,
    ROBUSTNESS,
    SPECIFICATION,
    STUDY,
    Outcome,
    read_outcome,
)
from rt_detectron.study.selection import choose
from rt_detectron.study.statistics import TRIAL, Draws, Quantity, trial_key
from rt_detectron.study.worker import read_json
from rt_detectron.utils.arrays import read_arrays, write_arrays
from rt_detectron.utils.errors import InputError
from rt_detectron.utils.files import file_sha256, write_json
from rt_detectron.utils.numbers import finite

REPORTED = "results.json"  # of a report: the study and all of its trials
RESAMPLED = "resampled.npz"  # of a report: the scores of all trials on resampled test images


def save_study(study: Study, output: Path, command: str) -> None:
    """Write what :func:`saved_study` reads, beside the trials of a study that begins."""
    write_json(output / STUDY, finite({"study": study.description(), "command": command}))


def saved_study(output: Path) -> tuple[Study, list[Outcome], str]:
    """The study in ``output``, its finished trials, and the command that makes it.

    From the trials' own files if they are there, also while they run; else from the report's results.json.

    Raises:
        InputError: neither is there, or it cannot be read.
    """
    content = read_json(output / STUDY, "study")
    source = output / (STUDY if content else REPORTED)
    content = content or read_json(source, "study")
    if content is None:
        raise InputError(
            f"{output} has neither {STUDY} nor {REPORTED} of a study: give its folder as --output"
        )
    try:
        study, command = described_study(content["study"]), str(content["command"])
        if source.name == STUDY:
            outcomes = list(_known(study, _from_trials(output)))
        else:
            draws = _read_draws(output / RESAMPLED, content.get("resampled_sha256"))
            found = (_from_report(output, trial, draws) for trial in content["trials"])
            outcomes = _of_arms(study, found)  # at the rates that were chosen then
            _check_each_is_there_once(outcomes)
    except InputError as error:
        raise InputError(f"{source}: {error}") from None
    except (KeyError, TypeError) as error:
        raise InputError(f"{source}: it is no file of a study ({type(error).__name__}: {error})") from None
    return study, outcomes, command


def _from_trials(output: Path) -> Iterator[Outcome]:
    for path in sorted((output / "trials").rglob(RECORD)):
        specification = read_json(path.with_name(SPECIFICATION), "opts", list)
        if specification is not None:
            outcome = read_outcome(output, Trial.from_specification(specification))
            if outcome.results is not None:
                yield outcome


def _known(study: Study, outcomes: Iterator[Outcome]) -> Iterator[Outcome]:
    """Without trials that the study does not ask for any more, such as those at a rate chosen earlier."""
    found = _of_arms(study, outcomes)
    selection = study.selection
    chosen = {(choice.arm, choice.target): choice.learning_rate for choice in choose(study, found)}
    for outcome in found:
        trial = outcome.trial
        if trial.stage != FINAL:
            if selection and trial.seed in selection.seeds and trial.learning_rate in study.learning_rates:
                yield outcome
        elif trial.seed in study.seeds:
            rate = chosen.get((trial.arm, trial.target)) if selection else study.learning_rates[0]
            if trial.learning_rate == rate:
                yield outcome


def _of_arms(study: Study, outcomes: Iterator[Outcome]) -> list[Outcome]:
    """Those of the arms, checkpoints and targets that the study has."""
    checkpoints = {(arm.name, one.name) for arm in study.arms for one in arm.checkpoints}
    targets = {target.name for target in study.targets}
    return [
        outcome
        for outcome in outcomes
        if (outcome.trial.arm, outcome.trial.checkpoint) in checkpoints and outcome.trial.target in targets
    ]


def _from_report(output: Path, content: dict[str, Any], draws: Draws) -> Outcome:
    trial = Trial.from_specification(content)
    for kind, (_, key) in (("results", RESULTS), ("robustness", ROBUSTNESS)):
        if content[kind] is not None and not isinstance(content[kind][key], dict):
            raise TypeError(f"{kind} of {trial.name}")
    folder = Path(content["folder"])
    if not folder.is_dir():
        folder = output / "trials" / trial.name
    return Outcome(
        trial,
        folder,
        content["results"],
        content["robustness"],
        content["error"],
        content.get("errors"),
        draws.get(trial_key(trial)),
    )


def _check_each_is_there_once(outcomes: list[Outcome]) -> None:
    """As they might not be in a file that was put together from several."""
    names = Counter(outcome.trial.name for outcome in outcomes)
    if twice := [name for name, number in names.items() if number > 1]:
        raise InputError(f"{len(twice)} trials are there more than once, such as {twice[0]}")


def write_draws(path: Path, draws: Draws) -> str | None:
    """Write the values of all trials on resampled test images. Gives the file's SHA-256; None without any.

    Each line is kept as its middle and, in half precision, the differences to it. They are small, so that
    intervals stay the same to four digits, and the file is half as large.
    """
    lines = {
        json.dumps([*trial, *quantity]): values
        for trial, of_trial in draws.items()
        for quantity, values in of_trial.items()
    }
    if not lines:
        path.unlink(missing_ok=True)
        return None
    values = np.array([*lines.values()], "f4")
    middle = np.nan_to_num(values).mean(axis=1, keepdims=True)
    arrays = {"names": np.array([*lines], str), "middle": middle, "values": (values - middle).astype("f2")}
    write_arrays(path, arrays, compressed=True)
    return file_sha256(path)


def _read_draws(path: Path, sha256: str | None) -> Draws:
    """What :func:`write_draws` wrote; {} if the file is not there, so that intervals lack the images.

    Raises:
        InputError: the file is not the one that the report wrote.
    """
    if not path.is_file():
        return {}
    if sha256 != file_sha256(path):
        raise InputError(f"{path} was not written with this file: copy both of one report, or delete it")
    found: dict[tuple, dict[Quantity, np.ndarray]] = {}
    arrays = read_arrays(path)
    all_values = arrays["values"] + arrays.get("middle", 0)  # earlier reports have none
    for name, values in zip(arrays["names"], all_values, strict=True):
        columns = json.loads(str(name))
        quantity = Quantity(*columns[len(TRIAL) :])
        found.setdefault(tuple(columns[: len(TRIAL)]), {})[quantity] = values
    return found
