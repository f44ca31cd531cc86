"""Backbones for Detectron2; importing this registers them."""

from rt_detectron.modeling import backbone  # noqa: F401  (registers the builders)
