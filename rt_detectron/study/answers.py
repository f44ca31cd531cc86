"""The answers of a study in words, and what their intervals do not cover."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from rt_detectron.study.evaluations import EVALUATIONS
from rt_detectron.study.selection import Choice
from rt_detectron.study.statistics import (
    CLEAN,
    IMAGES,
    SEEDS,
    TASKS,
    Comparison,
    lines_of,
    main_metric,
    select,
)
from rt_detectron.study.tables import format_change

VERDICTS = ("better", "worse", "undecided")
_FEW_SEEDS = 5


@dataclass(frozen=True, eq=False)
class Answer:
    """The answer to one question.

    Attributes:
        lines: the lines of the comparison's scores that it rests on.
        verdict: one of VERDICTS, or "mixed" if the comparisons differ.
        summary: a sentence on the only comparison, or the number of comparisons with each verdict.
        listed: verdict -> the comparisons that have it, with their differences; empty for a single one.
    """

    question: str
    lines: pd.DataFrame
    verdict: str
    summary: str
    listed: dict[str, list[str]]


def answers(scores: pd.DataFrame) -> list[Answer]:
    """For each evaluation that was run: are the arms better than their baselines?"""
    task = main_task(scores)
    found = []
    for evaluation in EVALUATIONS:
        lines = evaluation.main_lines(scores, task)
        lines = lines[lines["change"].notna()]
        if len(lines):
            found.append(_answer(evaluation.question, lines, evaluation.measure(scores, task)))
    return found


def main_task(scores: pd.DataFrame) -> str:
    """The first of TASKS that was measured."""
    clean = select(scores, kind=CLEAN)
    measured = set(clean["task"][clean["metric"] == clean["task"].map(main_metric)])
    return next((task for task in TASKS if task in measured), "bbox")


def _answer(question: str, lines: pd.DataFrame, measure: str) -> Answer:
    by_verdict = {verdict: select(lines, verdict=verdict) for verdict in VERDICTS}
    by_verdict = {verdict: group for verdict, group in by_verdict.items() if len(group)}
    verdict = next(iter(by_verdict)) if len(by_verdict) == 1 else "mixed"
    if len(lines) == 1:
        return Answer(question, lines, verdict, _sentence(next(lines_of(lines)), measure), {})
    counts = ", ".join(f"{len(group)} {verdict}" for verdict, group in by_verdict.items())
    counts = counts.replace(" ", f" of {len(lines)} comparisons ", 1)
    several = lines["target"].nunique() > 1
    listed = {
        verdict: [
            f"{line.arm}{f' ({line.target})' if several else ''} "
            + format_change(line).replace(" ", "\N{NO-BREAK SPACE}")
            for line in lines_of(group)
        ]
        for verdict, group in by_verdict.items()
    }
    return Answer(question, lines, verdict, f"{measure[0].upper()}{measure[1:]}: {counts}.", listed)


def _sentence(line: Any, measure: str) -> str:
    claim = {
        "better": f"{line.arm} is better than {line.baseline}",
        "worse": f"{line.arm} is worse than {line.baseline}",
        "undecided": f"Whether {line.arm} differs from {line.baseline} is undecided",
    }[line.verdict]
    return f"{claim}: {measure} {format_change(line)}."


def cautions(comparison: Comparison, choices: Sequence[Choice]) -> list[str]:
    """What the intervals cover and what they do not."""
    scores = comparison.scores
    compared = select(scores, kind=CLEAN)
    compared = compared[compared["change"].notna()]
    if compared.empty:
        return ["No arm can be compared with its baseline yet: they have no finished seed in common."]
    texts = []
    over, fewest = set(compared["over"]), int(compared["change_n"].min())
    if SEEDS in over:
        texts.append(
            "Intervals are Student's t over differences paired by seed. They cover what the seed changes, "
            "not the choice of test images."
        )
        if fewest < _FEW_SEEDS:
            texts.append(f"With {max(fewest, 2)} seeds they are wide: undecided does not mean equal.")
    if IMAGES in over:
        texts.append(
            "With a single seed, intervals come from resampling the test images, the same for both arms. "
            "They only cover the choice of images: another seed may change the result by more."
        )
    if fewest == 1 and IMAGES not in over:
        texts.append("With a single seed there is no spread, so a difference may be due to chance.")
    count = sum(int((answer.lines["over"] != "").sum()) for answer in answers(scores))
    if count > 1:
        texts.append(
            f"These answers rest on {count} intervals. Each misses the true difference in 5 % of cases, and "
            f"they are not corrected for their number: even if no arm differed from its baseline, about "
            f"{0.05 * count:.1f} of them would exclude 0 by chance."
        )
    at_border = [f"{choice.arm} ({choice.target})" for choice in choices if choice.at_border]
    if at_border:
        texts.append(
            "The best learning rate is at the border of the grid for "
            f"{', '.join(at_border)}: a better one may lie outside."
        )
    return texts + sorted(comparison.notes)
