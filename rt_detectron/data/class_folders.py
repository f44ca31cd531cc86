"""The images in class folders: listed once, and kept where all processes of a machine share them."""

import array
import logging
import os
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS, find_classes

from rt_detectron.data.cached import folder_name
from rt_detectron.utils.errors import InputError, one_line
from rt_detectron.utils.files import cache_folder, locked, printable, replaced_atomically, text_sha256

logger = logging.getLogger(__name__)

WORTH_KEEPING = 100_000  # images; fewer are listed in a second
_SETTLED = 2e9  # nanoseconds after which a change of a folder is sure to change its time, too
_SOON = 1.0  # seconds: who got the lock in this time did not wait for it
_VERSION = 1  # of the file's contents


class ImageList(Sequence[tuple[str, int]]):
    """Path and class of each image.

    Worker processes share it without a copy: to read an item of a Python list writes its reference count, and
    so copies its page into each worker, one by one. This one's names lie in one tensor.

    Args:
        root: the folder.
        names: paths below it, one after the other, uint8.
        ends: where each one ends, int64 (N,).
        classes: class index of each, int32 (N,).
    """

    def __init__(self, root: str, names: Tensor, ends: Tensor, classes: Tensor):
        self.root = root
        self.names = names
        self.ends = ends
        self.classes = classes

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = range(len(self))[index]  # an IndexError beyond the last
        start = int(self.ends[index - 1]) if index else 0
        name = self.names[start : int(self.ends[index])].numpy().tobytes()
        return os.path.join(self.root, os.fsdecode(name)), int(self.classes[index])


def list_images(root: str) -> tuple[list[str], ImageList]:
    """The class folders of ``root``, sorted, and the images below them, as torchvision's ImageFolder does.

    A large list is kept in ``$RT_DETECTRON_CACHE/folders``, so that one process reads the folders and the
    others map its file. It is made again when a folder has changed since, by its modification time.

    Raises:
        InputError: if there is no such folder, no class folder, or one without images.
    """
    if not os.path.isdir(root):
        raise InputError(f"{root}: no such folder; datasets/README.md shows the expected tree")
    try:
        classes, _ = find_classes(root)
    except FileNotFoundError:
        raise InputError(
            f"{root}: expected class folders, each with images; datasets/README.md shows the tree"
        ) from None
    first = os.path.join(root, classes[0])
    if len(classes) * sum(1 for _ in os.scandir(first)) < WORTH_KEEPING:  # about so many images
        return _images(root, _read(root, classes))
    name = os.path.basename(os.path.realpath(root))
    try:
        folder = cache_folder("folders")
        path = os.path.join(folder, f"{folder_name(name)}-{text_sha256(os.path.realpath(root))[:16]}.pt")
        listing, asked = _kept(path, root), time.monotonic()
        if listing is None:
            with locked(path, "set RT_DETECTRON_CACHE to a folder that can be written"):
                listing = _kept(path, root)  # another process may have made it meanwhile
                if listing is None and time.monotonic() - asked < _SOON:
                    listing = _make(root, classes, path)
        if listing is None:  # another process has, but could not keep it: no reason to queue
            listing = _read(root, classes)
    except (InputError, OSError) as error:  # it works without, only more slowly
        logger.warning("The list of %s is not kept: %s", printable(root), one_line(error))
        listing = _read(root, classes)
    return _images(root, listing)


def _images(root: str, listing: dict[str, Any]) -> tuple[list[str], ImageList]:
    classes = [os.fsdecode(name) for name in listing["classes"]]
    counts = torch.bincount(listing["labels"], minlength=len(classes)).tolist()
    if empty := [name for name, count in zip(classes, counts, strict=True) if not count]:
        raise InputError(
            f"{root}: no images of {printable(', '.join(empty))}; datasets/README.md shows the tree"
        )
    return classes, ImageList(root, listing["names"], listing["ends"], listing["labels"])


def _read(root: str, classes: list[str]) -> dict[str, Any]:
    """Reads all folders. Names are kept as bytes, since they need not be UTF-8."""
    names, ends, labels = bytearray(), array.array("q"), array.array("i")
    changed = {b".": os.stat(root).st_mtime_ns}
    for label, name in enumerate(classes):
        for folder, _, files in sorted(os.walk(os.path.join(root, name), followlinks=True)):
            below = os.path.relpath(folder, root)
            changed[os.fsencode(below)] = os.stat(folder).st_mtime_ns
            for file in sorted(files):
                if file.lower().endswith(IMG_EXTENSIONS):
                    names += os.fsencode(os.path.join(below, file))
                    ends.append(len(names))
                    labels.append(label)
    return {
        "version": _VERSION,
        "classes": [os.fsencode(name) for name in classes],
        "changed": changed,
        "names": torch.frombuffer(names or bytearray(1), dtype=torch.uint8),
        "ends": torch.tensor(ends, dtype=torch.int64),
        "labels": torch.tensor(labels, dtype=torch.int32),
    }


def _make(root: str, classes: list[str], path: str) -> dict[str, Any]:
    """Reads all folders and keeps the list, if a later change of them is sure to show in their times."""
    start = time.time_ns()
    listing = _read(root, classes)
    times = listing["changed"].values()
    if min(times) <= 0 or max(times) > start - _SETTLED:
        logger.info("The list of %s is not kept: it was changed just now, or has no times", printable(root))
        return listing
    with replaced_atomically(path) as temporary:
        torch.save(listing, temporary)
    return _kept(path, root) or listing


def _kept(path: str, root: str) -> dict[str, Any] | None:
    """The list in that file, mapped into memory; None if there is none, or folders have changed since."""
    if not os.path.isfile(path):
        return None
    try:
        listing = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        if listing["version"] != _VERSION:
            return None
        for folder, changed in listing["changed"].items():
            if os.stat(os.path.join(root, os.fsdecode(folder))).st_mtime_ns != changed:
                return None
    except Exception as error:  # a folder that is gone, or a damaged file
        logger.info("%s does not hold any more: %s", path, one_line(error))
        return None
    logger.info("%s: as listed in %s; delete that file to list it anew", printable(root), path)
    return listing
