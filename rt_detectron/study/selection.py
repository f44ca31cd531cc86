"""The learning rate of each arm and detector, chosen by AP on a held-out part of the training set."""

from collections.abc import Iterable
from dataclasses import dataclass
from statistics import fmean

from rt_detectron.study.grid import SELECTION, Study
from rt_detectron.study.record import Outcome
from rt_detectron.study.steps import selection_score


@dataclass(frozen=True)
class Choice:
    """One arm's and detector's learning rate.

    Attributes:
        learning_rate: the best; None if there is none, for the reason in ``error``.
        scores: learning rate -> mean AP over the selection's seeds, in percent; None where it is undefined.
        at_border: the best rate is the grid's smallest or largest, so a better one may lie outside.
    """

    arm: str
    detector: str
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
            groups.setdefault((outcome.trial.arm, outcome.trial.detector), []).append(outcome)
    wanted = len(study.learning_rates) * len(study.selection.seeds)
    return [
        _choice(arm, detector, group) for (arm, detector), group in groups.items() if len(group) == wanted
    ]


def _choice(arm: str, detector: str, outcomes: list[Outcome]) -> Choice:
    # A crash is no score: leaving its rate out would give this arm a smaller grid than the others.
    failed = [outcome.trial.name for outcome in outcomes if outcome.error or outcome.results is None]
    scores: dict[float, float | None] = {}
    for rate in sorted({outcome.trial.learning_rate for outcome in outcomes}):
        values = [
            selection_score(outcome.results)
            for outcome in outcomes
            if outcome.trial.learning_rate == rate and outcome.results
        ]
        scores[rate] = None if None in values or not values else fmean(values)
    defined = {rate: score for rate, score in scores.items() if score is not None}
    if failed or not defined:
        why = f"{', '.join(failed)} failed" if failed else "AP on the held-out images is undefined"
        return Choice(arm, detector, None, scores, False, f"no learning rate for {arm} on {detector}: {why}")
    best = max(defined, key=defined.__getitem__)  # the first, so the smallest, of equals
    return Choice(arm, detector, best, scores, best in (min(scores), max(scores)))
