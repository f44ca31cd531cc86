"""Attacks on classifiers and detectors. eps is in the units of images in [0, 1] before normalisation."""

import importlib
import pkgutil

from rt_detectron.attacks.apgd import APGD
from rt_detectron.attacks.autoattack import AutoAttack
from rt_detectron.attacks.detection import (
    DetectorAttack,
    LossAttack,
    RandomNoise,
    build_detector_attack,
    register_detector_attack,
)
from rt_detectron.attacks.pgd import PGD
from rt_detectron.attacks.registry import attack_named, register_attack
from rt_detectron.attacks.threat_model import ThreatModel

__all__ = [
    "APGD",
    "PGD",
    "AutoAttack",
    "DetectorAttack",
    "LossAttack",
    "RandomNoise",
    "ThreatModel",
    "attack_named",
    "build_detector_attack",
    "register_attack",
    "register_detector_attack",
]

for _module in pkgutil.iter_modules(__path__):  # so that each attack registers its names
    importlib.import_module(f"{__name__}.{_module.name}")
