"""Detectron2's DefaultTrainer with our checkpointer, checks and results file."""

from .results import write_results
from .trainer import Trainer, load_config

__all__ = ["Trainer", "load_config", "write_results"]
