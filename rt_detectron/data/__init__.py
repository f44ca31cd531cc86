"""Data of classification and detection. Importing this registers the demo dataset with Detectron2."""

from rt_detectron.data.corruptions import CorruptionMapper, corruption_names
from rt_detectron.data.datasets import check_datasets, load_training_set

__all__ = ["CorruptionMapper", "check_datasets", "corruption_names", "load_training_set"]
