"""AP under adversarial attack."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

from detectron2.config import CfgNode

from rt_detectron.attacks import PGD, DetectorAttack, RandomNoise, ThreatModel, build_detector_attack
from rt_detectron.attacks.detection import DETECTOR_ATTACKS
from rt_detectron.evaluation.robustness.evaluation import (
    Evaluation,
    Row,
    image_count,
    random_seed,
    register_evaluation,
    unique,
)
from rt_detectron.evaluation.robustness.measurement import Measured
from rt_detectron.evaluation.robustness.session import Session
from rt_detectron.evaluation.robustness.test_set import DetectionTestSet, annotated_test_mapper
from rt_detectron.utils.errors import InputError

NORMS = {"l2": "L2", "linf": "Linf"}


@register_evaluation
@dataclass(frozen=True)
class AttackEvaluation(Evaluation):
    """AP under each attack, with the clean AP and the AP under random noise on the same images.

    Attributes:
        attacks: in the order of the results.
        max_images: the number of images, evenly spread over the test set; 0 is all.
        noise: whether to measure AP under random noise of the same size.
    """

    name = "attack"
    keys: ClassVar[dict[str, str]] = {
        'TEST.ATTACK.LINF_EPS "[1,2,4]"': "PGD on the detector's input, Linf, eps in units of 1/255",
        'TEST.ATTACK.L2_EPS "[0.5,1]"': "the same with L2, for images in [0, 1] after resizing",
        "TEST.ATTACK.STEPS 10": "steps of PGD",
        "TEST.ATTACK.RESTARTS 1": "random restarts; each image keeps the strongest",
        "TEST.ATTACK.LOSSES \"['all']\"": f"what PGD raises: {', '.join(DETECTOR_ATTACKS)}",
        "TEST.ATTACK.NOISE True": "also AP under random noise of the same size",
        "TEST.ATTACK.MAX_IMAGES 100": "attack this many images only, for a quick look",
    }

    attacks: tuple[DetectorAttack, ...]
    max_images: int = 0
    noise: bool = True

    @classmethod
    def from_config(cls, cfg: CfgNode) -> "AttackEvaluation":
        max_images = image_count(cfg, "TEST.ATTACK.MAX_IMAGES")
        return cls(tuple(_attacks(cfg)), max_images, cfg.TEST.ATTACK.NOISE)

    @property
    def is_requested(self) -> bool:
        return bool(self.attacks)

    def measure(self, session: Session) -> list[dict]:
        if not self.attacks:
            return []
        images = session.images(self.max_images)
        clean = session.clean(images)
        images = replace(images, mapper=annotated_test_mapper(session.cfg))
        return [self._measure(session, images, clean, attack) for attack in self.attacks]

    def _measure(
        self, session: Session, images: DetectionTestSet, clean: Measured, attack: DetectorAttack
    ) -> dict:
        ball = attack.pgd.threat_model
        size = f"{ball.norm}-{ball.eps:g}"
        noise = None
        if self.noise:  # measured once for each threat model: the session keeps it
            noise = session.measure(
                f"noise-{size}",
                images,
                settings={"norm": ball.norm, "eps": ball.eps, "seed": attack.seed},
                clean=clean,
                perturb=RandomNoise(ball, attack.seed),
            )
        measured = session.measure(
            f"attack-{size}-{attack.name}",
            images,
            settings=attack.settings,
            clean=clean,
            perturb=attack,
            change=f"attacked, {_label(ball.norm, ball.eps)}",
        )
        return {
            **attack.settings,
            "requested": True,
            "images": len(images.dicts),
            "metrics": measured.metrics,
            "matches": measured.matches,
            "clean": clean.metrics,
            "clean_matches": clean.matches,
            "noise": noise and noise.metrics,
            "noise_matches": noise and noise.matches,
        }

    @staticmethod
    def merged(earlier: list[dict], results: list[dict]) -> list[dict]:
        asked_for = [_what(entry) for entry in results]
        return results + [{**entry, "requested": False} for entry in earlier if _what(entry) not in asked_for]

    @staticmethod
    def rows(results: list[dict]) -> Iterator[Row]:
        for entry in (entry for entry in results if entry["requested"]):
            label, images = _label(entry["norm"], entry["eps"]), entry["images"]
            yield Row("clean", images, entry["clean"])
            if entry["noise"] is not None:
                yield Row(f"{label}, random noise", images, entry["noise"])
            yield Row(f"{label}, {entry['loss']}", images, entry["metrics"])


def _attacks(cfg: CfgNode) -> Iterator[DetectorAttack]:
    keys = cfg.TEST.ATTACK
    if not keys.LOSSES:
        known = ", ".join(DETECTOR_ATTACKS)
        raise InputError(f"TEST.ATTACK.LOSSES is empty; it takes one or more of {known}")
    try:
        for norm, all_eps in (("l2", keys.L2_EPS), ("linf", keys.LINF_EPS)):
            for eps in unique(all_eps):
                ball = ThreatModel(norm, eps)
                pgd = PGD(ball, keys.STEPS, restarts=keys.RESTARTS, random_start=keys.RESTARTS > 1)
                for name in unique(keys.LOSSES):
                    attack = build_detector_attack(name, pgd, random_seed(cfg))
                    if attack.needs_masks and not cfg.MODEL.MASK_ON:
                        raise InputError(f"LOSSES has {name!r}, but MODEL.MASK_ON is False: drop it")
                    yield attack
    except InputError as error:
        raise InputError(f"TEST.ATTACK: {error}") from None


def _what(entry: dict) -> dict:
    """What was measured: an entry without its outcome."""
    outcome = {"requested", "noise", "noise_matches", "metrics", "clean"}
    return {key: value for key, value in entry.items() if key not in outcome}


def _label(norm: str, eps: float) -> str:
    return f"{NORMS[norm]} eps {eps:g}"
