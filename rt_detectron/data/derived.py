"""Datasets derived from registered ones by name, such as ``coco_2017_train@person@fit``."""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from functools import partial

from detectron2.data import MetadataCatalog
from detectron2.data.datasets import register_coco_instances

from rt_detectron.data.annotations import annotations_of, check_ids
from rt_detectron.data.cached import cached_annotations
from rt_detectron.utils.errors import InputError, did_you_mean

_VERSION = 1  # of the code below; part of the cache's key
_HELD_OUT = 0.2
# The derived set's own metadata. The rest, such as keypoint names, is copied from the base.
_OWN_METADATA = (
    "name",
    "json_file",
    "image_root",
    "evaluator_type",
    "thing_classes",
    "thing_colors",
    "thing_dataset_id_to_contiguous_id",
)


def register_derived(name: str, base: str, modifiers: Sequence[str]) -> None:
    """Register ``name``, BASE@MODIFIER[@MODIFIER ...], a COCO-format dataset made from the registered BASE.

    The modifiers apply from left to right:

    - ``@CATEGORY``: only the objects of a category (spaces as ``_``: ``@traffic_light``). All images
      are kept, those without it as negatives; in training, Detectron2 filters them out by default.
    - ``@any``: all categories merged into one, "object". Crowds stay crowds.
    - ``@held_out``, ``@fit``: a fixed fifth of the images, chosen by a hash of the image id, and the rest.

    The annotations are written once, to ``$RT_DETECTRON_CACHE/datasets`` (by default
    ``~/.cache/rt_detectron/datasets``). The folder's name depends on the base file's path, size and time of
    change.

    Raises:
        InputError: for a base that is not in COCO's format, an unknown modifier, or a split without images.
    """
    source = MetadataCatalog.get(base)
    if source.get("evaluator_type") != "coco" or source.get("json_file") is None:
        raise InputError(f"{name}: {base} is not in COCO's format; use a dataset of register_coco_instances")
    found = os.stat(source.json_file)
    key = [_VERSION, name, os.path.realpath(source.json_file), found.st_size, found.st_mtime_ns]
    path, classes = cached_annotations(name, key, partial(_derived, source.json_file, name, modifiers))
    shared = {key: value for key, value in source.as_dict().items() if key not in _OWN_METADATA}
    register_coco_instances(name, {**shared, **classes}, path, source.image_root)


def _derived(json_file: str, name: str, modifiers: Sequence[str]) -> dict:
    with annotations_of(json_file):
        with open(json_file, "rb") as file:
            content = json.load(file)
        check_ids(content, json_file)
        for modifier in modifiers:
            content = _SPLITS_AND_MERGES.get(modifier, partial(_only, modifier, name))(content)
        if not content["images"]:
            raise InputError(f"{name} has no image: {json_file} has too few to be split")
    return content


def _only(modifier: str, name: str, content: dict) -> dict:
    by_name = {category["name"].replace(" ", "_"): category for category in content["categories"]}
    if modifier not in by_name:
        known = [f"@{known}" for known in (*_SPLITS_AND_MERGES, *by_name)]
        raise InputError(
            f"{name}: unknown modifier @{modifier}; use @any, @fit, @held_out or @CATEGORY"
            f"{did_you_mean(f'@{modifier}', known)}"
        )
    category = by_name[modifier]
    kept = [found for found in content["annotations"] if found["category_id"] == category["id"]]
    return {**content, "categories": [category], "annotations": kept}


def _merged(content: dict) -> dict:
    kept = [{**annotation, "category_id": 1} for annotation in content["annotations"]]
    return {**content, "categories": [{"id": 1, "name": "object"}], "annotations": kept}


def _split(content: dict, held_out: bool) -> dict:
    """By rank of the hash, not by a threshold on it, so that small sets have a held-out part, too."""

    def rank(image_id) -> bytes:
        return hashlib.sha256(str(image_id).encode()).digest()

    ids = sorted((image["id"] for image in content["images"]), key=rank)
    count = max(1, round(_HELD_OUT * len(ids)))
    chosen = set(ids[:count] if held_out else ids[count:])
    images = [image for image in content["images"] if image["id"] in chosen]
    kept = [annotation for annotation in content["annotations"] if annotation["image_id"] in chosen]
    return {**content, "images": images, "annotations": kept}


_SPLITS_AND_MERGES: dict[str, Callable[[dict], dict]] = {
    "any": _merged,
    "fit": partial(_split, held_out=False),
    "held_out": partial(_split, held_out=True),
}
