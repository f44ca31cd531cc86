"""Detectron2's DefaultTrainer and DefaultPredictor with our checkpointer, checks and results file."""

from .predictor import Predictor, load_predictors
from .results import write_results
from .trainer import Trainer, load_config

__all__ = ["Predictor", "Trainer", "load_config", "load_predictors", "write_results"]
