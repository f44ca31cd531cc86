"""The report of a study: results.json, results.csv and a self-contained report.html."""

import csv
import io
import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jinja2
from tabulate import tabulate

from rt_detectron.study.figures import SCORE_THRESHOLD, make_section
from rt_detectron.study.grid import Study
from rt_detectron.study.record import Outcome, write_atomically
from rt_detectron.study.statistics import METRICS, Row, Setting, Summary, aggregate, is_number, scores_of

_FEW_SEEDS = 5


def write_report(study: Study, outcomes: Sequence[Outcome], output: Path, command: str) -> Path:
    """Write the three files into ``output`` from what the trials left; gives the path of report.html.

    ``command`` is the line that makes the study again, as shown in the report.
    """
    rows = study_table(study, outcomes)
    trials = [_trial_record(outcome) for outcome in outcomes]
    table = [asdict(row) for row in rows]
    content = {"study": asdict(study), "command": command, "trials": trials, "table": table}
    # NaN is no JSON: _without_nan gives null, and allow_nan=False proves it.
    write_atomically(output / "results.json", json.dumps(_without_nan(content), indent=2, allow_nan=False))
    write_atomically(output / "results.csv", _csv(outcomes))
    html = _template().render(
        study=study,
        command=command,
        trials=trials,
        versions=_versions(outcomes),
        options=dict.fromkeys(" ".join(outcome.trial.opts) or "none" for outcome in outcomes),
        sentences=[_sentence(row, study.baseline) for row in rows if row.change],
        caution=_caution(study, rows),
        columns=_columns(rows),
        rows=rows,
        cell=_format_summary,
        change=lambda summary: _format_summary(summary, signed=True),
        sections=[make_section(study, setting, outcomes) for setting in _settings(study)],
        score_threshold=SCORE_THRESHOLD,
    )
    write_atomically(output / "report.html", html)
    return output / "report.html"


def study_table(study: Study, outcomes: Sequence[Outcome]) -> list[Row]:
    """The aggregated rows of the finished trials, setting by setting, arms in the study's order."""
    scores: dict[Setting, dict[str, dict[int, dict[str, float]]]] = {
        setting: {arm.name: {} for arm in study.arms} for setting in _settings(study)
    }
    for outcome in outcomes:
        if outcome.results:
            trial = outcome.trial
            by_seed = scores[trial.detector, trial.learning_rate][trial.arm]
            by_seed[trial.seed] = scores_of(outcome.results["metrics"])
    return aggregate(scores, study.baseline)


def terminal_table(rows: Sequence[Row]) -> str:
    """The rows as plain text: mean and standard deviation, then the difference to the baseline."""
    columns = [column for column in ("box AP", "box AP50", "mask AP") if column in _columns(rows)]
    lines = []
    for row in rows:
        cells = [f"{row.arm}", row.detector, f"{row.learning_rate:g}", len(row.seeds)]
        for column in columns:
            cells += [
                _format_summary(row.score.get(column)),
                _format_summary(row.change.get(column), signed=True),
            ]
        lines.append(cells)
    headers = ["arm", "detector", "lr", "seeds", *(text for c in columns for text in (c, "to baseline"))]
    return tabulate(lines, headers, disable_numparse=True)


def _settings(study: Study) -> list[Setting]:
    return [(detector.name, rate) for detector in study.detectors for rate in study.learning_rates]


def _columns(rows: Sequence[Row]) -> list[str]:
    return [column for column in METRICS.values() if any(column in row.score for row in rows)]


def _trial_record(outcome: Outcome) -> dict[str, Any]:
    status = "finished" if outcome.results else "missing"
    if outcome.results and "box AP" not in scores_of(outcome.results["metrics"]):
        status = "without AP"
    return {
        **outcome.trial.specification(),
        "name": outcome.trial.name,
        "folder": str(outcome.folder),
        "status": status,
        "error": outcome.error,
        "results": outcome.results,
    }


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _csv(outcomes: Sequence[Outcome]) -> str:
    """One line per trial and metric; an undefined value is empty."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(["arm", "detector", "learning_rate", "seed", "task", "metric", "value"])
    for outcome in outcomes:
        trial = outcome.trial
        for task, metrics in (outcome.results or {"metrics": {}})["metrics"].items():
            for metric, value in metrics.items():
                number = value if is_number(value) else ""
                writer.writerow(
                    [trial.arm, trial.detector, trial.learning_rate, trial.seed, task, metric, number]
                )
    return stream.getvalue()


def _versions(outcomes: Sequence[Outcome]) -> dict[str, str]:
    """Package versions; several values where trials ran with different ones."""
    found: dict[str, set[str]] = {}
    for outcome in outcomes:
        for package, version in (outcome.results or {}).get("versions", {}).items():
            found.setdefault(package, set()).add(str(version))
    return {package: ", ".join(sorted(versions)) for package, versions in found.items()}


def _format_summary(summary: Summary | None, signed: bool = False) -> str:
    if summary is None:
        return "-"
    spread = "n/a" if summary.sd is None else f"{summary.sd:.2f}"
    return f"{summary.mean:{'+' if signed else ''}.2f} ± {spread}"


def _sentence(row: Row, baseline: str) -> str:
    """The row's difference to the baseline in plain words."""
    parts = []
    for column in ("box AP", "mask AP"):
        if column in row.change:
            change, values = row.change[column], row.differences[column]
            higher = sum(value > 0 for value in values)
            spread = "" if change.sd is None else f", standard deviation {change.sd:.2f}"
            parts.append(f"{column} {change.mean:+.2f} (higher with {higher} of {change.n} seeds{spread})")
    return (
        f"{row.arm} minus {baseline}, {row.detector} at learning rate {row.learning_rate:g}: "
        f"{', '.join(parts)}."
    )


def _caution(study: Study, rows: Sequence[Row]) -> str:
    """What the numbers do not say."""
    pairs = [change.n for row in rows for change in row.change.values()]
    if not pairs:
        return "No arm can be compared with the baseline yet: they share no finished seed."
    fewest = min(pairs)
    if fewest == 1:
        text = "A single seed shows no spread: its difference cannot be told from chance."
    elif fewest < _FEW_SEEDS:
        text = f"{fewest} seeds are few: differences of this size may be chance, so no arm is called better."
    else:
        text = "Means and spreads are given without a significance test, so no arm is called better."
    if len(study.learning_rates) > 1:
        text += " Every learning rate is shown; choosing the best one by these numbers would favour luck."
    return text


def _template() -> jinja2.Template:
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    return jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined).get_template(
        "report.html.j2"
    )
