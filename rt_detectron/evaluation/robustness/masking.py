"""Checks against gradient masking: signs that an attack is weaker than it claims.

A gradient that leads nowhere makes a detector look robust (Athalye et al. 2018, "Obfuscated Gradients Give a
False Sense of Security", https://arxiv.org/abs/1802.00420, section 3.1; Carlini et al. 2019, "On Evaluating
Adversarial Robustness", https://arxiv.org/abs/1902.06705). Each check is one line of text with a level: "ok",
"warning" or "error". An error says that AP under this attack says nothing about the detector's robustness.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from rt_detectron.attacks import DetectorAttack, LossAttack
from rt_detectron.attacks.random_search import RandomSearch
from rt_detectron.evaluation.robustness.measurement import Measured, main_metric
from rt_detectron.evaluation.robustness.session import Session
from rt_detectron.evaluation.robustness.test_set import DetectionTestSet
from rt_detectron.utils.numbers import is_number

Check = dict[str, Any]  # "check": its name; "level"; "text"

_STUCK = 0.1  # more images than this share whose objective did not rise are an error
_TOLERANCE = 0.1  # AP that another attack may leave less than the one that is checked, on all images
_TOLERANCE_ON_SOME = 2.0  # the same on the few images of the costly checks
_NEAR_0 = 0.1  # of the clean AP: what a huge eps may leave
HUGE = {"linf": 64.0, "l2": 32.0}  # an eps that any detector breaks at
_ALL = {"linf": 255.0, "l2": math.inf}  # the largest eps there is


def of_one(measured: Measured, noise: Measured | None, alone: bool, task: str = "") -> list[Check]:
    """The checks that cost nothing.

    Args:
        measured: AP under the attack.
        noise: under random noise of the same size.
        alone: whether this is the number to report. One of several attacks may be weak, such as that on the
            regression: that is a warning.
        task: whose metric counts, as for :func:`main_value`.
    """
    checks = []
    if measured.objective:
        before, after, images, stuck = (
            measured.objective[key] for key in ("before", "after", "images", "not_risen")
        )
        level = "ok" if stuck <= _STUCK * images else "error" if alone else "warning"
        text = f"objective {_text(before)} -> {_text(after)}; it did not rise in {stuck} of {images} images"
        if level != "ok" and stuck < images:
            text += " (more STEPS make it stronger; so does TEST.ATTACK.BEST True, where it is off)"
        checks.append({"check": "objective", "level": level, "text": text})
    if noise is not None:
        what = "random noise of the same size"
        checks.append(_weaker("noise", what, measured, noise, _TOLERANCE, alone, task))
    return checks


def of_all(several: Sequence[Measured]) -> list[Check]:
    """The check of several attacks, of which each may be stuck, but not all."""
    shares = [each.objective["not_risen"] / each.objective["images"] for each in several if each.objective]
    if len(shares) < len(several):
        return []
    level = "ok" if min(shares) <= _STUCK else "error"
    text = f"each objective did not rise in {100 * min(shares):.0f} % of the images or more"
    return [{"check": "objectives", "level": level, "text": text}]


def of_some_images(
    session: Session, images: DetectionTestSet, attack: DetectorAttack, queries: int
) -> tuple[list[Check], dict[str, Any]]:
    """The checks that cost passes, on a few images: a huge eps, random search, and a transferred attack.

    Returns:
        The checks, and their numbers: "images", "loss" of the attack, and by the name of what happened to the
        images, "clean", "attack" or that of a check, its "metrics" and "matches".
    """
    ball, count = attack.pgd.threat_model, len(images.dicts)
    clean = session.clean(replace(images, mapper=session.test_set.mapper))
    name, settings = f"{ball.norm}-{ball.eps:g}-{attack.name}", attack.settings
    huge = replace(ball, eps=min(max(HUGE[ball.norm], 8 * ball.eps), _ALL[ball.norm]))
    pgd = replace(attack.pgd, threat_model=huge, relative_step_size=2.5)
    left = session.measure(
        f"huge-{name}",
        images,
        settings={**settings, "huge_eps": huge.eps},
        clean=clean,
        perturb=replace(attack, pgd=pgd),
    )
    task = attack.task
    ap, clean_ap = main_value(left, task), main_value(clean, task)
    broken = ap is not None and clean_ap is not None and ap <= max(1.0, _NEAR_0 * clean_ap)
    text = f"{_metric(left, task)} {_text(ap)} at a huge eps of {huge.eps:g}"
    text += f" ({_text(clean_ap)} clean, {count} images)"
    checks = [{"check": "huge eps", "level": "ok" if broken else "error", "text": text}]
    numbers = {"images": count, "loss": attack.name, "clean": _numbers(clean), "huge eps": _numbers(left)}
    if not (queries and isinstance(attack, LossAttack)) and session.surrogate is None:
        return checks, numbers
    measured = session.measure(f"attack-{name}", images, settings=settings, clean=clean, perturb=attack)
    numbers["attack"] = _numbers(measured)
    if queries and isinstance(attack, LossAttack):
        found = session.measure(
            f"search-{name}",
            images,
            settings={**settings, "queries": queries},
            clean=clean,
            perturb=RandomSearch(attack, queries),
        )
        numbers["random search"] = _numbers(found)
        what = f"a random search of {queries} queries ({count} images)"
        checks.append(_weaker("random search", what, measured, found, _TOLERANCE_ON_SOME, True, task))
    if session.surrogate is not None:
        surrogate = session.surrogate
        found = session.measure(
            f"transfer-{name}",
            images,
            settings={**settings, "surrogate_sha256": session.surrogate_sha256},
            clean=clean,
            perturb=lambda _, inputs: attack(surrogate, inputs),
        )
        numbers["transfer"] = _numbers(found)
        what = f"the same attack on the surrogate ({count} images)"
        checks.append(_weaker("transfer", what, measured, found, _TOLERANCE_ON_SOME, True, task))
    return checks, numbers


def _numbers(measured: Measured) -> dict[str, Any]:
    return {"metrics": measured.metrics, "matches": measured.matches}


def main_value(measured: Measured, task: str = "") -> float | None:
    """AP, mIoU or PQ of a task; without one, of the first: boxes, if there are any. None if undefined."""
    task = _task(measured, task)
    value = measured.metrics.get(task, {}).get(main_metric(task))
    return value if is_number(value) else None


def _task(measured: Measured, task: str) -> str:
    return task if task in measured.metrics else min(measured.metrics, default="")


def _metric(measured: Measured, task: str) -> str:
    return main_metric(_task(measured, task))


def _weaker(
    check: str, what: str, attacked: Measured, other: Measured, tolerance: float, alone: bool, task: str
) -> Check:
    """That the attack leaves no more AP than something which does not know the gradient."""
    ap, others = main_value(attacked, task), main_value(other, task)
    ok = ap is None or others is None or ap <= others + tolerance
    text = f"{_metric(attacked, task)} {_text(ap)} under attack, {_text(others)} under {what}"
    return {"check": check, "level": "ok" if ok else "error" if alone else "warning", "text": text}


def _text(value: float | None) -> str:
    return f"{value:.4g}" if is_number(value) else "undefined"
