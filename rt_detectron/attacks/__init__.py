"""Attacks on classifiers and detectors. eps is in the units of images in [0, 1] before normalisation."""

from rt_detectron.attacks.autoattack import AutoAttack
from rt_detectron.attacks.detection import DetectorAttack, RandomNoise
from rt_detectron.attacks.pgd import PGD
from rt_detectron.attacks.threat_model import ThreatModel

__all__ = ["PGD", "AutoAttack", "DetectorAttack", "RandomNoise", "ThreatModel"]
