"""The demo dataset, COCO-O, and checks of the datasets that a config names before anything slow begins."""

import json
import logging
import os
from collections import Counter
from collections.abc import Sequence

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog, get_detection_dataset_dicts
from detectron2.data.datasets import register_coco_instances

from rt_detectron.data.annotations import annotations_of, check_objects, warn_of_boxes_outside
from rt_detectron.data.coco_o import register_coco_o
from rt_detectron.data.derived import register_derived
from rt_detectron.data.image_files import check_images
from rt_detectron.data.own import FORMS, is_own, register_own, split_modifiers
from rt_detectron.utils.errors import InputError, did_you_mean

logger = logging.getLogger(__name__)


def _register_demo(root: str) -> None:
    """rt_demo_train and rt_demo_val, as datasets/prepare_demo.py writes them to ``root``/demo."""
    folder = os.path.join(root, "demo", "detection")
    for split in ("train", "val"):
        annotations = os.path.join(folder, "annotations", f"instances_{split}.json")
        register_coco_instances(f"rt_demo_{split}", {}, annotations, os.path.join(folder, split))


_ROOT = os.path.expanduser(os.getenv("DETECTRON2_DATASETS", "datasets"))
_register_demo(_ROOT)
register_coco_o(_ROOT)


def check_datasets(names) -> None:
    """Check that every dataset is registered and that its files exist.

    Own data (:func:`rt_detectron.data.own.register_own`) and derived datasets
    (:func:`rt_detectron.data.derived.register_derived`) are registered.

    Args:
        names: names in Detectron2's DatasetCatalog, or ``FORMAT:PATH[:PATH]``, or either with ``@MODIFIER``.

    Raises:
        InputError: for an unknown dataset, a missing file, or own data that cannot be read.
    """
    for name in names:
        base, modifiers = split_modifiers(name)
        if is_own(base):
            register_own(base)
        _check_dataset(base)
        if modifiers:
            register_derived(name, base, modifiers)


def _check_dataset(name: str) -> None:
    if name not in DatasetCatalog:
        forms = ", ".join(FORMS.values())
        hint = did_you_mean(name, DatasetCatalog.list()) or f"; register it, or name your data by {forms}"
        raise InputError(f"dataset {name!r} is not registered{hint}")
    metadata = MetadataCatalog.get(name)
    for path in (metadata.get("json_file"), metadata.get("image_root")):
        if path is not None and not os.path.exists(path):
            way_out = (
                "set DETECTRON2_DATASETS to the folder that holds it (datasets/README.md shows the tree)"
                if name.partition(":")[0] not in FORMS
                else "paths are relative to the current folder"
            )
            raise InputError(f"dataset {name} needs {path}, which does not exist; {way_out}")


def load_training_set(cfg: CfgNode) -> list[dict]:
    """The dataset dicts of ``cfg.DATASETS.TRAIN``, filtered as in Detectron2, and checked.

    Raises:
        InputError: for an annotation file that cannot be parsed, objects without what the detector needs, no
            annotated image, images that cannot be read or do not fit (:func:`.check_images`), or a class
            count that differs from the model's.
    """
    with annotations_of(_files(cfg.DATASETS.TRAIN)):
        records = get_detection_dataset_dicts(
            cfg.DATASETS.TRAIN,
            filter_empty=cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS,
            min_keypoints=cfg.MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE if cfg.MODEL.KEYPOINT_ON else 0,
            proposal_files=cfg.DATASETS.PROPOSAL_FILES_TRAIN if cfg.MODEL.LOAD_PROPOSALS else None,
        )
    if not isinstance(records, list):
        return records  # a torch Dataset of the user's, which may have no end
    _check_objects(cfg, records)
    warn_of_boxes_outside(records, ", ".join(cfg.DATASETS.TRAIN))
    for name in cfg.DATASETS.TRAIN:
        _check_classes(cfg, name)
    return check_images(records, cfg.INPUT.ON_CORRUPT)


def load_test_set(cfg: CfgNode, name: str, with_objects: bool = False) -> list[dict]:
    """The dataset dicts of a test set, checked. Images that cannot be read are never skipped.

    Args:
        name: one of ``cfg.DATASETS.TEST``.
        with_objects: whether the detector is given the objects, as attacks need them.

    Raises:
        InputError: as :func:`load_training_set`, and for classes that differ from the training set's.
    """
    proposals = dict(zip(cfg.DATASETS.TEST, cfg.DATASETS.PROPOSAL_FILES_TEST, strict=False))
    with annotations_of(_files([name])):
        records = get_detection_dataset_dicts(
            name,
            filter_empty=False,
            proposal_files=[proposals[name]] if cfg.MODEL.LOAD_PROPOSALS else None,
        )
    if not isinstance(records, list):
        return records
    if with_objects:
        _check_objects(cfg, records)
    _check_classes(cfg, name)
    return check_images(records, skipping="")


def classes_of(name: str) -> list[str] | None:
    """The classes of a dataset by index, those of things; None if it has none, or is not there.

    Args:
        name: as for :func:`check_datasets`.
    """
    try:
        return _read_classes(name, "thing_classes")
    except InputError:
        return None


def _read_classes(name: str, kind: str) -> list[str] | None:
    """The metadata's "thing_classes" or "stuff_classes", from the annotations if they are not built in."""
    if name in DatasetCatalog and (known := MetadataCatalog.get(name).get(kind)):
        return known  # of COCO and others, and of what has been loaded
    check_datasets([name])
    metadata = MetadataCatalog.get(name)
    if metadata.get(kind) is None and metadata.get("evaluator_type") == "coco" and kind == "thing_classes":
        with annotations_of(metadata.json_file), open(metadata.json_file, "rb") as file:
            categories = json.load(file)["categories"]
            return [category["name"] for category in sorted(categories, key=lambda each: each["id"])]
    if metadata.get(kind) is None:
        with annotations_of(_files([name])):
            DatasetCatalog.get(name)  # reading the annotations sets them
    return metadata.get(kind)


def count_classes(name: str, key: str, kind: str = "thing_classes") -> int:
    """The number of classes of a training set, for a configuration key that is 0.

    Args:
        name: of the set, as for :func:`check_datasets`.
        key: for messages.
        kind: "thing_classes", or "stuff_classes" for semantic segmentation.

    Raises:
        InputError: if the set, or its classes, are not there.
    """
    try:
        classes = _read_classes(name, kind)
    except InputError as error:
        raise InputError(f"{key} is 0, to have as many classes as the training set, but {error}") from None
    if not classes:
        raise InputError(f"{key} is 0, but the training set {name} has no {kind}: give their number")
    return len(classes)


def set_num_classes(cfg: CfgNode) -> None:
    """Give each of the model's NUM_CLASSES that is 0 the number that ``cfg.DATASETS.TRAIN`` has.

    Raises:
        InputError: as :func:`count_classes`.
    """
    kinds = {"ROI_HEADS": "thing_classes", "RETINANET": "thing_classes", "SEM_SEG_HEAD": "stuff_classes"}
    for part, kind in kinds.items():
        if cfg.MODEL[part].NUM_CLASSES == 0:
            key = f"MODEL.{part}.NUM_CLASSES"
            if not cfg.DATASETS.TRAIN:
                raise InputError(f"{key} is 0, but there is no training set to take it from: give the number")
            cfg.MODEL[part].NUM_CLASSES = count_classes(cfg.DATASETS.TRAIN[0], key, kind)


def _files(names: Sequence[str]) -> str:
    return ", ".join(str(MetadataCatalog.get(name).get("json_file", name)) for name in names)


def _check_objects(cfg: CfgNode, records: list[dict]) -> None:
    check_objects(
        records,
        mask_format=cfg.INPUT.MASK_FORMAT if cfg.MODEL.MASK_ON else None,
        keypoints=cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS if cfg.MODEL.KEYPOINT_ON else 0,
    )


def _check_classes(cfg: CfgNode, name: str) -> None:
    parts = {"GeneralizedRCNN": "ROI_HEADS", "PanopticFPN": "ROI_HEADS", "RetinaNet": "RETINANET"}
    part = parts.get(cfg.MODEL.META_ARCHITECTURE)
    count = cfg.MODEL[part].NUM_CLASSES if part else None
    check_classes(name, f"MODEL.{part}.NUM_CLASSES", count, cfg.DATASETS.TRAIN)
    if cfg.MODEL.META_ARCHITECTURE in ("SemanticSegmentor", "PanopticFPN"):
        _check_segments(name, cfg.MODEL.META_ARCHITECTURE, cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES)


def _check_segments(name: str, kind: str, count: int) -> None:
    """Check that a dataset has the classes of a model of this kind with semantic segmentation."""
    classes = MetadataCatalog.get(name).get("stuff_classes")
    if classes is None:
        raise InputError(f"{name} has no semantic segmentation, which a {kind} needs")
    if count != len(classes):
        raise InputError(
            f"MODEL.SEM_SEG_HEAD.NUM_CLASSES is {count}, but {name} has {len(classes)} classes; a test set "
            "needs the model's classes in the same order"
        )


def check_classes(name: str, key: str, count: int | None, training: Sequence[str]) -> None:
    """Check that a dataset that was loaded has the detector's classes.

    AP compares classes by their index, so a test set must number them as the training set does. The training
    set of a detector that is only evaluated may be missing, or be that of another one, which shows in its
    number of classes.

    Args:
        name: of the dataset.
        key: the configuration key of the model's number of classes.
        count: its value; None if the detector has no such number.
        training: names of the training sets.

    Raises:
        InputError: for another number of classes; for a test set also for other names or another order.
    """
    classes = MetadataCatalog.get(name).get("thing_classes")
    if classes is None:
        return
    if count not in (None, len(classes)):
        way_out = f"set {key} {len(classes)}"
        if name not in training:
            way_out = (
                f"a test set needs the detector's classes in the same order; if it has, {way_out}; "
                f"if it has one of them, use {name}@CATEGORY"
            )
        raise InputError(f"{key} is {count}, but {name} has {len(classes)} classes; {way_out}")
    if doubles := sorted(name for name, number in Counter(classes).items() if number > 1):
        logger.warning("%s has several classes %s: AP by class is the last one's", name, ", ".join(doubles))
    for other in training[:1]:
        known = classes_of(other)
        if not known or len(known) != len(classes) or list(known) == list(classes):
            continue
        index = next(i for i in range(len(known)) if known[i] != classes[i])
        raise InputError(
            f"{name} has other classes than the training set {other}, or in another order: class {index} is "
            f"{classes[index]!r}, not {known[index]!r}; list the same categories, in the same order of their "
            "ids, in both"
        )
