"""What is measured of a trained model: its scores on clean images, under attack and under corruption.

An evaluation turns its part of a trial's result files into lines of the study's tidy table, and makes a
chapter of the report. To add one, derive from :class:`Evaluation` and append it to EVALUATIONS. No other file
of the study names an evaluation.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import pandas as pd

from rt_detectron.study.error_types import ERROR_TYPES
from rt_detectron.study.examples import evaluation_pictures
from rt_detectron.study.figures import SIZES, Charts, Figure
from rt_detectron.study.grid import FINAL, Study
from rt_detectron.study.images import (
    UNREADABLE,
    clean_on_resamples,
    condition_on_resamples,
    errors_of,
    one_reason,
)
from rt_detectron.study.record import Outcome, by_test_set, mean_if_defined
from rt_detectron.study.statistics import (
    CLEAN,
    QUANTITY,
    TASKS,
    TRIAL,
    Comparison,
    Quantity,
    compare,
    groups_of,
    main_metric,
    select,
    trial_key,
)
from rt_detectron.study.tables import Table, counted, score_table
from rt_detectron.utils.numbers import is_number

_NAMED = 4  # arms and targets in one note
Numbers = dict[Quantity, Any]  # floats, with None for undefined ones; or (B,) arrays of values on resamples


@dataclass
class Chapter:
    """A chapter of the report.

    Attributes:
        text: explains the tables.
        details: figures that follow the tables.
        pictures: large pictures at the end.
        notes: on pictures that are missing.
    """

    title: str
    text: str
    tables: list[Table]
    figures: list[Figure] = field(default_factory=list)
    details: list[Figure] = field(default_factory=list)
    pictures: list[Figure] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


class Evaluation(ABC):
    """One way to evaluate a trained model.

    Attributes:
        name: of its part of robustness.json.
        title: of its chapter in the report.
        question: what its answer in the report is about, such as "Under attack".
        main_kind: the kind of the number that answers the question, in each task's main metric.
        lower_is_better: the kinds of its numbers of which less is better.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    question: ClassVar[str]
    main_kind: ClassVar[str]
    lower_is_better: ClassVar[tuple[str, ...]] = ()

    def part(self, outcome: Outcome) -> Any:
        """Its part of the trial's result files; empty or None if it was not run."""
        return (outcome.robustness or {}).get(self.name)

    def images(self, outcome: Outcome) -> int:
        """The number of images that its main number is of; 0 if its part does not say."""
        return 0

    @abstractmethod
    def numbers(self, part: Any) -> Numbers:
        """The numbers in its part of the result files."""

    def on_resamples(self, outcome: Outcome) -> Any:
        """Its part of the result files with (B,) values on resampled test images; None if unknown.

        Raises:
            UNREADABLE: a file cannot be read, or belongs to another evaluation.
        """
        return None

    def notes(self, outcome: Outcome) -> dict[str, str]:
        """What speaks against its numbers of a trial that has them -> what that rests on."""
        return {}

    @abstractmethod
    def tables(self, scores: pd.DataFrame, task: str) -> list[Table]:
        """Its tables of one task, from a comparison's scores."""

    def measure(self, scores: pd.DataFrame, task: str) -> str:
        """The name of its main number, such as "box mPC"."""
        return TASKS[task]

    def main_lines(self, scores: pd.DataFrame, task: str) -> pd.DataFrame:
        """The scores that are its main number."""
        return select(scores, kind=self.main_kind, task=task, metric=main_metric(task))

    def text(self, outcomes: Sequence[Outcome]) -> str:
        """What its chapter says about its tables."""
        return ""

    def figures(self, charts: Charts) -> list[Figure]:
        return []

    def details(self, charts: Charts) -> list[Figure]:
        return []

    def pictures(self, outcomes: Sequence[Outcome]) -> tuple[list[Figure], list[str]]:
        """Pictures, and notes on those that cannot be read."""
        return [], []

    def chapter(self, comparison: Comparison, charts: Charts) -> Chapter:
        outcomes, scores = comparison.outcomes, comparison.scores
        return Chapter(
            self.title,
            self.text(outcomes),
            [table for task in TASKS for table in self.tables(scores, task)],
            self.figures(charts),
            self.details(charts),
            *self.pictures(outcomes),
        )


class Clean(Evaluation):
    """The metrics of the training's own evaluation; with several test sets, those of the first."""

    name, title, question, main_kind = CLEAN, "Clean images", "On clean images", CLEAN

    def part(self, outcome: Outcome) -> Any:
        return outcome.results and by_test_set(outcome.results["metrics"])[0]

    def images(self, outcome: Outcome) -> int:
        datasets = (outcome.results or {}).get("datasets")
        clean = (outcome.robustness or {}).get("clean") or {}
        return (datasets[0].get("images") if datasets else None) or clean.get("images") or 0

    def numbers(self, part: Any) -> Numbers:
        return dict(_numbers(CLEAN, part))

    def on_resamples(self, outcome: Outcome) -> Any:
        return clean_on_resamples(outcome)

    def tables(self, scores: pd.DataFrame, task: str) -> list[Table]:
        metrics = {"AP": "AP", "AP50": "AP50", "AP75": "AP75", **SIZES}
        if task == "accuracy":
            metrics = {"accuracy": "accuracy", "top-1": "top1", "mean per class": "mean_per_class"}
        return score_table(
            _title(task),
            {
                heading: select(scores, kind=CLEAN, task=task, metric=metric)
                for heading, metric in metrics.items()
            },
        )

    def figures(self, charts: Charts) -> list[Figure]:
        return list(charts.clean())

    def details(self, charts: Charts) -> list[Figure]:
        return [*charts.sizes(), *charts.categories()]


class Errors(Evaluation):
    """What goes wrong on clean images, by type of error. It answers no question by itself."""

    name, title, question, main_kind = "error types", "Types of error", "", "error"
    lower_is_better = ("error",)

    def part(self, outcome: Outcome) -> Any:
        if outcome.trial.stage != FINAL or not outcome.results:
            return None
        if outcome.errors is not None:
            return outcome.errors
        try:
            return errors_of(outcome)
        except UNREADABLE:  # the report names these where it says what the intervals lack
            return None

    def numbers(self, part: Any) -> Numbers:
        return dict(_numbers(self.main_kind, part))

    def main_lines(self, scores: pd.DataFrame, task: str) -> pd.DataFrame:
        return scores[:0]

    def tables(self, scores: pd.DataFrame, task: str) -> list[Table]:
        lines = select(scores, kind=self.main_kind, task=task)
        columns = {kind: select(lines, metric=kind) for kind in ERROR_TYPES}
        return score_table(f"{_title(task)}50 that mending each type of error would gain", columns)

    def text(self, outcomes: Sequence[Outcome]) -> str:
        return (
            "As in TIDE (Bolya et al. 2020), at IoU 0.5: the right place with the wrong class, the right "
            "class in the wrong place (IoU 0.1 to 0.5), both wrong, an object found twice, background, and "
            "missed objects. Less is better. Gains overlap, so they do not add up."
        )

    def details(self, charts: Charts) -> list[Figure]:
        return list(charts.errors(self.main_kind, ERROR_TYPES))


class Attack(Evaluation):
    """Adversarial attacks, each with clean images and random noise of the same size on the same images."""

    ATTACKED, UNATTACKED, NOISE, MEAN = "attack", "attack: clean", "noise", "attack: mean"
    # On fewer images: what was done to them in robustness.json -> the kind of its numbers, and its heading.
    ON_FEW: ClassVar = {
        "clean": ("few: clean", "no attack"),
        "attack": ("few: attack", "attack"),
        "transfer": ("few: transfer", "transferred attack"),
        "random search": ("few: random search", "random search"),
        "huge eps": ("few: huge eps", "huge eps"),
    }
    name, title, question, main_kind = "attack", "Under attack", "Under attack", MEAN

    def part(self, outcome: Outcome) -> Any:
        return _requested(super().part(outcome) or [])

    def images(self, outcome: Outcome) -> int:
        return min((attack.get("images", 0) for attack in self.part(outcome)), default=0)

    def on_resamples(self, outcome: Outcome) -> Any:
        attacks = []
        for attack in self.part(outcome):
            found = {
                key: condition_on_resamples(outcome, attack.get(matches), attack[key] or {})
                for key, matches in (
                    ("metrics", "matches"), ("clean", "clean_matches"), ("noise", "noise_matches"),
                )
            }  # fmt: skip
            few = {
                key: {**value, "metrics": condition_on_resamples(outcome, value["matches"], value["metrics"])}
                for key, value in attack.get("check_images", {}).items()
                if key in self.ON_FEW
            }
            attacks.append({**attack, **found, "check_images": few})
        return attacks if all(attack["metrics"] for attack in attacks) else None

    def numbers(self, part: Any) -> Numbers:
        found: Numbers = {}
        for attack in part:
            condition = _condition(attack)
            for kind, key in (
                (self.UNATTACKED, "clean"), (self.ATTACKED, "metrics"), (self.NOISE, "noise"),
            ):  # fmt: skip
                found.update(_numbers(kind, attack[key] or {}, condition, attack["eps"]))
            for key, (kind, _) in self.ON_FEW.items():
                metrics = attack.get("check_images", {}).get(key, {"metrics": {}})["metrics"]
                found.update(_numbers(kind, metrics, condition, attack["eps"]))
        counting = _answering(quantity.condition for quantity in found)
        counted = {quantity: value for quantity, value in found.items() if quantity.condition in counting}
        return found | _means(counted, self.ATTACKED, self.MEAN)

    def measure(self, scores: pd.DataFrame, task: str) -> str:
        attacks = select(scores, kind=self.ATTACKED, task=task)[["condition", "level"]].drop_duplicates()
        counting = _answering(attacks["condition"])
        count = int(attacks["condition"].isin(counting).sum())
        kinds = {_parts(condition)[1:] for condition in counting}
        loss, protocol = kinds.pop() if len(kinds) == 1 else ("", OURS)
        what = f"the worst {_of(protocol)}attack" if loss == WORST else f"{_of(protocol)}attack"
        return f"{TASKS[task]} under {what}" + (f" (mean of {count})" if count > 1 else "")

    def tables(self, scores: pd.DataFrame, task: str) -> list[Table]:
        answer = {self.measure(scores, task): self.main_lines(scores, task)}
        scores = select(scores, task=task, metric="AP")
        same = ["target", "arm", "condition", "level"]
        noise = select(scores, kind=self.NOISE)[[*same, "mean"]].rename(columns={"mean": "noise"})
        attacked = select(scores, kind=self.ATTACKED)
        means = attacked[same].merge(noise, how="left", on=same)["noise"]
        attacked = attacked.assign(extra=["" if math.isnan(ap) else f"noise {ap:.2f}" for ap in means])
        groups = dict(groups_of(attacked, "condition"))
        tables = score_table(f"{_title(task)} under attack", answer) if len(groups) > 1 else []
        for condition, lines in groups.items():
            levels = sorted(lines["level"].unique())
            columns = {
                "no attack": select(scores, kind=self.UNATTACKED, condition=condition, level=levels[0]),
                **{f"eps {level:g}": select(lines, level=level) for level in levels},
            }
            if len(groups) == 1 and len(levels) > 1:
                columns |= answer
            tables += score_table(f"{_title(task)} under {attack_name(condition)}", columns)
            few = {
                heading: select(scores, kind=kind, condition=condition)
                for kind, heading in self.ON_FEW.values()
            }
            norm, _, protocol = _parts(condition)
            title = f"{_title(task)} on the images of the checks, {_of(protocol)}{norm.capitalize()}"
            tables += score_table(title, few)
        return tables

    def text(self, outcomes: Sequence[Outcome]) -> str:
        text = (
            "eps is in units of images in [0, 1], after resizing (Linf: in 1/255). “No attack” is AP on the "
            "same images, “noise” is AP under random noise of the same size as the attack."
        )
        attacks = [attack for outcome in outcomes for attack in self.part(outcome) or []]
        if not attacks:
            return text
        by_protocol = {attack.get("protocol", OURS): attack for attack in reversed(attacks)}
        steps = ", ".join(
            f"{_of(protocol)}{'A' * attack.get('adaptive', False)}PGD, {attack['steps']} steps"
            + ("" if attack["restarts"] == 1 else f", {attack['restarts']} restarts")
            for protocol, attack in reversed(by_protocol.items())
        )
        found = f"{steps[0].upper()}{steps[1:]}, on {attacks[0]['images']} images. {text}"
        if any(attack["loss"] == WORST for attack in attacks):
            found += (
                " The answer is the worst case of several objectives on each image; the AP of each "
                "one is given, too."
            )
        if published := [protocol for protocol in reversed(by_protocol) if protocol != OURS]:
            all_of_it = "All is" if OURS not in by_protocol else "What bears their name is"
            found += f" {all_of_it} as in the protocol of {' and '.join(published)}."
            if OURS in by_protocol:
                found += " The answer is of our own attacks."
        if few := [attack["check_images"] for attack in attacks if attack.get("check_images")]:
            found += (
                f" The checks are made on {few[0]['images']} images: the objective that leaves the least AP, "
                "the same attack on another detector and transferred, random search without gradients, and a "
                "huge eps."
            )
        return found

    def notes(self, outcome: Outcome) -> dict[str, str]:
        found = {}
        for attack in self.part(outcome):
            for check in attack.get("checks", ()):
                if check["level"] == "error":
                    doubt = (
                        f"{outcome.trial.arm}, {outcome.trial.target}: {attack_name(_condition(attack))} at "
                        f"eps {attack['eps']:g} may be too weak (check: {check['check']}), so the detector "
                        "may be less robust than this AP says"
                    )
                    found[doubt] = check["text"]
        return found

    def figures(self, charts: Charts) -> list[Figure]:
        figures: list[Figure] = []
        for (target, task, condition), lines in charts.groups(self.ATTACKED):
            norm, loss, protocol = _parts(condition)
            others = select(charts.scores, target=target, task=task, metric="AP", condition=condition)
            figures += charts.against_level(
                "-".join(["attack", target, task, norm, loss] + [protocol] * (protocol != OURS)),
                f"{target}: {TASKS[task]} under {attack_name(condition)}.",
                "eps of the attack" + (", in 1/255" if norm == "linf" else ""),
                lines,
                unchanged=select(others, kind=self.UNATTACKED, level=lines["level"].min()),
                noise=select(others, kind=self.NOISE),
            )
        return figures

    def pictures(self, outcomes: Sequence[Outcome]) -> tuple[list[Figure], list[str]]:
        return evaluation_pictures(outcomes)


class _WithResults(Evaluation):
    """An evaluation whose part of robustness.json has several "results"."""

    def part(self, outcome: Outcome) -> Any:
        part = super().part(outcome)
        results = _requested(part["results"]) if part else []
        return {**part, "results": results} if results else None


class Corruption(_WithResults):
    """Image corruptions, such as fog: mean AP over all of them (mPC), and relative to clean images (rPC)."""

    CORRUPTED, UNCORRUPTED, MPC, RPC = "corruption", "corruption: clean", "mPC", "rPC"
    name, title, question, main_kind = "corruption", "Under corruption", "Under corruption", MPC

    def images(self, outcome: Outcome) -> int:
        return (self.part(outcome) or {}).get("images", 0)

    def on_resamples(self, outcome: Outcome) -> Any:
        part = self.part(outcome)
        clean = condition_on_resamples(outcome, part.get("clean_matches"), part["clean"])
        results = [
            {**result, "metrics": condition_on_resamples(outcome, result.get("matches"), result["metrics"])}
            for result in part["results"]
        ]
        if not clean or not all(result["metrics"] for result in results):
            return None
        mean = {
            task: np.mean([result["metrics"][task]["AP"] for result in results], axis=0)
            for task in clean
            if all(task in result["metrics"] for result in results)
        }
        with np.errstate(invalid="ignore", divide="ignore"):
            relative = {task: 100 * values / clean[task]["AP"] for task, values in mean.items()}
        return {**part, "clean": clean, "results": results, "mPC": mean, "rPC": relative}

    def numbers(self, part: Any) -> Numbers:
        found = dict(_numbers(self.UNCORRUPTED, part["clean"]))
        for kind in (self.MPC, self.RPC):
            found.update(_numbers(kind, {task: {"AP": value} for task, value in part[kind].items()}))
        for result in part["results"]:
            found.update(
                _numbers(self.CORRUPTED, result["metrics"], result["corruption"], result["severity"])
            )
        for name in dict.fromkeys(result["corruption"] for result in part["results"]):
            found |= _means(found, self.CORRUPTED, self.CORRUPTED, name)
        return found

    def measure(self, scores: pd.DataFrame, task: str) -> str:
        return TASKS[task].replace("AP", "mPC")

    def tables(self, scores: pd.DataFrame, task: str) -> list[Table]:
        scores = select(scores, task=task, metric="AP")
        means = select(scores, kind=self.CORRUPTED, level=None)
        columns = {
            "no corruption": select(scores, kind=self.UNCORRUPTED),
            "mPC": select(scores, kind=self.MPC),
            "rPC, %": select(scores, kind=self.RPC),
            **{name.replace("_", " "): lines for name, lines in groups_of(means, "condition")},
        }
        return score_table(f"{_title(task)} under corruption", columns)

    def text(self, outcomes: Sequence[Outcome]) -> str:
        return (
            "mPC is the mean AP over all corruptions and severities, and rPC is mPC in percent of the AP "
            "without corruption. The column of a single corruption is the mean over its severities."
        )


class Natural(_WithResults):
    """Box AP on other test sets, such as COCO-O's drawings and paintings, and its mean over them."""

    SHIFTED, MEAN, SCORE = "natural", "natural: mean", "effective robustness"
    name, title, question, main_kind = "natural", "Under natural shifts", "Under natural shifts", MEAN

    def images(self, outcome: Outcome) -> int:
        return sum(result.get("images", 0) for result in (self.part(outcome) or {"results": []})["results"])

    def on_resamples(self, outcome: Outcome) -> Any:
        part = self.part(outcome)
        results = [
            {
                **result,
                "metrics": condition_on_resamples(
                    outcome, result.get("matches"), result["metrics"], result["dataset"]
                ),
            }
            for result in part["results"]
        ]
        if not all(result["metrics"] for result in results):
            return None
        mean = np.mean([result["metrics"]["bbox"]["AP"] for result in results], axis=0)
        score = None
        if part["effective_robustness"] is not None and "coco_kept" in part:
            on_coco = clean_on_resamples(outcome)["bbox"]["AP"]
            of_coco_o = [each["metrics"]["bbox"]["AP"] for each in results if each["of_coco_o"]]
            score = np.mean(of_coco_o, axis=0) - part["coco_kept"] * on_coco
        return {**part, "results": results, "mean": mean, "effective_robustness": score}

    def numbers(self, part: Any) -> Numbers:
        found: Numbers = {}
        for result in part["results"]:
            found.update(_numbers(self.SHIFTED, result["metrics"], result["dataset"]))
        for kind, key in ((self.MEAN, "mean"), (self.SCORE, "effective_robustness")):
            if part[key] is not None:
                found.update(_numbers(kind, {"bbox": {"AP": part[key]}}))
        return found

    def measure(self, scores: pd.DataFrame, task: str) -> str:
        return f"{TASKS[task]} on other sets"

    def tables(self, scores: pd.DataFrame, task: str) -> list[Table]:
        scores = select(scores, task=task, metric="AP")
        columns = {
            "mean": self.main_lines(scores, task),
            "effective robustness": select(scores, kind=self.SCORE),
            **dict(groups_of(select(scores, kind=self.SHIFTED), "condition")),
        }
        return score_table(f"{_title(task)} under natural shifts", columns)

    def text(self, outcomes: Sequence[Outcome]) -> str:
        return (
            "AP on other test sets with the same classes. Effective robustness is the mean over COCO-O's "
            "domains minus 0.45 of the AP on COCO val2017."
        )


# In the order of the report.
EVALUATIONS: list[Evaluation] = [Clean(), Attack(), Corruption(), Natural(), Errors()]


def tidy_table(outcomes: Iterable[Outcome]) -> pd.DataFrame:
    """All numbers of all trials, one per line. See :class:`~rt_detectron.study.statistics.Comparison`."""
    lines = []
    for outcome in outcomes:
        trial = trial_key(outcome.trial)
        for evaluation in EVALUATIONS:
            if part := evaluation.part(outcome):
                lines += [[*trial, *quantity, value] for quantity, value in evaluation.numbers(part).items()]
    # As objects, so that integer levels (severities) stay integers beside None.
    table = pd.DataFrame(lines, columns=[*TRIAL, *QUANTITY, "value"], dtype=object)
    return table.astype({"learning_rate": float, "seed": int, "value": float})


def compared(study: Study, outcomes: Sequence[Outcome]) -> Comparison:
    """Everything that is known of a study's outcomes."""
    draws: dict[tuple, Numbers] = {}
    reasons: dict[tuple[str, str], str] = {}
    doubts: dict[str, list[str]] = {}
    for outcome in outcomes:
        trial = outcome.trial
        if trial.stage != FINAL or not outcome.results:
            continue
        found = draws.setdefault(trial_key(trial), {})
        found |= outcome.draws or {}
        for evaluation in EVALUATIONS:
            if not evaluation.part(outcome):
                continue
            for doubt, ground in evaluation.notes(outcome).items():
                doubts.setdefault(doubt, []).append(ground)
            if outcome.draws is not None:
                continue
            try:
                if part := evaluation.on_resamples(outcome):
                    found |= evaluation.numbers(part)
            except UNREADABLE as error:
                reasons[trial.arm, trial.target] = one_reason(error)
    notes = [*_not_resampled(reasons), *(_with_first(*doubt) for doubt in doubts.items())]
    kinds = [evaluation.main_kind for evaluation in EVALUATIONS]
    lower = [kind for evaluation in EVALUATIONS for kind in evaluation.lower_is_better]
    return compare(study, outcomes, tidy_table(outcomes), draws, kinds, lower, notes)


def _not_resampled(reasons: Mapping[tuple[str, str], str]) -> list[str]:
    """A note on the arms and targets whose test images cannot be resampled, if there are any."""
    if not reasons:
        return []
    names = [f"{arm}, {target}" for arm, target in reasons]
    more = [f"{len(names) - _NAMED} more"] if len(names) > _NAMED else []
    reason = next(iter(reasons.values()))
    return [f"Test images could not be resampled for {'; '.join(names[:_NAMED] + more)} ({reason})."]


def _with_first(doubt: str, grounds: Sequence[str]) -> str:
    """A doubt with what it rests on in the first of its trials."""
    more = f" (and {counted(len(grounds) - 1, 'more trial')})" if len(grounds) > 1 else ""
    return f"{doubt}: {grounds[0]}{more}."


WORST, OURS = "worst", "ours"  # as tools/evaluate_robustness.py names a loss, and a protocol


def _condition(attack: Mapping[str, Any]) -> str:
    """``linf, A_cls``, and a published protocol: ``linf, A_cls, oddefense``."""
    protocol = attack.get("protocol", OURS)
    parts = (attack["norm"], attack["loss"], *(() if protocol == OURS else (protocol,)))
    return ", ".join(parts)


def _parts(condition: str) -> tuple[str, str, str]:
    """Norm, loss and protocol of an attack's condition."""
    norm, loss, *protocol = condition.split(", ")
    return norm, loss, protocol[0] if protocol else OURS


def _of(protocol: str) -> str:
    return "" if protocol == OURS else f"{protocol} "


def attack_name(condition: str) -> str:
    """``L2 attack``, and what it attacks if that is not the detector's whole loss."""
    norm, loss, protocol = _parts(condition)
    named = f"{_of(protocol)}{norm.capitalize()}"
    if loss == WORST:
        return f"the worst {named} attack on each image"
    if loss == "vanishing":
        return f"{named} vanishing attack"
    return f"{named} attack" + ("" if loss == "all" else f" on {loss}")


def _answering(conditions: Iterable[str]) -> set[str]:
    """The attacks that count: of several objectives their worst case alone, "linf, worst".

    Where published protocols were measured beside ours, ours count.
    """
    found = set(conditions)
    found = {condition for condition in found if _parts(condition)[2] == OURS} or found
    worst = {condition for condition in found if _parts(condition)[1] == WORST}
    covered = {_parts(condition)[::2] for condition in worst}
    return worst | {condition for condition in found if _parts(condition)[::2] not in covered}


def _title(task: str) -> str:
    return TASKS[task][0].upper() + TASKS[task][1:]


def _requested(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those that the study asks for. The file also keeps what an earlier evaluation had asked for."""
    return [result for result in results if result.get("requested", True)]


def _numbers(
    kind: str, metrics: Mapping[str, Mapping[str, Any]], condition: str = "", level: float | None = None
) -> Iterator[tuple[Quantity, Any]]:
    """From task -> metric -> value."""
    for task, values in metrics.items():
        for metric, value in values.items():
            quantity = Quantity(kind, task, metric, condition, level)
            yield (
                quantity,
                value if isinstance(value, np.ndarray) else float(value) if is_number(value) else None,
            )


def _means(found: Numbers, kind: str, mean_kind: str, condition: str = "") -> Numbers:
    """The mean AP of each task over all levels, of one condition or of all. Undefined if one of them is."""
    means: Numbers = {}
    for task in TASKS:
        values = [
            value
            for quantity, value in found.items()
            if quantity[:3] == (kind, task, "AP") and condition in ("", quantity.condition)
        ]
        if values:
            means[Quantity(mean_kind, task, "AP", condition)] = mean_if_defined(values)
    return means
