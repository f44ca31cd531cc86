"""A study as it lies in its output folder: all that a report needs, without Ray, weights, configs or data."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rt_detectron.study.grid import FINAL, Study, Trial
from rt_detectron.study.load import described_study
from rt_detectron.study.record import RECORD, SPECIFICATION, STUDY, Outcome, read_outcome
from rt_detectron.study.selection import choose
from rt_detectron.study.worker import read_json
from rt_detectron.utils.errors import InputError
from rt_detectron.utils.files import write_json
from rt_detectron.utils.numbers import finite

REPORTED = "results.json"  # of a report: the study and all of its trials


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
        study = described_study(content["study"])
        if source.name == STUDY:
            outcomes = list(_known(study, _from_trials(output)))
        else:
            outcomes = [_from_report(output, trial) for trial in content["trials"]]
    except InputError as error:
        raise InputError(f"{source}: {error}") from None
    except (KeyError, TypeError) as error:
        raise InputError(f"{source}: it is no file of a study ({type(error).__name__}: {error})") from None
    return study, outcomes, content["command"]


def _from_trials(output: Path) -> Iterator[Outcome]:
    for path in sorted((output / "trials").rglob(RECORD)):
        specification = read_json(path.with_name(SPECIFICATION), "opts", list)
        if specification is not None:
            outcome = read_outcome(output, Trial.from_specification(specification))
            if outcome.results is not None:
                yield outcome


def _known(study: Study, outcomes: Iterator[Outcome]) -> Iterator[Outcome]:
    """Without trials that the study does not ask for any more, such as those at a rate chosen earlier."""
    checkpoints = {(arm.name, one.name) for arm in study.arms for one in arm.checkpoints}
    targets = {target.name for target in study.targets}
    found = [
        outcome
        for outcome in outcomes
        if (outcome.trial.arm, outcome.trial.checkpoint) in checkpoints and outcome.trial.target in targets
    ]
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


def _from_report(output: Path, content: dict[str, Any]) -> Outcome:
    trial = Trial.from_specification(content)
    folder = Path(content["folder"])
    if not folder.is_dir():
        folder = output / "trials" / trial.name
    return Outcome(trial, folder, content["results"], content["robustness"], content["error"])
