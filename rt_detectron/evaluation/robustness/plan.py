"""What is to be evaluated, read off the config keys TEST.ATTACK and TEST.CORRUPTION with care."""

from collections.abc import Iterator
from dataclasses import dataclass

from detectron2.config import CfgNode

from rt_detectron.attacks import PGD, DetectorAttack, ThreatModel
from rt_detectron.attacks.detection import LOSSES
from rt_detectron.data.corruptions import SEVERITIES, corruption_names
from rt_detectron.utils.errors import InputError


@dataclass(frozen=True)
class Plan:
    """What a config asks for.

    Attributes:
        attacks: in the order of the results.
        corruptions: pairs of name and severity.
        seed: of all random numbers.
    """

    attacks: tuple[DetectorAttack, ...]
    corruptions: tuple[tuple[str, int], ...]
    seed: int


def robustness_plan(cfg: CfgNode) -> Plan:
    """The settings of ``cfg.TEST.ATTACK`` and ``cfg.TEST.CORRUPTION``, checked.

    Raises:
        InputError: for a value that makes no sense, naming its key, or if there is nothing to do.
    """
    keys = cfg.TEST
    if len(cfg.DATASETS.TEST) != 1:
        raise InputError(f"DATASETS.TEST has {len(cfg.DATASETS.TEST)} sets; robustness is measured on one")
    if not (keys.ATTACK.L2_EPS or keys.ATTACK.LINF_EPS or keys.CORRUPTION.NAMES):
        raise InputError(
            "nothing to evaluate: set TEST.ATTACK.LINF_EPS, TEST.ATTACK.L2_EPS or TEST.CORRUPTION.NAMES, "
            'e.g. TEST.ATTACK.LINF_EPS "[1,2,4]"'
        )
    counts = {
        "TEST.ATTACK.MAX_IMAGES": keys.ATTACK.MAX_IMAGES,
        "TEST.CORRUPTION.MAX_IMAGES": keys.CORRUPTION.MAX_IMAGES,
        "TEST.PICTURES": keys.PICTURES,
    }
    for key, value in counts.items():
        if value < 0:
            raise InputError(f"{key} is {value}; it must be >= 0")
    seed = max(cfg.SEED, 0)  # -1 is Detectron2's for "any"
    return Plan(tuple(_attacks(cfg, seed)), tuple(_corruptions(keys.CORRUPTION)), seed)


def _attacks(cfg: CfgNode, seed: int) -> Iterator[DetectorAttack]:
    keys = cfg.TEST.ATTACK
    if not keys.LOSSES:
        raise InputError(f"TEST.ATTACK.LOSSES is empty; it takes one or more of {', '.join(LOSSES)}")
    if "mask" in keys.LOSSES and not cfg.MODEL.MASK_ON:
        raise InputError("TEST.ATTACK.LOSSES has 'mask', but MODEL.MASK_ON is False: drop it")
    try:
        for norm, all_eps in (("l2", keys.L2_EPS), ("linf", keys.LINF_EPS)):
            for eps in _each(all_eps):
                ball = ThreatModel(norm, eps)
                pgd = PGD(ball, keys.STEPS, restarts=keys.RESTARTS, random_start=keys.RESTARTS > 1)
                for loss in _each(keys.LOSSES):
                    yield DetectorAttack(pgd, loss, seed)
    except InputError as error:
        raise InputError(f"TEST.ATTACK: {error}") from None


def _corruptions(keys: CfgNode) -> Iterator[tuple[str, int]]:
    if not set(keys.SEVERITIES) <= set(SEVERITIES) or not keys.SEVERITIES:
        raise InputError(
            f"TEST.CORRUPTION.SEVERITIES is {list(keys.SEVERITIES)}; it takes some of {list(SEVERITIES)}"
        )
    try:
        names = corruption_names(keys.NAMES)
    except InputError as error:
        raise InputError(f"TEST.CORRUPTION.NAMES: {error}") from None
    for name in names:
        for severity in _each(keys.SEVERITIES):
            yield name, severity


def _each(values) -> tuple:
    return tuple(dict.fromkeys(values))
