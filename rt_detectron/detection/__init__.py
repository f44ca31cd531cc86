"""Training and prediction with detectors: Detectron2's trainers and predictor with checks and options."""

from rt_detectron.detection.lazy import (
    build_lazy_model,
    do_test,
    do_train,
    load_lazy_config,
    write_lazy_results,
)
from rt_detectron.detection.predictor import Predictor, load_predictors
from rt_detectron.detection.steps import backbone_factor, clipped_optimizer
from rt_detectron.detection.trainer import Trainer, load_detector_config

__all__ = [
    "Predictor",
    "Trainer",
    "backbone_factor",
    "build_lazy_model",
    "clipped_optimizer",
    "do_test",
    "do_train",
    "load_detector_config",
    "load_lazy_config",
    "load_predictors",
    "write_lazy_results",
]
