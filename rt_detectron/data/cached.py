"""Annotation files that are made from others, once, in the user's cache."""

import json
import os
import re
from collections.abc import Callable
from typing import Any

from rt_detectron.utils.files import cache_folder, locked, replaced_atomically, text_sha256

_LONGEST = 80  # characters of a dataset's name in that of its folder


def folder_name(name: str) -> str:
    """A name for a folder of that dataset: its own if it can be one, else with a digest behind."""
    readable = re.sub(r"[^\w.@-]", "_", name)[-_LONGEST:]
    return name if readable == name else f"{readable}-{text_sha256(name)[:8]}"


def cached_annotations(name: str, key: Any, make: Callable[[], dict]) -> tuple[str, dict[str, Any]]:
    """A COCO annotation file in ``$RT_DETECTRON_CACHE/datasets``, which is made if it is not there.

    Args:
        name: of the dataset; its folder's name begins with it.
        key: all that the content depends on, as JSON values.
        make: gives the content, images with "id", "file_name", "width" and "height" and so on.

    Returns:
        Its path, and Detectron2's metadata of its classes.

    Raises:
        InputError: as ``make``, and if the cache cannot be written.
    """
    digest = text_sha256(json.dumps(key))[:16]
    path = os.path.join(cache_folder("datasets"), f"{folder_name(name)}-{digest}", "annotations.json")
    categories_path = os.path.join(os.path.dirname(path), "categories.json")
    if not os.path.isfile(path):
        with locked(path, "set RT_DETECTRON_CACHE to a folder that can be written"):
            if not os.path.isfile(path):  # or else another process has written it meanwhile
                content = make()
                _write(categories_path, sorted(content["categories"], key=lambda category: category["id"]))
                _write(path, content)  # last, so that the categories are there if it is
    with open(categories_path) as file:
        categories = json.load(file)  # a small file: the classes are known without reading all annotations
    return path, {
        "thing_classes": [category["name"] for category in categories],
        "thing_dataset_id_to_contiguous_id": {category["id"]: i for i, category in enumerate(categories)},
    }


def _write(path: str, content) -> None:
    with replaced_atomically(path) as temporary, open(temporary, "w") as file:
        json.dump(content, file, separators=(",", ":"))
