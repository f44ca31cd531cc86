"""Datasets by name. Importing this registers them, as importing detectron2.data registers Detectron2's."""

from rt_detectron.data.corruptions import CorruptionMapper, corruption_names
from rt_detectron.data.datasets import check_datasets, load_training_set

__all__ = ["CorruptionMapper", "check_datasets", "corruption_names", "load_training_set"]
