"""The loaders of a LazyConfig, whose data sets, annotations and images are checked."""

from collections.abc import Iterable
from inspect import signature

import numpy as np
from detectron2.data import DatasetMapper
from detectron2.data.transforms import AugInput
from omegaconf import OmegaConf

from rt_detectron.data import CheckedMapper, check_classes, check_images, check_objects, count_classes
from rt_detectron.data.annotations import annotations_of
from rt_detectron.detection.adversarial import ATTACKED
from rt_detectron.engine.lazy_config import build
from rt_detectron.evaluation import COCOEvaluator, LVISEvaluator
from rt_detectron.evaluation.robustness.test_set import DetectionTestSet
from rt_detectron.utils.errors import InputError, building
from rt_detectron.utils.seeds import all_seeded

SKIPPING = "train.on_corrupt=skip"
# The keys of a model's number of classes, and which of a data set's classes they count.
_CLASS_KEYS = {
    "model.roi_heads.num_classes": "thing_classes",
    "model.num_classes": "thing_classes",  # RetinaNet, FCOS
    "model.sem_seg_head.num_classes": "stuff_classes",
}


def dataset_names(cfg, split: str) -> list[str]:
    """Names of the "train" or "test" sets, if ``cfg.dataloader`` has them."""
    names = OmegaConf.select(cfg, f"dataloader.{split}.dataset.names") or []
    return [names] if isinstance(names, str) else list(names)


def set_num_classes(cfg) -> None:
    """Give each of the model's num_classes that is 0 the number that the training set has.

    Raises:
        InputError: as :func:`rt_detectron.data.count_classes`.
    """
    for key, kind in _CLASS_KEYS.items():
        names = dataset_names(cfg, "train")
        if names and OmegaConf.select(cfg, key) == 0:
            OmegaConf.update(cfg, key, count_classes(names[0], key, kind))


def build_lazy_loader(cfg, split: str) -> Iterable:
    """The loader ``cfg.dataloader.train`` or ``.test``.

    Images that cannot be read stop a training, or are left out for train.on_corrupt "skip".

    Raises:
        InputError: as :func:`rt_detectron.data.load_training_set`, which does the same for YAML configs.
    """
    node, names = cfg.dataloader[split], dataset_names(cfg, split)
    if not names or "mapper" not in node:
        return build(node, f"dataloader.{split}")
    with annotations_of(", ".join(names)):
        records = build(node.dataset, f"dataloader.{split}.dataset")
    if not isinstance(records, list):  # a torch Dataset of the user's, which may have no end
        return build(node, f"dataloader.{split}")
    mapper = build(node.mapper, f"dataloader.{split}.mapper")
    _try_augmentations(mapper, f"dataloader.{split}.mapper.augmentations")
    for name in names:
        key = next((key for key in _CLASS_KEYS if OmegaConf.select(cfg, key) is not None), "")
        check_classes(name, key, OmegaConf.select(cfg, key) if key else None, dataset_names(cfg, "train"))
    policy, skipping = "stop", ""
    if split == "train":
        policy, skipping = cfg.train.get("on_corrupt", "stop"), SKIPPING
        masks = getattr(mapper, "use_instance_mask", False)  # a mapper of the user's may not have it
        check_objects(records, _mask_format(mapper) if masks else None)
    records = check_images(records, policy, skipping)
    checked = {**node, "dataset": records, "mapper": CheckedMapper(mapper, policy, skipping)}
    return build(checked, f"dataloader.{split}")


def _try_augmentations(mapper, key: str) -> None:
    """Have Detectron2's augmentations change an image: some refuse their numbers only then."""
    image = np.zeros((480, 640, 3), np.uint8)
    for number, each in enumerate(mapper.augmentations.augs if isinstance(mapper, DatasetMapper) else ()):
        is_detectron2s = type(each).__module__.startswith("detectron2.")
        if is_detectron2s and list(signature(each.get_transform).parameters) == ["image"]:
            with all_seeded(0), building(f"{key}.{number}", f"{key}.{number}"):
                each(AugInput(image))


def attackable_test_set(cfg) -> DetectionTestSet:
    """The images of ``cfg.dataloader.test`` with their objects, as the training loader gives those."""
    node = cfg.dataloader.test
    kinds = ("use_instance_mask", "use_keypoint", "instance_mask_format", "keypoint_hflip_indices")
    of_training = cfg.dataloader.train.mapper
    objects = {kind: of_training[kind] for kind in kinds if kind in of_training}
    mapper = build({**node.mapper, **objects, "is_train": True}, "dataloader.test.mapper")
    evaluator = dict(cfg.dataloader.evaluator)
    if evaluator.get("output_dir"):
        evaluator["output_dir"] += ATTACKED
    return DetectionTestSet(
        build(node.dataset, "dataloader.test.dataset"),
        build(evaluator, "dataloader.evaluator"),
        mapper,
        num_workers=node.get("num_workers", 0),
    )


def _mask_format(mapper) -> str:
    found = mapper.instance_mask_format
    if found not in ("polygon", "bitmask"):
        raise InputError(f"the mapper's instance_mask_format is {found!r}; it must be polygon or bitmask")
    return found


def check_lazy_test_set(cfg) -> None:
    """Check that the test set can be evaluated, by all that needs no detector.

    Raises:
        InputError: as :func:`rt_detectron.evaluation.build.check_test_sets`.
    """
    if "evaluator" not in cfg.dataloader:
        return
    build_lazy_loader(cfg, "test")
    evaluator = build(cfg.dataloader.evaluator, "dataloader.evaluator")
    if isinstance(evaluator, COCOEvaluator | LVISEvaluator):
        heads = OmegaConf.select(cfg, "model.roi_heads") or {}
        evaluator.check_shapes(masks="mask_head" in heads, keypoints="keypoint_head" in heads)
