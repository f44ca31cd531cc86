"""Statistics of a study: means over runs, and differences to the baseline with their intervals.

Everything that is reported comes from two pandas tables. The tidy table has one line per trial and number, as
results.csv (see :func:`rt_detectron.study.evaluations.tidy_table`). The table of scores has one line per
target, arm and quantity, over the runs (see :func:`compare`).
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from rt_detectron.study.grid import FINAL, Arm, Study
from rt_detectron.study.intervals import Contrasts, contrasts, discoveries, image_covariance, simultaneous
from rt_detectron.study.record import Outcome

CHECKPOINTS, SEEDS, IMAGES = "checkpoints", "seeds", "images"  # what an interval covers the choice of
CLEAN = "clean"  # the kind of the numbers on the whole, unchanged test set
# Detectron2's names of its tasks, and that of classification -> what the main metric of each is called.
TASKS = {"bbox": "box AP", "segm": "mask AP", "keypoints": "keypoint AP", "accuracy": "accuracy"}
TRIAL = ["stage", "arm", "target", "learning_rate", "seed", "checkpoint"]  # the columns that name a trial
BETTER, WORSE, EQUIVALENT, UNDECIDED = VERDICTS = ("better", "worse", "equivalent", "undecided")
_SHOWN = 0.005  # differences nearer to 0 are shown as 0.00


class Quantity(NamedTuple):
    """What a number measures.

    Attributes:
        kind: CLEAN, or what an evaluation measures, such as "attack" or "mPC".
        task: one of TASKS.
        metric: as the result files name it: "AP", "AP50", "APs", "AP-person", "accuracy".
        condition: of an attack its norm and loss, "l2, all"; of a corruption its name; else empty.
        level: of an attack its eps, of a corruption its severity; None for a mean over levels.
    """

    kind: str
    task: str
    metric: str = "AP"
    condition: str = ""
    level: float | None = None


QUANTITY = list(Quantity._fields)
Draws = Mapping[tuple, Mapping[Quantity, np.ndarray]]  # TRIAL's values -> quantity -> values on resamples


@dataclass(frozen=True, eq=False)
class Sample:
    """One quantity of one arm on one target, over its runs.

    Attributes:
        kind: CHECKPOINTS if the arm has several, each of them a run; else SEEDS.
        values: run -> its value, the mean of its trials.
        draws: (n, B) values of the runs on resampled test images; None if unknown. Runs without are left out.
    """

    kind: str
    values: dict[Any, float]
    draws: np.ndarray | None

    @property
    def mean(self) -> float:
        return fmean(self.values.values())


@dataclass(frozen=True, eq=False)
class Comparison:
    """The results of a study.

    Attributes:
        outcomes: of all trials.
        table: the tidy table, with the columns TRIAL, QUANTITY and ``value``. NaN is an undefined value.
        scores: one line per target, arm and quantity of the final trials, in the study's order. Columns:

            - ``target, arm, baseline, learning_rate, seeds`` (those that have results), and QUANTITY,
            - ``values, kind, n, mean, sd``: the value of each trial; what the arm's runs are, their number,
              mean and sample standard deviation (NaN for a single run),
            - ``change, se, df, low, high``: the difference to the baseline, with its standard error, degrees
              of freedom and interval. NaN for the baseline itself and where unknown,
            - ``over``: what the interval covers, such as "seeds and images"; "" without an interval,
            - ``main``: whether the line answers one of the study's questions. Their intervals hold together
              for all arms of a baseline. Other lines are exploratory, with intervals for each alone,
            - ``p, verdict``: of the difference; one of VERDICTS, or "" without a difference.
        samples: (target, main quantity) -> arm -> its runs.
        draws: of each trial, as far as they are known.
        test_sets: target -> what names its test images. Equal names are not independent of each other.
        notes: what the intervals lack.
    """

    study: Study
    outcomes: Sequence[Outcome]
    table: pd.DataFrame
    scores: pd.DataFrame
    samples: Mapping[tuple[str, Quantity], Mapping[str, Sample]]
    draws: Draws
    test_sets: Mapping[str, str]
    notes: list[str]


def main_metric(task: str) -> str:
    """The metric that stands for the task."""
    return "accuracy" if task == "accuracy" else "AP"


def main_task(table: pd.DataFrame) -> str:
    """The first of TASKS that was measured, in the tidy table or in that of scores."""
    clean = select(table, kind=CLEAN)
    measured = set(clean["task"][clean["metric"] == clean["task"].map(main_metric)])
    return next((task for task in TASKS if task in measured), "bbox")


def select(frame: pd.DataFrame, **values: Any) -> pd.DataFrame:
    """The lines whose columns have these values."""
    chosen = np.ones(len(frame), dtype=bool)
    for column, value in values.items():
        chosen &= (frame[column].isna() if value is None else frame[column] == value).to_numpy(bool)
    return frame[chosen]


def lines_of(frame: pd.DataFrame) -> Iterator[Any]:
    """The lines of a frame as named tuples, with columns as attributes."""
    return iter(frame.itertuples())


def groups_of(frame: pd.DataFrame, columns: str | list[str]) -> Iterator[tuple[Any, pd.DataFrame]]:
    """(value, or values, of the columns; their lines), in the order of the frame."""
    return iter(frame.groupby(columns, sort=False))


def of_categories(frame: pd.DataFrame) -> pd.Series:
    """Whether each line is the main metric of a single category, such as "AP-person"."""
    return frame["metric"].str.startswith(("AP-", "accuracy-"))


def trial_key(trial: Any) -> tuple:
    """What names a trial: of a :class:`Trial` or of a line of the tidy table the values of TRIAL."""
    return tuple(getattr(trial, column) for column in TRIAL)


def quantity_of(line: Any) -> Quantity:
    """The quantity of a line of a table."""
    level = line.level
    return Quantity(line.kind, line.task, line.metric, line.condition, None if pd.isna(level) else level)


def zero_where_nothing_was_found(table: pd.DataFrame) -> pd.DataFrame:
    """The tidy table with 0 for undefined values where any other trial has a defined one.

    Whether AP is defined depends on the annotations alone, which are the same for all trials of a target.
    But a detector without any detection has undefined metrics in Detectron2. That is an AP of 0.
    """
    defined = table.groupby(["target", "stage", *QUANTITY], dropna=False)["value"].transform("count") > 0
    return table.assign(value=table["value"].mask(table["value"].isna() & defined, 0.0))


def compare(
    study: Study,
    outcomes: Sequence[Outcome],
    table: pd.DataFrame,
    draws: Draws | None = None,
    main_kinds: Sequence[str] = (CLEAN,),
    lower_is_better: Sequence[str] = (),
    notes: Sequence[str] = (),
) -> Comparison:
    """Summarise the final trials over their runs, and compare each arm with its baseline.

    Undefined values are left out, and so are single categories except on clean images.

    Args:
        table: the tidy table of ``outcomes``.
        draws: values on resampled test images, as far as they are known.
        main_kinds: the kinds of the quantities that answer the study's questions.
        lower_is_better: the kinds of the quantities of which less is better.
    """
    table = zero_where_nothing_was_found(table)
    final = select(table, stage=FINAL)
    measured = final[final["value"].notna() & ((final["kind"] == CLEAN) | ~of_categories(final))]
    task = main_task(table)
    # As plain dicts: pandas takes milliseconds for each of thousands of small groups.
    groups: dict[tuple[str, Quantity], dict[str, list[Any]]] = {}
    for line in lines_of(measured):
        groups.setdefault((line.target, quantity_of(line)), {}).setdefault(line.arm, []).append(line)
    lines: list[dict[str, Any]] = []
    main_samples: dict[tuple[str, Quantity], dict[str, Sample]] = {}
    for (target, quantity), by_arm in groups.items():
        main = quantity.kind in main_kinds and quantity[1:4] == (task, main_metric(task), "")
        samples = {
            arm.name: _sample(arm, quantity, by_arm[arm.name], draws or {})
            for arm in study.arms
            if arm.name in by_arm
        }
        if main:
            main_samples[target, quantity] = samples
        lines += _lines(study, quantity, samples, by_arm, main)
    scores = pd.DataFrame(lines, columns=_COLUMNS)
    places = _places(study, scores)
    scores = scores.iloc[np.argsort(places, kind="stable")].reset_index(drop=True)
    scores = scores.astype({"level": object, **dict.fromkeys(_NUMBERS, float)})
    scores["level"] = [None if pd.isna(level) else level for level in scores["level"]]
    scores["verdict"] = verdicts(scores, study.margin, lower_is_better)
    return Comparison(
        study, outcomes, table, scores, main_samples, draws or {}, _test_sets(outcomes), list(notes)
    )


_NUMBERS = ["mean", "sd", "change", "se", "df", "low", "high", "p"]
_COLUMNS = [
    "target", "arm", "baseline", "learning_rate", "seeds", *QUANTITY, "values", "runs", "n", "mean", "sd",
    "change", "se", "df", "low", "high", "over", "main", "p",
]  # fmt: skip


def _run(line: Any) -> tuple[str, int]:
    return line.checkpoint, line.seed


def _sample(arm: Arm, quantity: Quantity, lines: Sequence[Any], draws: Draws) -> Sample:
    """The runs of an arm, from the lines of its trials in the tidy table."""
    several = len(arm.checkpoints) > 1
    by_run: dict[Any, list[Any]] = {}
    for line in sorted(lines, key=_run):
        by_run.setdefault(line.checkpoint if several else line.seed, []).append(line)
    values = {run: fmean(line.value for line in of_run) for run, of_run in by_run.items()}
    drawn = []
    for of_run in by_run.values():
        trials = map(trial_key, of_run)
        found = [draws[trial][quantity] for trial in trials if quantity in draws.get(trial, ())]
        if found:
            drawn.append(np.mean(found, axis=0))
    return Sample(CHECKPOINTS if several else SEEDS, values, np.stack(drawn) if drawn else None)


def _lines(
    study: Study,
    quantity: Quantity,
    samples: Mapping[str, Sample],
    by_arm: Mapping[str, Sequence[Any]],
    main: bool,
) -> Iterator[dict[str, Any]]:
    """The lines of the table of scores of one target and quantity."""
    changes: dict[str, dict[str, Any]] = {}
    for baseline in dict.fromkeys(map(study.baseline_of, samples)):
        arms = [arm for arm in samples if study.baseline_of(arm) == baseline != arm]
        if baseline in samples and arms:
            changes |= _changes(samples, baseline, arms, main)
    for arm, sample in samples.items():
        trials = sorted(by_arm[arm], key=_run)
        n, mean, sd = summarize(list(sample.values.values()))
        yield {
            "target": trials[0].target,
            "arm": arm,
            "baseline": study.baseline_of(arm),
            "learning_rate": trials[0].learning_rate,
            "seeds": tuple(sorted({trial.seed for trial in trials})),
            **quantity._asdict(),
            "values": [trial.value for trial in trials],
            "runs": sample.kind,
            "n": n,
            "mean": mean,
            "sd": sd,
            "over": "",
            "main": main,
            **changes.get(arm, {}),
        }


def _changes(
    samples: Mapping[str, Sample], baseline: str, arms: Sequence[str], main: bool
) -> dict[str, dict[str, Any]]:
    """The differences of ``arms`` to the baseline, by arm."""
    names = list(samples)
    weights = differences(names, [(arm, baseline) for arm in arms])
    known = all(samples[arm].draws is not None for arm in (baseline, *arms))
    found = contrast_samples(list(samples.values()), weights, images=known)
    critical = simultaneous_where_known(found) if main else None
    low, high = found.interval(critical)
    changes = {}
    for row, arm in enumerate(arms):
        kinds = {samples[name].kind for name in (arm, baseline)}
        changes[arm] = {
            "change": found.estimate[row],
            "se": found.se[row],
            "df": found.df[row],
            "low": low[row],
            "high": high[row],
            "over": covered(kinds, found.covers_runs[row], known),
            "p": found.p[row],
        }
        if not found.se[row] > 0:  # runs that agree exactly say nothing about the chance in them
            changes[arm] |= {"low": math.nan, "high": math.nan, "over": ""}
    return changes


def differences(names: Sequence[str], pairs: Sequence[tuple[str, str]]) -> np.ndarray:
    """(C, A) weights of contrasts of the arms ``names``: of each pair the first minus the second."""
    weights = np.zeros((len(pairs), len(names)))
    for row, (arm, other) in zip(weights, pairs, strict=True):
        row[names.index(arm)], row[names.index(other)] = 1, -1
    return weights


def padded(rows: Sequence[Sequence[float]]) -> np.ndarray:
    """(A, R) the rows, of R numbers at most, with NaN behind the last of each."""
    table = np.full((len(rows), max(map(len, rows))), math.nan)
    for line, row in zip(table, rows, strict=True):
        line[: len(row)] = row
    return table


def covered(kinds: set[str], runs: bool, images: bool) -> str:
    """What an interval covers, such as "seeds and images"; ``kinds``: what the runs are."""
    of_runs = CHECKPOINTS if kinds == {CHECKPOINTS} else SEEDS
    return " and ".join([of_runs] * bool(runs) + [IMAGES] * images)


def simultaneous_where_known(found: Contrasts) -> np.ndarray:
    """Critical values for all contrasts that have a standard error, together; NaN for the others."""
    known = np.flatnonzero(found.se > 0)
    critical = np.full(len(found.se), math.nan)
    if len(known):
        critical[known] = simultaneous(found.correlation[np.ix_(known, known)], found.df[known])
    return critical


def contrast_samples(samples: Sequence[Sample], weights: np.ndarray, images: bool) -> Contrasts:
    """Contrasts of the arms of one target.

    Args:
        weights: (C, A), see :func:`contrasts`.
        images: whether all samples that take part have draws.
    """
    runs = padded([list(sample.values.values()) for sample in samples])
    pools = np.array([sample.kind == CHECKPOINTS for sample in samples], int)
    if not images:
        return contrasts(runs, weights, pools=pools)
    covariance, df = covariance_over_images([sample.draws for sample in samples])
    return contrasts(runs, weights, covariance, df, pools)


def covariance_over_images(draws: Sequence[np.ndarray | None]) -> tuple[np.ndarray, float]:
    """:func:`image_covariance`, 0 for samples without draws, and its degrees of freedom.

    Resamples on which a value is undefined, such as AP of a category that is in none of the images, are left
    out for all.
    """
    known = [number for number, drawn in enumerate(draws) if drawn is not None]
    found = [np.asarray(drawn) for drawn in draws if drawn is not None]
    covariance = np.zeros((len(draws), len(draws)))
    if not known:
        return covariance, math.inf
    defined = np.all([np.isfinite(drawn).all(axis=0) for drawn in found], axis=0)
    if defined.sum() > 1:
        covariance[np.ix_(known, known)] = image_covariance([drawn[:, defined] for drawn in found])
    return covariance, max(float(defined.sum()) - 1, 1.0)


def _places(study: Study, scores: pd.DataFrame) -> np.ndarray:
    """The place of each line's target and arm in the study."""
    names = [(target.name, arm.name) for target in study.targets for arm in study.arms]
    return pd.MultiIndex.from_tuples(names).get_indexer(pd.MultiIndex.from_frame(scores[["target", "arm"]]))


def _test_sets(outcomes: Sequence[Outcome]) -> dict[str, str]:
    """What names the test images of each target: their folder, which variants of a data set share."""
    found: dict[str, str] = {}
    for outcome in outcomes:
        if outcome.trial.stage == FINAL and (datasets := (outcome.results or {}).get("datasets")):
            first = datasets[0]
            found[outcome.trial.target] = str(
                first.get("image_root") or first.get("root") or first["name"].split("@")[0]
            )
    return found


def summarize(values: Sequence[float]) -> tuple[int, float, float]:
    """Number, mean and sample standard deviation of at least one value. A single one has a spread of NaN."""
    mean, n = fmean(values), len(values)
    # statistics.stdev is 50 times slower; the mean and std of pandas depend on the order of the values.
    sd = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1)) if n > 1 else math.nan
    return n, mean, sd


def verdict(low: float, high: float, margin: float | None = None) -> str:
    """What an interval of a difference says, by the two decimals that are shown of it. NaN is no interval.

    Args:
        margin: smaller differences do not matter; None: every difference does.
    """
    if margin is not None and -margin <= low and high <= margin:
        return EQUIVALENT
    if low >= _SHOWN:
        return BETTER
    return WORSE if high <= -_SHOWN else UNDECIDED


def verdicts(
    scores: pd.DataFrame, margin: float | None = None, lower_is_better: Sequence[str] = ()
) -> list[str]:
    """The verdict of each line of the table of scores; "" without a difference.

    An exploratory line is only decided if it is a discovery among all exploratory lines.
    """
    found = []
    for line in lines_of(scores):
        ends = (-line.high, -line.low) if line.kind in lower_is_better else (line.low, line.high)
        found.append("" if math.isnan(line.change) else verdict(*ends, margin))
    exploratory = ~scores["main"].to_numpy(bool)
    chosen = discoveries(np.where(exploratory, scores["p"].to_numpy(float), math.nan))
    return [
        UNDECIDED if explored and one in (BETTER, WORSE) and not discovered else one
        for one, explored, discovered in zip(found, exploratory, chosen, strict=True)
    ]
