"""Data of classification and detection. Importing this registers the demo set and COCO-O with Detectron2."""

from rt_detectron.data.annotations import check_objects
from rt_detectron.data.cached import folder_name
from rt_detectron.data.corruptions import CorruptionMapper, corruption_names
from rt_detectron.data.datasets import (
    check_classes,
    check_datasets,
    classes_of,
    count_classes,
    load_test_set,
    load_training_set,
    set_num_classes,
)
from rt_detectron.data.image_files import CheckedMapper, check_images

__all__ = [
    "CheckedMapper",
    "CorruptionMapper",
    "check_classes",
    "check_datasets",
    "check_images",
    "check_objects",
    "classes_of",
    "corruption_names",
    "count_classes",
    "folder_name",
    "load_test_set",
    "load_training_set",
    "set_num_classes",
]
