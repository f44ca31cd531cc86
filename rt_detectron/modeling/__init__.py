"""Backbones for Detectron2; importing this registers them."""

from rt_detectron.modeling import backbone  # noqa: F401  (registers the builders)
from rt_detectron.modeling.load import load_backbone, load_classifier

__all__ = ["load_backbone", "load_classifier"]
