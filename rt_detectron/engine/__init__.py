"""Detectron2's DefaultTrainer and DefaultPredictor with our checkpointer, checks and options."""

from .lazy import build_lazy_model, do_test, do_train, load_lazy_config, write_lazy_results
from .optimizer import backbone_factor
from .predictor import Predictor, load_predictors
from .results import write_results
from .trainer import Trainer, load_config

__all__ = [
    "Predictor",
    "Trainer",
    "backbone_factor",
    "build_lazy_model",
    "do_test",
    "do_train",
    "load_config",
    "load_lazy_config",
    "load_predictors",
    "write_lazy_results",
    "write_results",
]
