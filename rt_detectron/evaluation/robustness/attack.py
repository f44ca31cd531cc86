"""AP under adversarial attack."""

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from typing import Any, ClassVar

from detectron2.config import CfgNode
from detectron2.utils.logger import log_first_n

from rt_detectron.attacks import (
    APGD,
    PGD,
    DetectorAttack,
    RandomNoise,
    ThreatModel,
    build_detector_attack,
)
from rt_detectron.attacks.detection import DETECTOR_ATTACKS
from rt_detectron.evaluation.robustness import masking
from rt_detectron.evaluation.robustness.evaluation import (
    Evaluation,
    Row,
    image_count,
    random_seed,
    register_evaluation,
    unique,
    with_earlier,
)
from rt_detectron.evaluation.robustness.measurement import Measured
from rt_detectron.evaluation.robustness.protocols import OURS, PROTOCOLS, attack_keys
from rt_detectron.evaluation.robustness.session import Session
from rt_detectron.evaluation.robustness.test_set import DetectionTestSet, annotated_test_mapper
from rt_detectron.utils.errors import InputError

logger = logging.getLogger(__name__)

NORMS = {"l2": "L2", "linf": "Linf"}
WORST = "worst"  # the "loss" of the worst case over several


@register_evaluation
@dataclass(frozen=True)
class AttackEvaluation(Evaluation):
    """AP under each attack, with the clean AP and the AP under random noise on the same images.

    With several objectives there is one more entry for each eps, "worst": the AP that is left where each
    image has the attack that does most harm to it. That is the number to report. Each entry holds all that
    defines its number, what the attack costs in passes of the detector, and checks against gradient masking.

    Attributes:
        attacks: by protocol, see :data:`~.protocols.PROTOCOLS`, in the order of the results; those of one
            threat model side by side.
        max_images: the number of images, evenly spread over the test set; 0 is all.
        noise: whether to measure AP under random noise of the same size.
        check_images: the number of images that the costly checks are made on; 0 for none of these.
        queries: of the random search for each of these images.
    """

    name = "attack"
    keys: ClassVar[dict[str, str]] = {
        'TEST.ATTACK.LINF_EPS "[1,2,4]"': "PGD on the detector's input, Linf, eps in units of 1/255",
        'TEST.ATTACK.L2_EPS "[0.5,1]"': "the same with L2, for images in [0, 1] after resizing",
        "TEST.ATTACK.PROTOCOL oddefense": (
            f"eps, steps and objectives as published: {', '.join(PROTOCOLS)}; several as oddefense,ares"
        ),
        "TEST.ATTACK.LOSSES \"['A_cls','A_reg']\"": f"what PGD raises: {', '.join(DETECTOR_ATTACKS)}",
        "TEST.ATTACK.STEPS 10": "steps of PGD",
        "TEST.ATTACK.STEP_SIZE 1": "in the units of eps; 0: 2.5 eps / STEPS",
        "TEST.ATTACK.ADAPTIVE True": "APGD, which finds its step sizes itself, instead of PGD",
        "TEST.ATTACK.REDUCE_RADIUS True": "APGD in balls of 2, 1.5 and 1 eps, as SEA",
        "TEST.ATTACK.START random": "begin at a random point of the ball, not at the image",
        "TEST.ATTACK.RESTARTS 1": "random restarts; each image keeps the strongest",
        "TEST.ATTACK.BEST True": "keep the strongest iterate, not the last",
        "TEST.ATTACK.TARGETED True": "aim for a wrong class: classification and A_cls",
        "TEST.ATTACK.CLIP 6": "what a proposal's loss counts at most: A_cls, A_reg, A_box, A_cwa, MTD",
        "TEST.ATTACK.PADDING True": "change the padding, too",
        "TEST.ATTACK.NOISE True": "also AP under random noise of the same size",
        "TEST.ATTACK.CHECK_IMAGES 10": "check for gradient masking on so many images; 0: only what is free",
        "TEST.ATTACK.QUERIES 100": "queries of the random search on these images",
        "TEST.ATTACK.SURROGATE other.pth": "try attacks on these weights, too, on these images",
        "TEST.ATTACK.IMS_PER_BATCH 8": "attack and evaluate so many images of one size at once",
        "TEST.ATTACK.AMP True": "attack in mixed precision, on GPUs",
        "TEST.ATTACK.MAX_IMAGES 100": "attack this many images only, for a quick look",
    }

    attacks: Mapping[str, tuple[DetectorAttack, ...]]
    max_images: int = 0
    noise: bool = True
    check_images: int = 0
    queries: int = 0

    @classmethod
    def from_config(cls, cfg: CfgNode) -> "AttackEvaluation":
        counts = {
            name.lower(): image_count(cfg, f"TEST.ATTACK.{name}")
            for name in ("MAX_IMAGES", "CHECK_IMAGES", "QUERIES")
        }
        attacks = {name: tuple(_attacks(cfg, keys)) for name, keys in attack_keys(cfg).items()}
        if cfg.TEST.ATTACK.SURROGATE and not (counts["check_images"] and any(attacks.values())):
            raise InputError(
                "TEST.ATTACK.SURROGATE is tried on CHECK_IMAGES images under attack: give an eps or a "
                "PROTOCOL, and CHECK_IMAGES, or drop it"
            )
        return cls(attacks, noise=cfg.TEST.ATTACK.NOISE, **counts)

    @property
    def all_attacks(self) -> tuple[DetectorAttack, ...]:
        return tuple(attack for attacks in self.attacks.values() for attack in attacks)

    @property
    def is_requested(self) -> bool:
        return bool(self.all_attacks)

    def check(self, session: Session) -> None:
        for attack in self.all_attacks:
            attack.check(session.model)
            if attack.task == "sem_seg" and not all(
                "sem_seg_file_name" in each for each in session.test_set.dicts
            ):
                raise InputError(
                    f"TEST.ATTACK.LOSSES has {attack.name!r}, but {session.dataset} has no semantic "
                    "segmentation: drop it"
                )
        if self.all_attacks and self.check_images and not session.test_set.can_be_spread:
            logger.warning(
                "%s only scores whole test sets: the checks on TEST.ATTACK.CHECK_IMAGES images are left out",
                type(session.test_set.evaluator).__name__,
            )

    def measure(self, session: Session) -> list[dict]:
        if not self.all_attacks:
            return []
        images = session.images(self.max_images)
        clean = session.clean(images)
        images = replace(images, mapper=annotated_test_mapper(session.cfg))
        objects = session.object_counts() if self._need("object") else ()
        pixels = session.pixel_counts() if self._need("pixel") else ()
        results: list[dict] = []
        for (protocol, ball), group in groupby(self._by_ball, key=lambda each: each[0]):
            attacks = [
                replace(
                    attack,
                    object_counts=objects if attack.needs_object_counts else (),
                    pixel_counts=pixels if attack.needs_pixel_counts else (),
                )
                for _, attack in group
            ]
            results += self._entries(session, images, clean, protocol, ball, attacks)
        return results

    def _need(self, what: str) -> bool:
        return any(getattr(attack, f"needs_{what}_counts") for attack in self.all_attacks)

    @property
    def _by_ball(self) -> list[tuple[tuple[str, ThreatModel], DetectorAttack]]:
        """((protocol, ball), attack) of all attacks."""
        return [
            ((protocol, attack.pgd.threat_model), attack)
            for protocol, attacks in self.attacks.items()
            for attack in attacks
        ]

    def _is_checked(self, protocol: str, ball: ThreatModel) -> bool:
        """Whether the costly checks are made of this one: at the largest eps of its norm, once."""
        of_norm = [where for where, _ in self._by_ball if where[1].norm == ball.norm]
        return self.check_images > 0 < ball.eps and (protocol, ball) == max(
            of_norm, key=lambda each: each[1].eps
        )

    def _entries(
        self,
        session: Session,
        images: DetectionTestSet,
        clean: Measured,
        protocol: str,
        ball: ThreatModel,
        attacks: list[DetectorAttack],
    ) -> list[dict]:
        """Of each attack within one ball, and of the worst case."""
        noise = self._noise(session, images, clean, ball) if self.noise else None
        found = [measure_attack(session, images, clean, attack) for attack in attacks]
        common = {
            "requested": True,
            "protocol": protocol,
            "images": len(images.dicts),
            "clean": clean.metrics,
            "clean_matches": clean.matches,
            "noise": noise and noise.metrics,
            "noise_matches": noise and noise.matches,
        }
        entries = [
            {**attack.settings, **common, **_outcome(measured), "passes": attack.passes}
            for attack, measured in zip(attacks, found, strict=True)
        ]
        for attack, entry, measured in zip(attacks, entries, found, strict=True):
            entry["checks"] = masking.of_one(measured, noise, len(attacks) == 1, attack.task)
        task = attacks[0].task if len({attack.task for attack in attacks}) == 1 else ""
        if len(attacks) > 1:
            worst = session.worst(f"worst-{_size(ball)}", images, found)
            passes = {kind: sum(attack.passes[kind] for attack in attacks) for kind in attacks[0].passes}
            of_all = {**attacks[0].settings, "loss": WORST, "losses": [attack.name for attack in attacks]}
            entries.append({**of_all, **common, **_outcome(worst), "passes": passes})
            entries[-1]["checks"] = [*masking.of_all(found), *masking.of_one(worst, noise, True, task)]
        if self._is_checked(protocol, ball) and images.can_be_spread:
            strongest = min(
                zip(attacks, found, strict=True), key=lambda pair: masking.main_value(pair[1], task) or 0
            )[0]
            some = replace(images.spread(self.check_images), mapper=images.mapper)
            checks, entries[-1]["check_images"] = masking.of_some_images(
                session, some, strongest, self.queries
            )
            entries[-1]["checks"] += checks
        return entries

    def _noise(
        self, session: Session, images: DetectionTestSet, clean: Measured, ball: ThreatModel
    ) -> Measured:
        seed = self.all_attacks[0].seed
        return session.measure(
            f"noise-{_size(ball)}",
            images,
            settings={"norm": ball.norm, "eps": ball.eps, "seed": seed},
            clean=clean,
            perturb=RandomNoise(ball, seed),
        )

    @staticmethod
    def merged(earlier: list[dict], results: list[dict]) -> list[dict]:
        return with_earlier(earlier, results, _what)

    @staticmethod
    def rows(results: list[dict]) -> Iterator[Row]:
        for entry in (entry for entry in results if entry["requested"]):
            size, images = _label(entry["norm"], entry["eps"]), entry["images"]
            yield Row("clean", images, entry["clean"])
            if entry["noise"] is not None:
                yield Row(f"{size}, random noise", images, entry["noise"])
            yield Row(_named(entry), images, entry["metrics"], entry["passes"])

    @staticmethod
    def remarks(results: list[dict]) -> Iterator[str]:
        for entry in (entry for entry in results if entry["requested"]):
            for check in entry["checks"]:
                yield f"{check['level']}: {_named(entry)}: {check['text']}"


def measure_attack(
    session: Session, images: DetectionTestSet, clean: Measured, attack: DetectorAttack
) -> Measured:
    """AP under an attack; ``images`` are read with the ground truth."""
    ball = attack.pgd.threat_model
    return session.measure(
        f"attack-{_size(ball)}-{attack.name}",
        images,
        settings=attack.settings,
        clean=clean,
        perturb=attack,
        change=f"attacked, {_label(ball.norm, ball.eps)}",
    )


def _outcome(measured: Measured) -> dict[str, Any]:
    return {
        "metrics": measured.metrics,
        "matches": measured.matches,
        "counts": measured.counts,
        "objective": measured.objective,
    }


def _what(entry: dict) -> dict:
    """What was measured: an entry without its outcome."""
    outcome = {
        "requested",
        "noise",
        "noise_matches",
        "metrics",
        "clean",
        "checks",
        "check_images",
        "objective",
    }
    return {key: value for key, value in entry.items() if key not in outcome}


def _attacks(cfg: CfgNode, keys: CfgNode) -> Iterator[DetectorAttack]:
    if not keys.LOSSES:
        known = ", ".join(DETECTOR_ATTACKS)
        raise InputError(f"TEST.ATTACK.LOSSES is empty; it takes one or more of {known}")
    if keys.START not in ("image", "random"):
        raise InputError(f"TEST.ATTACK.START is {keys.START!r}; it takes 'image' or 'random'")
    if keys.ADAPTIVE and keys.STEP_SIZE:
        raise InputError("TEST.ATTACK: ADAPTIVE finds its step sizes itself: leave STEP_SIZE at 0")
    if keys.REDUCE_RADIUS and not keys.ADAPTIVE:
        raise InputError("TEST.ATTACK: REDUCE_RADIUS is for APGD: set ADAPTIVE")
    if keys.AMP and not cfg.MODEL.DEVICE.startswith("cuda"):
        raise InputError("TEST.ATTACK.AMP needs a GPU: leave it False")
    if not keys.STEP_SIZE >= 0:
        raise InputError(f"TEST.ATTACK.STEP_SIZE is {keys.STEP_SIZE}; it must be >= 0, in the units of eps")
    try:
        for norm, all_eps in (("l2", keys.L2_EPS), ("linf", keys.LINF_EPS)):
            for ball in unique(ThreatModel(norm, eps) for eps in all_eps):
                if norm == "l2" and ball.eps >= masking.HUGE["l2"]:
                    log_first_n(
                        logging.WARNING,
                        f"TEST.ATTACK.L2_EPS {ball.eps:g} breaks any detector, since it is for images in "
                        f"[0, 1]: if yours is for 0..255, give {ball.eps / 255:.4g}",
                        name=__name__,
                        key="message",
                    )
                kind = partial(APGD, reduce_radius=keys.REDUCE_RADIUS) if keys.ADAPTIVE else PGD
                pgd = kind(
                    ball,
                    keys.STEPS,
                    keys.STEP_SIZE * keys.STEPS / ball.eps if keys.STEP_SIZE and ball.eps else 2.5,
                    random_start=keys.START == "random" or keys.RESTARTS > 1,
                    restarts=keys.RESTARTS,
                    best=keys.BEST,
                )
                for name in unique(keys.LOSSES):
                    attack = build_detector_attack(
                        name,
                        pgd,
                        random_seed(cfg),
                        targeted=keys.TARGETED,
                        clip=keys.CLIP,
                        padding=keys.PADDING,
                        amp=keys.AMP,
                    )
                    key = {"segm": "MASK_ON", "keypoints": "KEYPOINT_ON"}.get(attack.task)
                    if key and not cfg.MODEL[key]:
                        raise InputError(f"LOSSES has {name!r}, but MODEL.{key} is False: drop it")
                    yield attack
    except InputError as error:
        raise InputError(f"TEST.ATTACK: {error}") from None


def _size(ball: ThreatModel) -> str:
    return f"{ball.norm}-{ball.eps:g}"


def _named(entry: dict) -> str:
    """``Linf eps 4, A_cls``, and a published protocol."""
    protocol = "" if entry["protocol"] == OURS else f" ({entry['protocol']})"
    return f"{_label(entry['norm'], entry['eps'])}, {entry['loss']}{protocol}"


def _label(norm: str, eps: float) -> str:
    return f"{NORMS[norm]} eps {eps:g}"
