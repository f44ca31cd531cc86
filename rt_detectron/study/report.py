"""The report of a study: a self-contained report.html, with its numbers and tables as files beside it."""

import base64
import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd
from tabulate import tabulate

from rt_detectron.study import analyses
from rt_detectron.study.answers import (
    Answer,
    answers,
    cautions,
    common_rate_changes,
    label,
    method,
    name_of,
    single_checkpoints,
)
from rt_detectron.study.evaluations import EVALUATIONS, Chapter, Errors
from rt_detectron.study.examples import SCORE_THRESHOLD, best_and_worst, precision_curves
from rt_detectron.study.figures import Charts, Figure
from rt_detectron.study.grid import FINAL, Study
from rt_detectron.study.record import RECORD, Outcome
from rt_detectron.study.saved import REPORTED, RESAMPLED, write_draws
from rt_detectron.study.selection import choose
from rt_detectron.study.statistics import (
    CLEAN,
    TASKS,
    Comparison,
    lines_of,
    main_metric,
    main_task,
    select,
    trial_key,
)
from rt_detectron.study.tables import counted, format_interval, format_number, latex, markdown, score_cell
from rt_detectron.study.worker import read_json
from rt_detectron.utils.files import replaced_atomically, write_json, write_text
from rt_detectron.utils.numbers import finite

_TABLE_NOTE = "{} in percent, mean ± sample standard deviation over runs."
_PLAIN_NOTE = " Δ: difference to the baseline with its 95 % interval."
_SUFFIXES = {"image/svg+xml": "svg", "image/jpeg": "jpg"}


def write_report(comparison: Comparison, output: Path, command: str) -> Path:
    """Write the report of a study into ``output``. Missing trials are named in it.

    Beside report.html this writes results.json (all trials) and resampled.npz, from which
    :func:`rt_detectron.study.saved.saved_study` makes the report again without the trials' files; results.csv
    (the tidy table), scores.csv (means, differences and intervals), tables.md, tables.tex, and figures/ (the
    figures of the page as files).

    Args:
        command: the line that makes the study, or what is missing of it, as shown in the report.

    Returns:
        The path of report.html.
    """
    study, outcomes, scores = comparison.study, comparison.outcomes, comparison.scores
    measure = study.downstream.measure
    note = _TABLE_NOTE.format(measure[0].upper() + measure[1:])
    choices = choose(study, outcomes)
    task = main_task(scores)
    best, fits = analyses.best_eps(comparison, task), analyses.fits(comparison, task)
    charts = Charts(study, scores)
    chapters = [evaluation.chapter(comparison, charts) for evaluation in EVALUATIONS]
    chapters = [chapter for chapter in chapters if chapter.tables]
    across = analyses.chapter(best, fits, task, charts)
    examples, picture_notes = best_and_worst(comparison)
    trials = _trials(comparison)
    found = answers(comparison, choices)
    curves = [*precision_curves(comparison, charts), *charts.curves(outcomes)]
    shown = [(answer, _answer_figure(answer, charts)) for answer in found]
    scatters = [figure for answer in found[1:] for figure in _scatters(answer, charts)]
    measures = {evaluation.main_kind: evaluation.measure(scores, task) for evaluation in EVALUATIONS}
    runs = [(measures[line.kind], line) for line in lines_of(select(scores, main=True))]
    page = {
        "study": study,
        "command": command,
        "baselines": list(charts.families),
        "trials": trials,
        "missing": study.count_trials() - sum(outcome.error is None for outcome in outcomes),
        "wanted": study.count_trials(),
        "answers": shown,
        "scatters": scatters,
        "single": single_checkpoints(study),
        "cautions": cautions(comparison, choices, found),
        "method": method(study, found),
        "label": partial(label, study=study),
        "name_of": partial(name_of, study),
        "choices": choices,
        "common_rates": common_rate_changes(study, choices),
        "table_note": note,
        "across": across,
        "targets": [_target(target.name, chapters, examples, curves, runs) for target in study.targets],
        "picture_notes": picture_notes + [text for chapter in chapters for text in chapter.notes],
        "cost": _cost(study, outcomes),
        "versions": _versions(outcomes),
        "options": dict.fromkeys(" ".join(outcome.trial.opts) or "none" for outcome in outcomes),
    }
    figures = [*(figure for _, figure in shown), *scatters, *examples, *curves]
    for chapter in (*chapters, across):
        figures += chapter.figures + chapter.details + chapter.pictures
    tables = [table for chapter in (*chapters, across) for table in chapter.tables]
    content = {
        "study": study.description(),
        "command": command,
        "trials": trials,
        "resampled_sha256": write_draws(output / RESAMPLED, comparison.draws),
        **_analyses(best, fits, found),
    }
    write_json(output / REPORTED, finite(content), indent=None)  # a third smaller: it may be published
    write_text(output / "results.csv", comparison.table.to_csv(index=False))
    write_text(output / "scores.csv", scores.drop(columns="values").to_csv(index=False))
    write_text(output / "tables.md", markdown(tables, note + _PLAIN_NOTE))
    write_text(output / "tables.tex", latex(tables, note + _PLAIN_NOTE))
    _write_figures(output / "figures", figures)
    write_text(output / "report.html", _template().render(page))
    return output / "report.html"


def terminal_table(scores: pd.DataFrame) -> str:
    """The main number of each task and evaluation as plain text, with change and verdict."""
    rows = []
    for task in TASKS:
        for evaluation in EVALUATIONS:
            lines = evaluation.main_lines(scores, task)
            for line in lines_of(lines):
                cell = score_cell(line)
                name = evaluation.measure(scores, task)
                start = [name, line.target, line.arm, f"{line.learning_rate:g}", line.n]
                rows.append([*start, cell.score, cell.change, cell.verdict])
    headers = ["", "target", "arm", "lr", "runs", "score", "to its baseline", "verdict"]
    return tabulate(rows, headers, disable_numparse=True)


def _answer_figure(answer: Answer, charts: Charts) -> Figure:
    covered = [over for over in dict.fromkeys(answer.lines["over"]) if over]
    over = f", over {covered[0]}" if len(covered) == 1 else ""
    caption = f"{answer.question}: difference to the baseline with its 95 % interval{over}."
    measure = answer.measure.split(" (")[0]
    return charts.differences(f"answer-{_file_name(answer)}", caption, measure, answer.lines, answer.pooled)


def _scatters(answer: Answer, charts: Charts) -> list[Figure]:
    first = answer.lines.iloc[0]
    lines = select(charts.scores, kind=answer.kind, task=first["task"], metric=first["metric"])
    caption = f"clean against {answer.measure}; a mark per arm, up and to the right is better."
    measure = answer.measure.split(" (")[0]
    return list(charts.clean_against(f"clean-{_file_name(answer)}", caption, lines, measure))


def _file_name(answer: Answer) -> str:
    return answer.kind.replace(": ", "-")


def _target(
    name: str,
    chapters: Sequence[Chapter],
    examples: Sequence[Figure],
    curves: Sequence[Figure],
    runs: Sequence[tuple[str, Any]],
) -> dict[str, Any]:
    """What the page shows of one target.

    Args:
        runs: (what it measures, line of the scores) of the main numbers of all targets.
    """

    def here(figures: Sequence[Figure]) -> list[Figure]:
        return [figure for figure in figures if figure.target == name]

    sections = []
    for chapter in chapters:
        tables = [
            replace(table, lines=[line for line in table.lines if line.target == name])
            for table in chapter.tables
        ]
        tables = [table for table in tables if table.lines]
        if tables:
            sections.append(
                {
                    "title": chapter.title,
                    "text": chapter.text,
                    "tables": tables,
                    "figures": here(chapter.figures),
                    "details": here(chapter.details),
                    "pictures": here(chapter.pictures),
                }
            )
    return {
        "name": name,
        "sections": sections,
        "examples": here(examples),
        "curves": here(curves),
        "runs": [(measure, line) for measure, line in runs if line.target == name],
    }


def _cost(study: Study, outcomes: Sequence[Outcome]) -> list[tuple[str, int, float]]:
    """(arm, its finished trials, their wall time in hours), the selection included."""
    found = []
    for arm in study.arms:
        of_arm = [o for o in outcomes if o.trial.arm == arm.name and o.results]
        hours = sum(_seconds(outcome) for outcome in of_arm) / 3600
        found.append((arm.name, len(of_arm), hours))
    return found


def _seconds(outcome: Outcome) -> float:
    if record := read_json(outcome.folder / RECORD, "results"):
        return record["wall_time_s"]
    parts = (outcome.results or {}, outcome.robustness or {})  # of a report that is made from results.json
    return sum(part.get("wall_time_s") or 0.0 for part in parts)


def _write_figures(folder: Path, figures: Sequence[Figure]) -> None:
    folder.mkdir(exist_ok=True)
    for figure in figures:
        with replaced_atomically(folder / f"{figure.name}.{_SUFFIXES[figure.media_type]}") as temporary:
            Path(temporary).write_bytes(figure.content)


def _analyses(
    best: Sequence[analyses.BestEps], fits: Sequence[analyses.Fit], found: Sequence[Answer]
) -> dict[str, list[dict[str, Any]]]:
    """The answers and the analyses across arms as results.json has them."""
    return {
        "best_eps": [
            {
                "target": entry.line.target,
                "arm": entry.line.arm,
                "eps": entry.eps,
                "candidates": entry.candidates,
            }
            for entry in best
        ],
        "fits": [asdict(fit) for fit in fits],
        "answers": [
            {
                "kind": answer.kind,
                "sentences": answer.sentences,
                "pooled": [asdict(one) for one in answer.pooled],
            }
            for answer in found
        ],
    }


def _trials(comparison: Comparison) -> list[dict[str, Any]]:
    """All trials as results.json and the page's last table have them."""
    table = select(comparison.table, kind=CLEAN)
    table = table[table["value"].notna() & (table["metric"] == table["task"].map(main_metric))]
    measured = set(map(trial_key, lines_of(table)))
    errors: dict[tuple, dict[str, dict[str, float]]] = {}
    for line in lines_of(select(comparison.table, kind=Errors.main_kind)):
        errors.setdefault(trial_key(line), {}).setdefault(line.task, {})[line.metric] = line.value
    records = []
    for outcome in comparison.outcomes:
        trial = outcome.trial
        status = "finished"
        if outcome.error or outcome.results is None:
            status = "missing"
        elif trial.stage == FINAL and trial_key(trial) not in measured:
            status = "without AP"
        records.append(
            {
                **trial.specification(),
                "name": trial.name,
                "folder": str(outcome.folder),
                "status": status,
                "error": outcome.error,
                "results": outcome.results,
                "robustness": outcome.robustness,
                "errors": errors.get(trial_key(trial)),
            }
        )
    return records


def _versions(outcomes: Sequence[Outcome]) -> dict[str, str]:
    """Package -> its versions in all trials."""
    found: dict[str, set[str]] = {}
    for outcome in outcomes:
        for package, version in (outcome.results or {}).get("versions", {}).items():
            found.setdefault(package, set()).add(str(version))
    return {package: ", ".join(sorted(versions)) for package, versions in found.items()}


def _data_uri(figure: Figure) -> str:
    return f"data:{figure.media_type};base64,{base64.b64encode(figure.content).decode()}"


def _template() -> jinja2.Template:
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined)
    environment.globals |= {
        "counted": counted,
        "interval": lambda low, high: "" if math.isnan(low) else format_interval(low, high),
        "number": format_number,
        "score_threshold": SCORE_THRESHOLD,
        "suffixes": _SUFFIXES,
        "uri": _data_uri,
    }
    return environment.get_template("report.html.j2")
