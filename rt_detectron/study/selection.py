"""The learning rate of each arm and target, chosen by its score on a held-out part of the training set."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from rt_detectron.study.grid import SELECTION, DownstreamTask, Study, Trial
from rt_detectron.study.record import Outcome, is_finished, mean_if_defined, read_outcome


@dataclass(frozen=True)
class Choice:
    """The chosen learning rate of one arm on one target.

    Attributes:
        learning_rate: the best one; None if there is none, see ``error``.
        scores: learning rate -> mean score over the selection's seeds, in percent; None if undefined.
        at_border: whether the best rate is the grid's smallest or largest. A better one may lie outside.
    """

    arm: str
    target: str
    learning_rate: float | None
    scores: dict[float, float | None]
    at_border: bool
    error: str | None = None


def choose(study: Study, outcomes: Iterable[Outcome]) -> list[Choice]:
    """Choose the learning rates whose selection trials are all among ``outcomes``.

    Of equally good rates the smallest is chosen. Without a selection there are no choices.
    """
    if study.selection is None:
        return []
    groups: dict[tuple[str, str], list[Outcome]] = {}
    for outcome in outcomes:
        if outcome.trial.stage == SELECTION:
            groups.setdefault((outcome.trial.arm, outcome.trial.target), []).append(outcome)
    wanted = len(study.learning_rates) * len(study.selection.seeds)
    return [
        _choice(study.downstream, arm, target, group)
        for (arm, target), group in groups.items()
        if len(group) == wanted
    ]


def known_trials(study: Study, outcomes: Iterable[Outcome]) -> list[Trial]:
    """The selection trials, and the final trials whose learning rate ``outcomes`` decide."""
    rates = {
        (choice.arm, choice.target): choice.learning_rate
        for choice in choose(study, outcomes)
        if choice.learning_rate is not None
    }
    return study.selection_trials() + study.final_trials(rates)


def finished_outcomes(study: Study, output: Path) -> dict[str, Outcome]:
    """Trial name -> outcome, for the trials that earlier runs finished."""
    outcomes: dict[str, Outcome] = {}
    for _ in range(2):  # the selection's outcomes decide which final trials there are
        outcomes = {
            trial.name: read_outcome(output, trial)
            for trial in known_trials(study, outcomes.values())
            if is_finished(output, trial)
        }
    return outcomes


def _choice(task: DownstreamTask, arm: str, target: str, outcomes: list[Outcome]) -> Choice:
    # If a trial crashed, no rate is chosen: leaving its rate out would give this arm a smaller grid.
    failed = [outcome.trial.name for outcome in outcomes if outcome.error or outcome.results is None]
    scores: dict[float, float | None] = {}
    for rate in sorted({outcome.trial.learning_rate for outcome in outcomes}):
        scores[rate] = mean_if_defined(
            task.score(outcome.results)
            for outcome in outcomes
            if outcome.trial.learning_rate == rate and outcome.results
        )
    defined = {rate: score for rate, score in scores.items() if score is not None}
    if failed or not defined:
        undefined = f"{task.measure} on the held-out images is undefined"
        why = f"{', '.join(failed)} failed" if failed else undefined
        return Choice(arm, target, None, scores, False, f"no learning rate for {arm} on {target}: {why}")
    best = max(defined, key=defined.__getitem__)  # of equals the first, which is the smallest
    return Choice(arm, target, best, scores, best in (min(scores), max(scores)))
