"""The answers of a study in words, and what their intervals do not cover."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from rt_detectron.study.evaluations import EVALUATIONS, Evaluation
from rt_detectron.study.grid import FINAL, Study
from rt_detectron.study.intervals import FEW
from rt_detectron.study.selection import Choice
from rt_detectron.study.statistics import (
    BETTER,
    CHECKPOINTS,
    EQUIVALENT,
    IMAGES,
    SEEDS,
    UNDECIDED,
    VERDICTS,
    WORSE,
    Comparison,
    Quantity,
    main_metric,
    main_task,
    select,
)
from rt_detectron.study.tables import counted, format_interval, format_number
from rt_detectron.study.targets import Pooled, pooled

_FEW_RUNS = 5


@dataclass(frozen=True, eq=False)
class Answer:
    """The answer to one question.

    Attributes:
        kind: of the quantity that answers it.
        measure: its name, such as "box AP".
        verdict: one of VERDICTS, of the first sentence.
        sentences: for each baseline the answer over all targets, as one sentence.
        counts: how many arms and targets have which verdict, in words.
        pooled: the answers of each arm over all targets.
        lines: the lines of the comparison's scores, one for each arm and target.
    """

    question: str
    kind: str
    measure: str
    verdict: str
    sentences: list[str]
    counts: str
    pooled: list[Pooled]
    lines: pd.DataFrame


def answers(comparison: Comparison, choices: Sequence[Choice]) -> list[Answer]:
    """For each evaluation that was run: are the arms better than their baselines?"""
    scores = comparison.scores
    task = main_task(scores)
    found = []
    for evaluation in EVALUATIONS:
        lines = evaluation.main_lines(scores, task)
        lines = lines[lines["change"].notna()]
        if lines.empty:
            continue
        quantity = Quantity(evaluation.main_kind, task, main_metric(task))
        measure = evaluation.measure(scores, task)
        over_targets = pooled(comparison, quantity, choices)
        told = list(_headlines(over_targets))
        sentences = [sentence(comparison, one, evaluation, measure) for one in told]
        counts = ", ".join(
            f"{count} {label(verdict, comparison.study)}"
            for verdict in VERDICTS
            if (count := len(select(lines, verdict=verdict)))
        )
        found.append(
            Answer(
                evaluation.question,
                evaluation.main_kind,
                measure,
                told[0].verdict if told else UNDECIDED,
                sentences,
                f"{counted(len(lines), 'comparison')} of an arm with its baseline on a target: {counts}.",
                over_targets,
                lines,
            )
        )
    return found


def label(verdict: str, study: Study) -> str:
    """A verdict in words."""
    return f"no difference beyond {study.margin:g}" if verdict == EQUIVALENT else verdict


def sentence(comparison: Comparison, one: Pooled, evaluation: Evaluation, measure: str) -> str:
    """The answer of one arm over all targets: who, how much, on what."""
    study = comparison.study
    place = next(iter(one.plan)) if len(one.plan) == 1 else _places(one)
    subject, baseline = name_of(study, one), one.baseline
    single = single_checkpoints(study)
    if one.arm in single:
        subject = f"this checkpoint of {subject}"
    elif one.arm and baseline in single:
        baseline = f"this checkpoint of {baseline}"
    interval = format_interval(one.low, one.high) if one.over else ""
    if one.verdict in (BETTER, WORSE):
        claim = f"is {one.verdict} than {baseline} by {abs(one.change):.2f} {measure}"
        ends = sorted(map(abs, (one.low, one.high)))
        claim += f" [{ends[0]:.2f}, {ends[1]:.2f}]"
    elif one.verdict == EQUIVALENT:
        claim = f"differs from {baseline} by no more than {study.margin:g} {measure}: "
        claim += f"{format_number(one.change)}{interval}"
    elif one.over:
        claim = f"is not significantly different from {baseline}: {format_number(one.change)} {measure}"
        claim += f"{interval}; {limit(one.low, one.high)}"
    else:
        claim = f"differs from {baseline} by {format_number(one.change)} {measure}, perhaps by chance: "
        claim += "there is no interval"
    return f"{place}: {subject} {claim}{_size(comparison, one, evaluation)}."


def limit(low: float, high: float) -> str:
    """What an undecided interval still says."""
    return f"any difference is below {max(abs(low), abs(high)):.2f}"


def name_of(study: Study, one: Pooled) -> str:
    """The arm with its eps; or that it is the best one."""
    if one.arm is None:
        chosen = dict.fromkeys(arm for arm, _ in one.plan.values())
        what = "checkpoint" if set(chosen) & set(single_checkpoints(study)) else "recipe"
        return f"the {what} that is best on held-out images ({', '.join(chosen)})"
    eps = study.arm(one.arm).eps
    return one.arm if eps is None or f"{eps:g}" in one.arm else f"{one.arm} (eps {eps:g})"


def _places(one: Pooled) -> str:
    targets, sets = len(one.plan), one.data_sets
    if targets == sets:
        return f"Mean of {sets} data sets"
    return f"Mean of {counted(targets, 'target')} on {counted(sets, 'data set')}"


def _size(comparison: Comparison, one: Pooled, evaluation: Evaluation) -> str:
    """How many runs and images an answer rests on."""
    samples = [
        comparison.samples[target, quantity][arm]
        for (target, quantity) in comparison.samples
        if target in one.plan and quantity.kind == evaluation.main_kind
        for arm in one.plan[target]
    ]
    counts = sorted({len(sample.values) for sample in samples})
    kinds = {sample.kind for sample in samples}
    noun = "checkpoint" if kinds == {CHECKPOINTS} else "seed" if kinds == {SEEDS} else "run"
    fewest = f"{counts[0]} to " if len(counts) > 1 else ""
    images = test_images(comparison, evaluation, list(one.plan))
    on = f", {counted(images, 'test image')}" if images else ""
    return f"; {fewest}{counted(counts[-1], noun)} of each arm{on}"


def test_images(comparison: Comparison, evaluation: Evaluation, targets: Sequence[str]) -> int:
    """Number of images of the targets' evaluation, those of a shared test set once; 0 if one is unknown."""
    found: dict[str, int] = {}
    for outcome in comparison.outcomes:
        target = outcome.trial.target
        if target in targets and outcome.results and outcome.trial.stage == FINAL:
            found[comparison.test_sets.get(target, target)] = evaluation.images(outcome)
    return sum(found.values()) if found and all(found.values()) else 0


def _headlines(over_targets: Sequence[Pooled]) -> Iterator[Pooled]:
    """One answer for each baseline: the arm chosen on held-out data, else the one with the largest mean.

    The intervals of all arms hold together, so the arm may be picked by its result.
    """
    for baseline in dict.fromkeys(one.baseline for one in over_targets):
        of_baseline = [one for one in over_targets if one.baseline == baseline]
        chosen = [one for one in of_baseline if one.arm is None]
        yield chosen[0] if chosen else max(of_baseline, key=lambda one: one.change)


def single_checkpoints(study: Study) -> list[str]:
    """The arms with one checkpoint. Another pretraining of such an arm may give another answer."""
    return [arm.name for arm in study.arms if len(arm.checkpoints) == 1]


def cautions(comparison: Comparison, choices: Sequence[Choice], found: Sequence[Answer]) -> list[str]:
    """What the intervals cover and what they do not."""
    study = comparison.study
    if not found:
        return ["No arm can be compared with its baseline yet: they have no finished trials in common."]
    lines = pd.concat([answer.lines for answer in found])
    texts = []
    single = single_checkpoints(study)
    if single:
        of_all = len(single) == len(study.arms)
        which = "every arm" if of_all else ", ".join(single)
        texts.append(
            f"One checkpoint each: {which}. The answers are about these checkpoints: another pretraining by "
            "the same recipe may change a difference by more than its interval says."
        )
    without_images = lines[~lines["over"].str.contains(IMAGES)]
    if (lines["over"] == IMAGES).any():
        texts.append(
            "With a single run of each arm, intervals only cover the choice of test images: another seed may "
            "change the result by more."
        )
    if len(without_images):
        kinds = ", ".join(dict.fromkeys(answer.question.lower() for answer in found
                                        if (~answer.lines["over"].str.contains(IMAGES)).any()))  # fmt: skip
        texts.append(f"Not covered, since there is nothing to resample: the choice of test images ({kinds}).")
    if (lines["over"] == "").any():
        texts.append("A difference without an interval may be due to chance.")
    runs = lines[lines["over"].str.contains(f"{SEEDS}|{CHECKPOINTS}")]
    if len(runs):
        fewest = int(runs["n"].min())
        if fewest <= FEW:
            texts.append(
                "Arms with one or two runs take the spread that is pooled over the arms of their target."
            )
        if fewest < _FEW_RUNS:
            texts.append(f"With {counted(fewest, 'run')} an interval is wide: undecided is not equal.")
    at_border = [f"{choice.arm} ({choice.target})" for choice in choices if choice.at_border]
    if at_border:
        texts.append(
            "The best learning rate is at the border of the grid for "
            f"{', '.join(at_border)}: a better one may lie outside."
        )
    return texts + sorted(comparison.notes)


def method(study: Study, found: Sequence[Answer]) -> str:
    """How the intervals are made, in some sentences."""
    several = len({line for answer in found for line in answer.lines["arm"]}) > 1
    text = (
        "95 % intervals: between runs by Student's t with Satterthwaite's degrees of freedom, between test "
        "images by resampling them, the same for all arms. "
    )
    if several:
        text += "Those of all arms against one baseline hold together (Dunnett). "
    return text + (
        "All other numbers are exploratory: each interval is for itself, and a verdict stands only where it "
        "is a discovery at a false-discovery rate of 5 % (Benjamini-Hochberg)."
    )


def common_rate_changes(study: Study, choices: Sequence[Choice]) -> list[dict[str, Any]]:
    """Differences on the held-out images, each arm at its own rate, and all arms at one common rate."""
    by_pair = {(choice.target, choice.arm): choice for choice in choices if choice.learning_rate is not None}
    found = []
    for (target, arm), choice in by_pair.items():
        baseline = by_pair.get((target, study.baseline_of(arm)))
        if baseline is None or baseline is choice:
            continue
        own = _change(choice, choice.learning_rate, baseline, baseline.learning_rate)
        common = _change(choice, choice.common_rate, baseline, choice.common_rate)
        if own is not None and common is not None:
            rates = {"rate": choice.learning_rate, "common_rate": choice.common_rate}
            found.append({"target": target, "arm": arm, **rates, "own": own, "common": common})
    return found


def _change(choice: Choice, rate: float | None, baseline: Choice, of_baseline: float | None) -> float | None:
    ours = choice.scores.get(rate) if rate is not None else None
    theirs = baseline.scores.get(of_baseline) if of_baseline is not None else None
    return None if ours is None or theirs is None else ours - theirs
