"""Datasets by name. Importing this registers them, as importing detectron2.data registers Detectron2's."""

from .datasets import check_datasets, load_training_set

__all__ = ["check_datasets", "load_training_set"]
