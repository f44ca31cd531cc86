"""What a study's rows say in words: the answer, and what it does not cover."""

from collections.abc import Sequence
from dataclasses import dataclass

from rt_detectron.study.measurements import ATTACK, CLEAN, MEAN_ATTACK, MPC, TASKS, Quantity
from rt_detectron.study.selection import Choice
from rt_detectron.study.statistics import IMAGES, SEEDS, Row
from rt_detectron.study.tables import format_change, quantity_name

VERDICTS = ("better", "worse", "undecided")
_FEW_SEEDS = 5


@dataclass(frozen=True)
class Answer:
    """One question's answer.

    Attributes:
        verdict: one of VERDICTS, or "mixed" where the comparisons differ.
        summary: the one comparison in words, or how many there are of each verdict.
        listed: of several comparisons, verdict -> those that have it, each with its difference.
    """

    question: str
    quantity: Quantity
    verdict: str
    summary: str
    listed: dict[str, list[str]]


def answers(rows: Sequence[Row]) -> list[Answer]:
    """Whether arms are better than their baseline on clean, attacked and corrupted images, where measured."""
    task = main_task(rows)
    attacks = {
        (q.condition, q.level) for row in rows for q in row.scores if (q.kind, q.task) == (ATTACK, task)
    }
    mean = "" if len(attacks) == 1 else f" (mean of {len(attacks)} attacks)"
    questions = {
        "On clean images": (Quantity(CLEAN, task), TASKS[task]),
        "Under attack": (Quantity(MEAN_ATTACK, task), f"{TASKS[task]}{mean}"),
        "Under corruption": (Quantity(MPC, task), quantity_name(Quantity(MPC, task))),
    }
    return [
        _answer(question, compared, quantity, name)
        for question, (quantity, name) in questions.items()
        if (compared := [row for row in rows if quantity in row.changes])
    ]


def main_task(rows: Sequence[Row]) -> str:
    """Boxes where there are any."""
    return next((t for t in TASKS if any(Quantity(CLEAN, t) in row.scores for row in rows)), "bbox")


def _answer(question: str, rows: Sequence[Row], quantity: Quantity, name: str) -> Answer:
    several = len({row.target for row in rows}) > 1
    by_verdict = {
        verdict: [row for row in rows if row.changes[quantity].verdict == verdict] for verdict in VERDICTS
    }
    by_verdict = {verdict: those for verdict, those in by_verdict.items() if those}
    verdict = next(iter(by_verdict)) if len(by_verdict) == 1 else "mixed"
    if len(rows) == 1:
        return Answer(question, quantity, verdict, _sentence(rows[0], quantity, name), {})
    counts = ", ".join(f"{len(those)} {verdict}" for verdict, those in by_verdict.items())
    counts = counts.replace(" ", f" of {len(rows)} comparisons ", 1)
    listed = {
        verdict: [
            f"{row.arm}{f' ({row.target})' if several else ''} "
            + format_change(row.changes[quantity]).replace(" ", "\N{NO-BREAK SPACE}")
            for row in those
        ]
        for verdict, those in by_verdict.items()
    }
    summary = f"{name[0].upper()}{name[1:]}: {counts}."
    return Answer(question, quantity, verdict, summary, listed)


def _sentence(row: Row, quantity: Quantity, name: str) -> str:
    change = row.changes[quantity]
    claim = {
        "better": f"{row.arm} is better than {row.baseline}",
        "worse": f"{row.arm} is worse than {row.baseline}",
        "undecided": f"Whether {row.arm} differs from {row.baseline} is undecided",
    }[change.verdict]
    return f"{claim}: {name} {format_change(change)}."


def cautions(rows: Sequence[Row], choices: Sequence[Choice]) -> list[str]:
    """What the intervals cover and what they do not."""
    compared = [change for row in rows for q, change in row.changes.items() if q.kind == CLEAN]
    if not compared:
        return ["No arm can be compared with its baseline yet: they share no finished seed."]
    texts = []
    over = {change.interval.over for change in compared if change.interval}
    fewest = min(change.differences.n for change in compared)
    if SEEDS in over:
        texts.append(
            "Intervals are Student's t over differences paired by seed. They cover what the seed changes, "
            "not the choice of test images."
        )
        if fewest < _FEW_SEEDS:
            texts.append(f"From {max(fewest, 2)} seeds they are wide: undecided does not mean equal.")
    if IMAGES in over:
        texts.append(
            "With a single seed, intervals come from resampling the test images, the same for both arms. "
            "They cover the choice of images only: another seed may change the result by more."
        )
    if fewest == 1 and IMAGES not in over:
        texts.append("A single seed shows no spread: its difference cannot be told from chance.")
    intervals = [
        row.changes[answer.quantity].interval
        for answer in answers(rows)
        for row in rows
        if answer.quantity in row.changes
    ]
    count = sum(interval is not None for interval in intervals)
    if count > 1:
        texts.append(
            f"These answers rest on {count} intervals, each wrong in 5 % of cases and not corrected for "
            f"their number: even if no arm differed, about {0.05 * count:.1f} would leave out 0 by chance."
        )
    at_border = [f"{choice.arm} ({choice.target})" for choice in choices if choice.at_border]
    if at_border:
        texts.append(
            "The best learning rate lies at the border of the grid, so a better one may lie outside, for "
            f"{', '.join(at_border)}."
        )
    texts += sorted({f"{row.arm}, {row.target}: {row.note}." for row in rows if row.note})
    return texts
