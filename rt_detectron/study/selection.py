"""The learning rate of each arm and target, chosen by the score on a held-out part of the training set."""

from collections.abc import Iterable
from dataclasses import dataclass
from statistics import fmean

from rt_detectron.study.grid import SELECTION, Study
from rt_detectron.study.kinds import KINDS, Kind
from rt_detectron.study.record import Outcome


@dataclass(frozen=True)
class Choice:
    """One arm's and target's learning rate.

    Attributes:
        learning_rate: the best; None if there is none, for the reason in ``error``.
        scores: learning rate -> mean score over the selection's seeds, in percent; None where undefined.
        at_border: the best rate is the grid's smallest or largest, so a better one may lie outside.
    """

    arm: str
    target: str
    learning_rate: float | None
    scores: dict[float, float | None]
    at_border: bool
    error: str | None = None


def choose(study: Study, outcomes: Iterable[Outcome]) -> list[Choice]:
    """The choices whose selection trials are all among ``outcomes``; none if the study has no selection.

    Of equally good rates the smallest is taken.
    """
    if study.selection is None:
        return []
    groups: dict[tuple[str, str], list[Outcome]] = {}
    for outcome in outcomes:
        if outcome.trial.stage == SELECTION:
            groups.setdefault((outcome.trial.arm, outcome.trial.target), []).append(outcome)
    wanted = len(study.learning_rates) * len(study.selection.seeds)
    kind = KINDS[study.kind]
    return [
        _choice(kind, arm, target, group) for (arm, target), group in groups.items() if len(group) == wanted
    ]


def _choice(kind: Kind, arm: str, target: str, outcomes: list[Outcome]) -> Choice:
    # A crash is no score: leaving its rate out would give this arm a smaller grid than the others.
    failed = [outcome.trial.name for outcome in outcomes if outcome.error or outcome.results is None]
    scores: dict[float, float | None] = {}
    for rate in sorted({outcome.trial.learning_rate for outcome in outcomes}):
        values = [
            kind.score(outcome.results)
            for outcome in outcomes
            if outcome.trial.learning_rate == rate and outcome.results
        ]
        scores[rate] = None if None in values or not values else fmean(values)
    defined = {rate: score for rate, score in scores.items() if score is not None}
    if failed or not defined:
        undefined = f"{kind.measure} on the held-out images is undefined"
        why = f"{', '.join(failed)} failed" if failed else undefined
        return Choice(arm, target, None, scores, False, f"no learning rate for {arm} on {target}: {why}")
    best = max(defined, key=defined.__getitem__)  # the first, so the smallest, of equals
    return Choice(arm, target, best, scores, best in (min(scores), max(scores)))
