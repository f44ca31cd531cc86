"""Own data by name: ``FORMAT:PATH[:PATH]`` wherever a dataset is named, without registering it in code."""

import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from detectron2.data import DatasetCatalog
from detectron2.data.datasets import register_coco_instances

from rt_detectron.data.cached import cached_annotations
from rt_detectron.data.formats import IMAGE_ENDINGS, READERS
from rt_detectron.utils.errors import InputError

FORMS = {
    "coco": "coco:ANNOTATIONS.json:IMAGES_FOLDER",
    "voc": "voc:FOLDER:SPLIT",
    "yolo": "yolo:FOLDER:SPLIT",
    "labelme": "labelme:FOLDER",
}
_VERSION = 1  # of the readers; part of the cache's key


def is_own(name: str) -> bool:
    """Whether the name is of the form ``FORMAT:...``, also with modifiers behind it."""
    return name.partition(":")[0] in FORMS and name not in DatasetCatalog


def split_modifiers(name: str) -> tuple[str, list[str]]:
    """``BASE@MODIFIER@MODIFIER`` to the base and its modifiers.

    The last path of an own set may hold ``@`` itself: the longest that exists is taken.
    """
    if name in DatasetCatalog:
        return name, []
    before, colon, last = name.rpartition(":") if is_own(name) else ("", "", name)
    parts = last.split("@")
    for count in range(len(parts), 1, -1) if colon else ():
        if os.path.exists(os.path.expanduser("@".join(parts[:count]))):
            return f"{before}:{'@'.join(parts[:count])}", parts[count:]
    return before + colon + parts[0], parts[1:]


def register_own(name: str) -> None:
    """Register an own set as a COCO-format one, without modifiers. Paths may begin with ``~``.

    Annotations in other formats than COCO's are read once, and kept where derived sets are
    (:func:`rt_detectron.data.derived.register_derived`), until one of their files changes.

    Raises:
        InputError: for a name of another form, missing files, and what the reader cannot read.
    """
    kind, *parts = name.split(":")
    paths = [os.path.expanduser(part) for part in parts]
    if kind == "coco":
        if len(parts) != 2:
            raise InputError(f"dataset {name}: write {FORMS[kind]}")
        register_coco_instances(name, {}, *paths)
        return
    folder, split = (*paths, "", "")[:2]
    if len(parts) not in (1, 2) or not folder or (kind == "voc" and not split):
        raise InputError(f"dataset {name}: write {FORMS[kind]}")
    if not os.path.isdir(folder):
        raise InputError(f"dataset {name}: there is no folder {folder}")
    key = [_VERSION, kind, split, os.path.realpath(folder), *_files(folder)]
    path, classes = cached_annotations(name, key, partial(READERS[kind], Path(folder), split))
    register_coco_instances(name, classes, path, folder)


def _files(folder: str) -> Iterator[tuple]:
    """Path, size and time of change of all files that are no images; of these the paths."""
    for parent, folders, names in os.walk(folder):
        folders.sort()
        for name in sorted(names):
            path = os.path.join(parent, name)
            if name.lower().endswith(IMAGE_ENDINGS) or not os.path.exists(path):  # a link to nowhere
                yield (path,)
            else:
                found = os.stat(path)
                yield path, found.st_size, found.st_mtime_ns
