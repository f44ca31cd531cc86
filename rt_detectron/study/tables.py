"""Tables of a study: made once, printed as HTML (by the report), Markdown, LaTeX and plain text."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
from tabulate import tabulate

from rt_detectron.study.statistics import lines_of

_MINUS, NONE = "\N{MINUS SIGN}", "\N{EN DASH}"
_LATEX = {"±": r"$\pm$", "Δ": r"$\Delta$", _MINUS: "$-$", NONE: "--"}


@dataclass(frozen=True)
class Cell:
    """One quantity of one arm: its score, its change to the baseline, and anything else to show with it."""

    score: str
    change: str = ""
    verdict: str = ""
    extra: str = ""

    def __str__(self) -> str:
        return "; ".join(
            part for part in (self.score, self.change and f"Δ {self.change}", self.extra) if part
        )


@dataclass(frozen=True)
class Line:
    """The cells of one arm with its number of runs; or of several arms that ``arm`` describes, with None."""

    target: str
    arm: str
    is_baseline: bool
    runs: int | None
    cells: list[Cell]


@dataclass(frozen=True)
class Table:
    """A table with a column per quantity."""

    title: str
    columns: list[str]
    lines: list[Line]


def score_table(title: str, columns: Mapping[str, pd.DataFrame]) -> list[Table]:
    """The table with these columns; none if all of them are empty.

    Args:
        columns: heading -> lines of a comparison's scores, one for each target and arm. A column ``extra``
            in them is shown below the score.
    """
    columns = {heading: lines for heading, lines in columns.items() if len(lines)}
    if not columns:
        return []
    cells = {
        (heading, line.target, line.arm): score_cell(line)
        for heading, lines in columns.items()
        for line in lines_of(lines)
    }
    arms = pd.concat(columns.values()).sort_index().drop_duplicates(["target", "arm"])
    lines = [
        Line(
            arm.target,
            arm.arm,
            arm.arm == arm.baseline,
            arm.n,
            [cells.get((heading, arm.target, arm.arm), Cell(NONE)) for heading in columns],
        )
        for arm in lines_of(arms)
    ]
    return [Table(title, list(columns), lines)]


def score_cell(line: Any) -> Cell:
    """The cell of a line of a comparison's scores."""
    return Cell(
        score=format_score(line.mean, line.sd),
        change=format_change(line) if line.verdict else "",
        verdict=line.verdict,
        extra=getattr(line, "extra", ""),
    )


def counted(number: int, noun: str) -> str:
    """``1 image``, ``1,200 images``."""
    return f"{number:,} {noun}{'s' * (number != 1)}"


def format_score(mean: float, sd: float) -> str:
    """``21.25 ± 1.06``; only the mean if there is no spread."""
    return f"{mean:.2f}" + ("" if math.isnan(sd) else f" ± {sd:.2f}")


def format_change(line: Any) -> str:
    """``+1.50 [+0.20, +2.80]`` of a line of a comparison's scores; without an interval, ``+1.50``."""
    return format_number(line.change) + (format_interval(line.low, line.high) if line.over else "")


def format_interval(low: float, high: float) -> str:
    return f" [{format_number(low)}, {format_number(high)}]"


def format_number(number: float) -> str:
    """``+1.50``, with a typographic minus sign; 0.00 has no sign."""
    text = f"{number:+.2f}".replace("-", _MINUS)
    return text[1:] if text[1:] == "0.00" else text


def markdown(tables: Sequence[Table], note: str) -> str:
    parts = [note]
    for table in tables:
        parts += [f"**{table.title}**", tabulate(*_plain(table), tablefmt="pipe", disable_numparse=True)]
    return "\n\n".join(parts) + "\n"


def latex(tables: Sequence[Table], note: str) -> str:
    """For ``\\input`` in a document that uses booktabs."""
    parts = [f"% {note}"]
    for table in tables:
        text = tabulate(*_plain(table), tablefmt="latex_booktabs", disable_numparse=True)
        for sign, command in _LATEX.items():
            text = text.replace(sign, command)
        parts.append(f"% {table.title}\n{text}")
    return "\n\n".join(parts) + "\n"


def _plain(table: Table) -> tuple[list[list[Any]], list[str]]:
    rows = [
        [
            line.target,
            line.arm + (" (baseline)" if line.is_baseline else ""),
            NONE if line.runs is None else line.runs,
            *map(str, line.cells),
        ]
        for line in table.lines
    ]
    return rows, ["target", "arm", "runs", *table.columns]
