"""The tables of a study, made once and printed as HTML, Markdown, LaTeX and plain text."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from tabulate import tabulate

from rt_detectron.study.measurements import (
    ATTACK,
    CLEAN,
    CORRUPTION,
    MEAN_ATTACK,
    MPC,
    NOISE,
    RPC,
    TASKS,
    UNATTACKED,
    UNCORRUPTED,
    Quantity,
)
from rt_detectron.study.statistics import Change, Row, Summary

_MINUS, _NONE = "\N{MINUS SIGN}", "\N{EN DASH}"
_LATEX = {"±": r"$\pm$", "Δ": r"$\Delta$", _MINUS: "$-$", _NONE: "--"}
SIZES = {"small": "APs", "medium": "APm", "large": "APl"}  # of objects, by their area


@dataclass(frozen=True)
class Cell:
    """One quantity of one arm: its score, its change to the baseline, and what else belongs there."""

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
    """The cells of one arm, or of several that ``arm`` says; ``seeds`` is None where it has no one number."""

    target: str
    arm: str
    is_baseline: bool
    seeds: int | None
    cells: list[Cell]


@dataclass(frozen=True)
class Table:
    """A table with a column per quantity. ``kind`` is the chapter that it belongs to."""

    kind: str
    title: str
    columns: list[str]
    lines: list[Line]


def make_tables(rows: Sequence[Row]) -> list[Table]:
    """All tables that have a number in them."""
    tasks = [task for task in TASKS if any(q.task == task for row in rows for q in row.scores)]
    tables = [_clean(rows, task) for task in tasks]
    tables += [table for task in tasks for table in _attacks(rows, task)]
    tables += [_corruption(rows, task) for task in tasks]
    return [table for table in tables if table.columns]


def _clean(rows: Sequence[Row], task: str) -> Table:
    names = {"accuracy": "accuracy", "top-1": "top1", "mean per class": "mean_per_class"}
    if task != "accuracy":
        names = {"AP": "AP", "AP50": "AP50", "AP75": "AP75", **SIZES}
    columns = {name: Quantity(CLEAN, task, metric) for name, metric in names.items()}
    return _table(rows, CLEAN, _title(task), columns)


def attack_conditions(rows: Iterable[Row], task: str) -> dict[str, list[float]]:
    """Condition ("l2, all") -> its eps, ascending, of what any row has measured."""
    found: dict[str, set[float]] = {}
    for quantity in (quantity for row in rows for quantity in row.scores):
        if (quantity.kind, quantity.task, quantity.metric) == (ATTACK, task, "AP"):
            found.setdefault(quantity.condition, set()).add(quantity.level)
    return {condition: sorted(levels) for condition, levels in found.items()}


def condition_name(condition: str) -> str:
    """``L2 attack``; with what it attacks, where that is not the detector's whole loss."""
    norm, loss = condition.split(", ")
    if loss == "vanishing":
        return f"{norm.capitalize()} vanishing attack"
    return f"{norm.capitalize()} attack" + ("" if loss == "all" else f" on {loss}")


def _title(task: str) -> str:
    return TASKS[task][0].upper() + TASKS[task][1:]


def quantity_name(quantity: Quantity) -> str:
    """``box AP``, ``box AP, attacked`` or ``box mPC``."""
    spoken = TASKS[quantity.task]
    names = {MEAN_ATTACK: f"{spoken}, attacked", MPC: spoken.replace("AP", "mPC")}
    return names.get(quantity.kind, spoken)


def _attacks(rows: Sequence[Row], task: str) -> list[Table]:
    name = f"{_title(task)} under"
    mean = {"mean of all attacks": Quantity(MEAN_ATTACK, task)}
    tables = []
    conditions = attack_conditions(rows, task)
    for condition, levels in conditions.items():
        columns = {"no attack": Quantity(UNATTACKED, task, "AP", condition, levels[0])}
        columns.update({f"eps {e:g}": Quantity(ATTACK, task, "AP", condition, e) for e in levels})
        if len(conditions) == 1 and len(levels) > 1:
            columns.update(mean)
        tables.append(_table(rows, ATTACK, f"{name} {condition_name(condition)}", columns))
    if len(conditions) > 1:
        tables.insert(0, _table(rows, ATTACK, f"{name} attack", mean))
    return tables


def _corruption(rows: Sequence[Row], task: str) -> Table:
    columns = {
        "no corruption": Quantity(UNCORRUPTED, task),
        "mPC": Quantity(MPC, task),
        "rPC, %": Quantity(RPC, task),
    }
    names = dict.fromkeys(q.condition for row in rows for q in row.scores if q.kind == CORRUPTION)
    columns.update({name.replace("_", " "): Quantity(CORRUPTION, task, "AP", name) for name in names})
    return _table(rows, CORRUPTION, f"{_title(task)} under corruption", columns)


def _table(rows: Sequence[Row], kind: str, title: str, columns: dict[str, Quantity]) -> Table:
    columns = {
        name: quantity for name, quantity in columns.items() if any(quantity in row.scores for row in rows)
    }
    lines = [
        Line(
            row.target,
            row.arm,
            row.is_baseline,
            len(row.seeds),
            [_cell(row, quantity) for quantity in columns.values()],
        )
        for row in rows
        if any(quantity in row.scores for quantity in columns.values())
    ]
    return Table(kind, title, list(columns), lines)


def _cell(row: Row, quantity: Quantity) -> Cell:
    if quantity not in row.scores:
        return Cell(_NONE)
    noise = row.scores.get(Quantity(NOISE, quantity.task, "AP", quantity.condition, quantity.level))
    score, change = row.scores[quantity], row.changes.get(quantity)
    return Cell(
        score=format_summary(score) + _count(score, row),
        change=format_change(change) + _count(change.differences, row) if change else "",
        verdict=change.verdict if change else "",
        extra=f"noise {noise.mean:.2f}" if quantity.kind == ATTACK and noise else "",
    )


def _count(summary: Summary, row: Row) -> str:
    return "" if summary.n == len(row.seeds) else f" (n = {summary.n})"


def format_summary(summary: Summary) -> str:
    """``21.25 ± 1.06``; the mean alone for a single value."""
    return f"{summary.mean:.2f}" + ("" if summary.sd is None else f" ± {summary.sd:.2f}")


def format_change(change: Change) -> str:
    """``+1.50 [+0.20, +2.80]``; the difference alone where it has no interval."""
    text = format_number(change.differences.mean)
    if change.interval:
        text += f" [{format_number(change.interval.low)}, {format_number(change.interval.high)}]"
    return text


def format_number(number: float) -> str:
    """``+1.50``, with a minus sign that is one."""
    return f"{number:+.2f}".replace("-", _MINUS)


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


def _plain(table: Table) -> tuple[list[list[str]], list[str]]:
    rows = [
        [
            line.target,
            line.arm + (" (baseline)" if line.is_baseline else ""),
            _NONE if line.seeds is None else line.seeds,
            *map(str, line.cells),
        ]
        for line in table.lines
    ]
    return rows, ["target", "arm", "seeds", *table.columns]


def terminal_table(rows: Sequence[Row]) -> str:
    """Each task's main number, its mean under attack and mPC, as plain text with change and verdict."""
    lines = []
    quantities = [Quantity(kind, task) for task in TASKS for kind in (CLEAN, MEAN_ATTACK, MPC)]
    for quantity in quantities:
        name = quantity_name(quantity)
        for row in rows:
            if quantity in row.scores:
                cell = _cell(row, quantity)
                start = [name, row.target, row.arm, f"{row.learning_rate:g}", len(row.seeds)]
                lines.append([*start, cell.score, cell.change, cell.verdict])
    headers = ["", "target", "arm", "lr", "seeds", "score", "to its baseline", "verdict"]
    return tabulate(lines, headers, disable_numparse=True)
