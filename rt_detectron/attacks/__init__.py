"""Attacks on classifiers and detectors. eps is in the units of images in [0, 1] before normalisation."""

from .autoattack import AutoAttack
from .detection import DetectorAttack, RandomNoise
from .pgd import PGD
from .threat_model import ThreatModel

__all__ = ["PGD", "AutoAttack", "DetectorAttack", "RandomNoise", "ThreatModel"]
