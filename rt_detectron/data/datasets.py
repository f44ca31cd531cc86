"""The demo dataset, and checks of the datasets that a config names before anything slow begins."""

import math
import os

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog, get_detection_dataset_dicts
from detectron2.data.datasets import register_coco_instances

from rt_detectron.data.annotations import annotations_of
from rt_detectron.data.derived import register_derived
from rt_detectron.utils.errors import InputError, did_you_mean


def _register_demo(root: str) -> None:
    """rt_demo_train and rt_demo_val, as datasets/prepare_demo.py writes them to ``root``/demo."""
    folder = os.path.join(root, "demo", "detection")
    for split in ("train", "val"):
        annotations = os.path.join(folder, "annotations", f"instances_{split}.json")
        register_coco_instances(f"rt_demo_{split}", {}, annotations, os.path.join(folder, split))


_register_demo(os.path.expanduser(os.getenv("DETECTRON2_DATASETS", "datasets")))


def check_datasets(names) -> None:
    """Check that every dataset is registered and that its files exist.

    Derived datasets (:func:`rt_detectron.data.derived.register_derived`) are made and registered.

    Args:
        names: names in Detectron2's DatasetCatalog, or such names followed by ``@MODIFIER``.

    Raises:
        InputError: for an unknown dataset or a missing file.
    """
    for name in names:
        base = name if name in DatasetCatalog else name.partition("@")[0]
        _check_dataset(base)
        if base != name:
            register_derived(name)


def _check_dataset(name: str) -> None:
    if name not in DatasetCatalog:
        hint = did_you_mean(name, DatasetCatalog.list()) or "; register it, or use coco_2017_train"
        raise InputError(f"dataset {name!r} is not registered{hint}")
    metadata = MetadataCatalog.get(name)
    for path in (metadata.get("json_file"), metadata.get("image_root")):
        if path is not None and not os.path.exists(path):
            raise InputError(
                f"dataset {name} needs {path}, which does not exist; set DETECTRON2_DATASETS to the "
                "folder that holds it (datasets/README.md shows the tree)"
            )


def load_training_set(cfg: CfgNode) -> list[dict]:
    """The dataset dicts of ``cfg.DATASETS.TRAIN``, filtered as in Detectron2, and checked.

    Raises:
        InputError: for an annotation file that cannot be parsed, annotations without boxes, no annotated
            image, or a class count that differs from the model's.
    """
    files = [str(MetadataCatalog.get(name).get("json_file", name)) for name in cfg.DATASETS.TRAIN]
    with annotations_of(", ".join(files)):
        dicts = get_detection_dataset_dicts(
            cfg.DATASETS.TRAIN,
            filter_empty=cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS,
            min_keypoints=cfg.MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE if cfg.MODEL.KEYPOINT_ON else 0,
            proposal_files=cfg.DATASETS.PROPOSAL_FILES_TRAIN if cfg.MODEL.LOAD_PROPOSALS else None,
        )
    for image in dicts:
        for number, annotation in enumerate(image.get("annotations", [])):
            if not _is_box(annotation.get("bbox")):
                raise InputError(
                    f"{image['file_name']}: annotation {number} has no box; every annotation of a training "
                    "set needs a 'bbox' of four numbers"
                )
    _check_num_classes(cfg)
    return dicts


def _is_box(value) -> bool:
    try:
        return len(value) == 4 and all(map(math.isfinite, value))
    except TypeError:  # not a sequence of numbers
        return False


def _check_num_classes(cfg: CfgNode) -> None:
    key = {"GeneralizedRCNN": "ROI_HEADS", "RetinaNet": "RETINANET"}.get(cfg.MODEL.META_ARCHITECTURE)
    if key is None:
        return
    found = cfg.MODEL[key].NUM_CLASSES
    for name in cfg.DATASETS.TRAIN:
        classes = MetadataCatalog.get(name).get("thing_classes")
        if classes is not None and len(classes) != found:
            raise InputError(
                f"MODEL.{key}.NUM_CLASSES is {found}, but {name} has {len(classes)} classes; "
                f"set MODEL.{key}.NUM_CLASSES {len(classes)}"
            )
