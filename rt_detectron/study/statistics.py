"""Statistics of a study: means over seeds, and differences to the baseline with their intervals.

Everything that is reported comes from two pandas tables. The tidy table has one line per trial and number, as
results.csv (see :func:`rt_detectron.study.evaluations.tidy_table`). The table of scores has one line per
target, arm and quantity, over the seeds (see :func:`compare`).
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from scipy import stats

from rt_detectron.study.bootstrap import (
    Matches,
    average_precision,
    match,
    resampled_accuracy_differences,
    resampled_differences,
)
from rt_detectron.study.grid import FINAL, Study
from rt_detectron.study.record import Outcome, by_test_set
from rt_detectron.visualization.coco import load_coco, load_detections

CONFIDENCE = 0.95
SEEDS, IMAGES = "seeds", "images"  # what an interval covers the choice of
CLEAN = "clean"  # the kind of the numbers on the whole, unchanged test set
# Detectron2's names of its tasks, and that of classification -> what the main metric of each is called.
TASKS = {"bbox": "box AP", "segm": "mask AP", "keypoints": "keypoint AP", "accuracy": "accuracy"}
TRIAL = ["stage", "arm", "target", "learning_rate", "seed"]  # the columns that name a trial
UNREADABLE = (OSError, ValueError, LookupError, TypeError)  # what missing or broken files raise
_TOLERANCE = 0.01  # of AP in percent, since results.json may be rounded


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


@dataclass(frozen=True, eq=False)
class Comparison:
    """The results of a study.

    Attributes:
        outcomes: of all trials.
        table: the tidy table, with the columns TRIAL, QUANTITY and ``value``. NaN is an undefined value.
        scores: one line per target, arm and quantity of the final trials, in the study's order. Columns:

            - ``target, arm, baseline, learning_rate, seeds`` (those that have results), and QUANTITY,
            - ``seed_values, n, mean, sd``: the value of each seed, their number, mean and sample standard
              deviation (NaN for a single value),
            - ``change, change_n, change_sd``: the same of the differences to the baseline, paired by seed.
              NaN for the baseline itself and without a common seed,
            - ``low, high, over, verdict``: the interval of the mean difference, if there is one, what it
              covers (SEEDS or IMAGES), and "better", "worse", or "undecided" if it contains 0.
        notes: why single seeds have no interval.
    """

    study: Study
    outcomes: Sequence[Outcome]
    table: pd.DataFrame
    scores: pd.DataFrame
    notes: list[str]


def main_metric(task: str) -> str:
    """The metric that stands for the task."""
    return "accuracy" if task == "accuracy" else "AP"


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


def compare(study: Study, outcomes: Sequence[Outcome], table: pd.DataFrame) -> Comparison:
    """Summarise the final trials over their seeds, and compare each arm with its baseline.

    Undefined values are left out, and so are single categories except on clean images.

    Args:
        table: the tidy table of ``outcomes``.
    """
    final = select(table, stage=FINAL)
    final = final.assign(baseline=final["arm"].map(study.baseline_of))
    measured = final[final["value"].notna() & ((final["kind"] == CLEAN) | ~of_categories(final))]
    pairs = measured[measured["arm"] != measured["baseline"]].merge(
        measured[["target", "arm", "seed", *QUANTITY, "value"]],
        left_on=["target", "baseline", "seed", *QUANTITY],
        right_on=["target", "arm", "seed", *QUANTITY],
        suffixes=("", "_of_baseline"),
    )
    pairs["value"] -= pairs["value_of_baseline"]
    seeds = final.groupby(["target", "arm", "baseline", "learning_rate"], sort=False)["seed"].unique()
    arms = seeds.map(lambda found: tuple(sorted(found.tolist()))).rename("seeds").reset_index()
    scores = arms.merge(_over_seeds(measured), on=["target", "arm"])
    changes = _over_seeds(pairs).drop(columns="seed_values")
    changes = changes.rename(columns={"n": "change_n", "mean": "change", "sd": "change_sd"})
    scores = scores.merge(changes, how="left", on=["target", "arm", *QUANTITY])
    names = [(target.name, arm.name) for target in study.targets for arm in study.arms]
    places = pd.MultiIndex.from_tuples(names).get_indexer(pd.MultiIndex.from_frame(scores[["target", "arm"]]))
    scores = scores.iloc[np.argsort(places, kind="stable")].reset_index(drop=True)
    scores["low"], scores["high"] = t_interval(scores["change_n"], scores["change"], scores["change_sd"])
    scores["over"] = np.where(scores["low"].notna(), SEEDS, "")
    notes = _add_image_intervals(scores, outcomes)
    scores["verdict"] = verdicts(scores)
    return Comparison(study, outcomes, table, scores, notes)


def summarize(values: Sequence[float]) -> tuple[int, float, float]:
    """Number, mean and sample standard deviation of at least one value. A single one has a spread of NaN."""
    mean, n = fmean(values), len(values)
    # statistics.stdev is 50 times slower; the mean and std of pandas depend on the order of the values.
    sd = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1)) if n > 1 else math.nan
    return n, mean, sd


def t_interval(n: Any, mean: Any, sd: Any) -> tuple[Any, Any]:
    """Student's t interval of the mean of n paired differences, of numbers or of columns. NaN for n = 1.

    It assumes that the differences are normally distributed over seeds. The test images stay the same.
    """
    half = stats.t.ppf((1 + CONFIDENCE) / 2, n - 1) * sd / np.sqrt(n)
    return mean - half, mean + half


def verdicts(scores: pd.DataFrame) -> np.ndarray:
    """ "better", "worse", or "undecided" if the interval contains 0 or there is none; "" without a change."""
    contains_0 = scores["low"].isna() | ((scores["low"] <= 0) & (scores["high"] >= 0))
    conditions = [scores["change"].isna(), contains_0, scores["low"] > 0]
    return np.select(conditions, ["", "undecided", "better"], "worse")


def percentile_interval(resampled: np.ndarray) -> tuple[float, float]:
    """The bootstrap's interval from differences on resampled images; NaN if there are none."""
    if not len(resampled):
        return math.nan, math.nan
    low, high = np.percentile(resampled, [50 * (1 - CONFIDENCE), 50 * (1 + CONFIDENCE)])
    return float(low), float(high)


def image_interval(outcome: Outcome, baseline: Outcome, task: str) -> tuple[float, float]:
    """The interval of the difference in the task's main metric over resampled test images.

    Raises:
        UNREADABLE: predictions or ground truth cannot be read, or belong to another evaluation.
    """
    if task == "accuracy":
        return _accuracy_interval(outcome, baseline)
    ours, theirs = test_sets_of(outcome, baseline)
    return _ap_interval(
        (ours["json_file"], ours["predictions"], _ap(outcome, task)),
        (theirs["json_file"], theirs["predictions"], _ap(baseline, task)),
        task,
    )


def test_sets_of(outcome: Outcome, baseline: Outcome) -> tuple[dict[str, Any], dict[str, Any]]:
    """The first test set of the outcome, and the same set of the baseline, both with predictions."""
    ours = _datasets(outcome)[0]
    theirs = next((item for item in _datasets(baseline) if item["json_file"] == ours["json_file"]), None)
    if theirs is None:
        raise ValueError(f"{baseline.trial.name} was not evaluated on {ours['name']}")
    for trial, dataset in ((outcome.trial, ours), (baseline.trial, theirs)):
        if not dataset["predictions"]:
            raise ValueError(f"{trial.name} kept no predictions")
    return ours, theirs


@lru_cache(maxsize=4)  # about 100 MB each for COCO's 5,000 images; all arms share their baseline's
def load_matches(json_file: str, predictions: str, task: str) -> Matches:
    return match(load_coco(json_file), load_detections(predictions), task)


def one_reason(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


def final_outcomes(outcomes: Sequence[Outcome]) -> Mapping[tuple[str, str, int], Outcome]:
    """(target, arm, seed) -> outcome, of the final trials that have results."""
    return {
        (outcome.trial.target, outcome.trial.arm, outcome.trial.seed): outcome
        for outcome in outcomes
        if outcome.trial.stage == FINAL and outcome.results
    }


def _over_seeds(frame: pd.DataFrame) -> pd.DataFrame:
    groups = frame.groupby(["target", "arm", *QUANTITY], sort=False, dropna=False)["value"]
    result = groups.agg(list).rename("seed_values").reset_index()
    summaries = [summarize(values) for values in result["seed_values"]]
    result[["n", "mean", "sd"]] = pd.DataFrame(summaries, columns=["n", "mean", "sd"], dtype=float)
    return result.astype({"n": int})


def _add_image_intervals(scores: pd.DataFrame, outcomes: Sequence[Outcome]) -> list[str]:
    """Fill in intervals over the test images for arms that share a single seed with their baseline.

    Returns:
        Notes on arms for which that is not possible.
    """
    finals, notes = final_outcomes(outcomes), []
    for arm in lines_of(scores.drop_duplicates(["target", "arm"])):
        common = [seed for seed in arm.seeds if (arm.target, arm.baseline, seed) in finals]
        if arm.arm == arm.baseline or len(common) != 1:
            continue
        outcome, baseline = (finals[arm.target, name, common[0]] for name in (arm.arm, arm.baseline))
        lines = select(scores, target=arm.target, arm=arm.arm, kind=CLEAN)
        lines = lines[lines["change"].notna() & (lines["metric"] == lines["task"].map(main_metric))]
        try:
            intervals = {line.Index: image_interval(outcome, baseline, line.task) for line in lines_of(lines)}
        except UNREADABLE as error:
            reason = one_reason(error)
            notes.append(f"{arm.arm}, {arm.target}: no interval over the test images ({reason}).")
            continue
        for index, (low, high) in intervals.items():
            scores.loc[index, ["low", "high", "over"]] = low, high, "" if math.isnan(low) else IMAGES
    return notes


def _accuracy_interval(outcome: Outcome, baseline: Outcome) -> tuple[float, float]:
    ours, theirs = (
        json.loads(Path(_datasets(trial)[0]["predictions"]).read_text(encoding="utf-8"))
        for trial in (outcome, baseline)
    )
    if (ours["keys"], ours["labels"]) != (theirs["keys"], theirs["labels"]):
        raise ValueError(f"{baseline.trial.name} was not evaluated on the same images")
    labels = np.asarray(ours["labels"])
    correct, of_baseline = (np.asarray(found["predicted"]) == labels for found in (ours, theirs))
    per_class = _datasets(outcome)[0]["metric"] == "mean_per_class"
    return percentile_interval(resampled_accuracy_differences(correct, of_baseline, labels, per_class))


def _datasets(outcome: Outcome) -> list[dict[str, Any]]:
    return (outcome.results or {})["datasets"]


def _ap(outcome: Outcome, task: str) -> float:
    return by_test_set((outcome.results or {})["metrics"])[0][task]["AP"]


@lru_cache
def _ap_interval(
    first: tuple[str, str, float], second: tuple[str, str, float], task: str
) -> tuple[float, float]:
    def matches_of(json_file: str, predictions: str, expected: float) -> Matches:
        matches = load_matches(json_file, predictions, task)
        (ap,) = average_precision(matches, np.ones((len(matches.image_ids), 1), dtype=np.int32))
        if not abs(ap - expected) < _TOLERANCE:
            raise ValueError(f"{predictions} has a {TASKS[task]} of {ap:.2f}, not {expected:.2f}")
        return matches

    return percentile_interval(resampled_differences(matches_of(*first), matches_of(*second)))
