"""Attacks on classifiers and detectors. They see images in [0, 1]; normalisation is the model's affair."""

from .autoattack import AutoAttack
from .pgd import PGD
from .threat_model import ThreatModel

__all__ = ["PGD", "AutoAttack", "ThreatModel"]
