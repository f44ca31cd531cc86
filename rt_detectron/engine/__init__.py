"""Detectron2's DefaultTrainer and DefaultPredictor with our checkpointer, checks and options."""

from rt_detectron.engine.lazy import build_lazy_model, do_test, do_train, load_lazy_config, write_lazy_results
from rt_detectron.engine.optimizer import backbone_factor
from rt_detectron.engine.predictor import Predictor, load_predictors
from rt_detectron.engine.results import write_results
from rt_detectron.engine.trainer import Trainer, load_config

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
