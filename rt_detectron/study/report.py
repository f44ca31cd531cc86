"""The report of a study: a self-contained report.html, and its numbers and tables as files beside it."""

import base64
import csv
import io
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jinja2

from rt_detectron.study import analyses
from rt_detectron.study.answers import answers, cautions, main_task
from rt_detectron.study.examples import SCORE_THRESHOLD, attacked, best_and_worst
from rt_detectron.study.figures import Figure, Figures
from rt_detectron.study.grid import Study
from rt_detectron.study.measurements import ATTACK, CLEAN, CORRUPTION, TASKS, Quantity, measurements
from rt_detectron.study.record import Outcome, write_atomically
from rt_detectron.study.selection import choose
from rt_detectron.study.statistics import Row
from rt_detectron.study.table import study_table
from rt_detectron.study.tables import latex, make_tables, markdown, terminal_table
from rt_detectron.utils.files import replaced_atomically, write_json

__all__ = ["study_table", "terminal_table", "write_report"]

_TABLE_NOTE = "{} in percent, mean ± sample standard deviation over seeds."
_PLAIN_NOTE = " Δ: difference to the baseline, paired by seed, with its 95 % interval."
_CHAPTERS = {
    CLEAN: "Clean images",
    ATTACK: "Under attack",
    CORRUPTION: "Under corruption",
    analyses.ANALYSIS: "Across arms",
}
_SUFFIXES = {"image/svg+xml": "svg", "image/jpeg": "jpg"}


def write_report(study: Study, outcomes: Sequence[Outcome], output: Path, command: str) -> Path:
    """Write the report into ``output`` from what the trials left; gives the path of report.html.

    Beside it: results.json (all trials and the table), results.csv (one line per trial and number),
    tables.md, tables.tex, and figures/ (those of the page, as files).

    Args:
        outcomes: of all stages; trials that are missing are named in the report.
        command: the line that makes the study again, or what is missing of it, as shown in the report.
    """
    kind = study.downstream
    note = _TABLE_NOTE.format(kind.measure[0].upper() + kind.measure[1:])
    rows = study_table(study, outcomes)
    choices = choose(study, outcomes)
    task = main_task(rows)
    best = analyses.best_eps(study, rows, analyses.scores_by_seed(outcomes), task)
    fits = analyses.fits(study, rows, task)
    tables = make_tables(rows) + analyses.make_tables(best, fits, task)
    trials = [_trial_record(outcome) for outcome in outcomes]
    found = answers(rows)
    plots = Figures(study, outcomes, rows)
    drawn = {
        CLEAN: plots.clean(),
        ATTACK: plots.attack(),
        analyses.ANALYSIS: plots.fits(fits, task),
    }
    chapters = [
        {
            "title": title,
            "tables": [table for table in tables if table.kind == kind],
            "figures": drawn.get(kind, []),
            "details": plots.details() if kind == CLEAN else [],
        }
        for kind, title in _CHAPTERS.items()
    ]
    examples, example_notes = best_and_worst(rows, outcomes)
    pictures, picture_notes = attacked(outcomes)
    page = {
        "study": study,
        "command": command,
        "families": plots.families,
        "trials": trials,
        "missing": study.count_trials() - sum(outcome.error is None for outcome in outcomes),
        "wanted": study.count_trials(),
        "answers": [(answer, plots.answer(answer)) for answer in found],
        "cautions": cautions(rows, choices),
        "choices": choices,
        "kind": kind,
        "table_note": note,
        "chapters": [chapter for chapter in chapters if chapter["tables"]],
        "attacks": _attack_settings(outcomes),
        "examples": examples,
        "pictures": pictures,
        "picture_notes": example_notes + picture_notes,
        "curves": plots.curves(),
        "score_threshold": SCORE_THRESHOLD,
        "versions": _versions(outcomes),
        "options": dict.fromkeys(" ".join(outcome.trial.opts) or "none" for outcome in outcomes),
        "uri": _data_uri,
    }
    content = {
        "study": study.description(),
        "command": command,
        "trials": trials,
        "table": _records(rows),
        "best_eps": [
            {
                "target": entry.row.target,
                "arm": entry.row.arm,
                "eps": entry.eps,
                "candidates": entry.candidates,
            }
            for entry in best
        ],
        "fits": [asdict(fit) for fit in fits],
    }
    write_json(output / "results.json", _without_nan(content))
    write_atomically(output / "results.csv", _csv(outcomes))
    write_atomically(output / "tables.md", markdown(tables, note + _PLAIN_NOTE))
    write_atomically(output / "tables.tex", latex(tables, note + _PLAIN_NOTE))
    _write_figures(output / "figures", page)
    write_atomically(output / "report.html", _template().render(page))
    return output / "report.html"


def _write_figures(folder: Path, page: dict[str, Any]) -> None:
    folder.mkdir(exist_ok=True)
    figures: list[Figure] = [figure for _, figure in page["answers"]]
    figures += [figure for chapter in page["chapters"] for figure in chapter["figures"] + chapter["details"]]
    for figure in figures + page["examples"] + page["pictures"] + page["curves"]:
        with replaced_atomically(folder / f"{figure.name}.{_SUFFIXES[figure.kind]}") as temporary:
            Path(temporary).write_bytes(figure.content)


def _trial_record(outcome: Outcome) -> dict[str, Any]:
    status = "finished"
    if outcome.error or outcome.results is None:
        status = "missing"
    elif not any(measurements(outcome).get(Quantity(CLEAN, task)) is not None for task in TASKS):
        status = "without AP"
    return {
        **outcome.trial.specification(),
        "name": outcome.trial.name,
        "folder": str(outcome.folder),
        "status": status,
        "error": outcome.error,
        "results": outcome.results,
        "robustness": outcome.robustness,
    }


def _records(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """One entry per arm, target and quantity; categories are in results.csv only."""
    records = []
    for row in rows:
        for quantity, score in row.scores.items():
            if quantity.category is not None:
                continue
            change = row.changes.get(quantity)
            records.append(
                {
                    "arm": row.arm,
                    "target": row.target,
                    "baseline": row.baseline,
                    "learning_rate": row.learning_rate,
                    "seeds": row.seeds,
                    **asdict(quantity),
                    **asdict(score),
                    "change": {**asdict(change), "verdict": change.verdict} if change else None,
                }
            )
    return records


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _csv(outcomes: Sequence[Outcome]) -> str:
    """One line per trial and number; an undefined value is empty."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    trial_columns = ["stage", "arm", "target", "learning_rate", "seed"]
    writer.writerow([*trial_columns, "kind", "task", "metric", "condition", "level", "value"])
    for outcome in outcomes:
        trial = [getattr(outcome.trial, column) for column in trial_columns]
        for quantity, value in measurements(outcome).items():
            writer.writerow([*trial, *asdict(quantity).values(), value])  # None is written as nothing
    return stream.getvalue()


def _attack_settings(outcomes: Sequence[Outcome]) -> str:
    """How the attacks were run, of the first trial that has some."""
    for outcome in outcomes:
        for attack in (outcome.robustness or {}).get("attack") or []:
            restarts = "" if attack["restarts"] == 1 else f", {attack['restarts']} restarts"
            return f"PGD, {attack['steps']} steps{restarts}, on {attack['images']} images"
    return ""


def _versions(outcomes: Sequence[Outcome]) -> dict[str, str]:
    """Package versions; several values where trials ran with different ones."""
    found: dict[str, set[str]] = {}
    for outcome in outcomes:
        for package, version in (outcome.results or {}).get("versions", {}).items():
            found.setdefault(package, set()).add(str(version))
    return {package: ", ".join(sorted(versions)) for package, versions in found.items()}


def _data_uri(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _template() -> jinja2.Template:
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined)
    return environment.get_template("report.html.j2")
