"""The learning rate of each arm and target, chosen by its score on a held-out part of the training set."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from rt_detectron.study.grid import SELECTION, Study, Trial
from rt_detectron.study.record import Outcome, is_finished, read_outcome


@dataclass(frozen=True)
class Choice:
    """The chosen learning rate of one arm on one target.

    Attributes:
        learning_rate: the chosen one; None if there is none, see ``error``.
        scores: learning rate -> mean score over the selection's seeds, in percent; None if undefined.
        at_border: whether the best rate is the grid's smallest or largest. A better one may lie outside.
        common_rate: the rate that most arms of the target chose.
        tied: rates whose score is within a standard error of the best one's, the best among them.
    """

    arm: str
    target: str
    learning_rate: float | None
    scores: dict[float, float | None]
    at_border: bool
    error: str | None = None
    common_rate: float | None = None
    tied: tuple[float, ...] = ()


def choose(study: Study, outcomes: Iterable[Outcome]) -> list[Choice]:
    """Choose the learning rates of the targets whose selection trials are all among ``outcomes``.

    Rates within a standard error of an arm's best are tied. Of these an arm takes the one that is best for
    most arms of the target, and the smallest if there are several. Without a selection there are no choices.
    """
    if study.selection is None:
        return []
    groups: dict[str, dict[str, list[Outcome]]] = {}
    for outcome in outcomes:
        if outcome.trial.stage == SELECTION:
            groups.setdefault(outcome.trial.target, {}).setdefault(outcome.trial.arm, []).append(outcome)
    wanted = len(study.learning_rates) * len(study.selection.seeds)
    return [
        choice
        for target, by_arm in groups.items()
        if len(by_arm) == len(study.arms) and all(len(group) == wanted for group in by_arm.values())
        for choice in _choices(study, target, by_arm)
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


def _choices(study: Study, target: str, by_arm: Mapping[str, list[Outcome]]) -> list[Choice]:
    """The choices of one target."""
    task = study.downstream
    # If a trial crashed, no rate is chosen: leaving its rate out would give this arm a smaller grid.
    failed = {
        arm: [outcome.trial.name for outcome in group if outcome.error or outcome.results is None]
        for arm, group in by_arm.items()
    }
    values = {
        arm: _values(study, group) for arm, group in by_arm.items() if not failed[arm]
    }  # arm -> rate -> scores
    if not any(
        score is not None for by_rate in values.values() for of_rate in by_rate.values() for score in of_rate
    ):
        undefined = f"{task.measure} on the held-out images is undefined"
        errors = {arm: f"{', '.join(failed[arm])} failed" if failed[arm] else undefined for arm in by_arm}
        return [_no_choice(arm, target, why, values.get(arm, {})) for arm, why in errors.items()]
    # A detector that finds nothing has an undefined AP. That is an AP of 0.
    scores = {
        arm: {rate: fmean(score or 0.0 for score in of_rate) for rate, of_rate in by_rate.items()}
        for arm, by_rate in values.items()
    }
    best = {arm: max(by_rate, key=by_rate.__getitem__) for arm, by_rate in scores.items()}
    votes = Counter(best.values())
    common = max(sorted(votes), key=votes.__getitem__)
    error = _standard_error(values)
    choices = []
    for arm in by_arm:
        if failed[arm]:
            choices.append(_no_choice(arm, target, f"{', '.join(failed[arm])} failed", {}))
            continue
        by_rate = scores[arm]
        tied = tuple(rate for rate in by_rate if by_rate[rate] >= by_rate[best[arm]] - error)
        rate = max(tied, key=lambda rate: votes[rate])  # of equals the first, which is the smallest
        at_border = best[arm] in (min(by_rate), max(by_rate))
        choices.append(Choice(arm, target, rate, dict(by_rate), at_border, None, common, tied))
    return choices


def _values(study: Study, outcomes: list[Outcome]) -> dict[float, list[float | None]]:
    """Rate -> the score of each seed, by ascending rate."""
    values: dict[float, list[float | None]] = {rate: [] for rate in sorted(study.learning_rates)}
    for outcome in outcomes:
        values[outcome.trial.learning_rate].append(study.downstream.score(outcome.results or {}))
    return values


def _standard_error(values: Mapping[str, Mapping[float, list[float | None]]]) -> float:
    """Of the difference between two rates' mean scores, by the spread over seeds, pooled over arms and rates.

    0 with a single seed, which has no spread.
    """
    groups = [
        [score or 0.0 for score in of_rate] for by_rate in values.values() for of_rate in by_rate.values()
    ]
    seeds = len(groups[0])
    if seeds < 2:
        return 0.0
    variance = fmean(sum((x - fmean(group)) ** 2 for x in group) / (seeds - 1) for group in groups)
    return math.sqrt(2 * variance / seeds)


def _no_choice(arm: str, target: str, why: str, values: Mapping[float, list[float | None]]) -> Choice:
    scores = dict.fromkeys(values)
    return Choice(arm, target, None, scores, False, f"no learning rate for {arm} on {target}: {why}")
