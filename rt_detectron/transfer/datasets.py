"""The classification data sets of the transfer study by name, with the splits of the literature."""

import functools
import hashlib
import json
import logging
import os
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import chain
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset
from torchvision.transforms.v2.functional import resize

from rt_detectron.data.images import decode
from rt_detectron.transfer.sets import TRANSFER_SETS, Listing
from rt_detectron.utils.errors import InputError, did_you_mean, one_line
from rt_detectron.utils.files import locked, printable

logger = logging.getLogger(__name__)

SPLITS = ("train", "test", "fit", "held_out")
HELD_OUT = 0.2  # of each class of "train"


class _Sample(NamedTuple):
    image: str | bytes | np.ndarray  # as in Listing
    label: int
    key: str


class ClassificationDataset(Dataset):
    """Images and labels of one split of a data set; made by :func:`classification_dataset`.

    ``dataset[i]`` is (transformed image, label, key); the key is the image's name below the data set's root.

    Attributes:
        name: of the data set.
        classes: names of the classes, by index.
        metric: "top1" or "mean_per_class", the accuracy that the literature reports.
        labels: class indices of all images.
        keys: keys of all images.
    """

    def __init__(
        self,
        name: str,
        classes: list[str],
        metric: str,
        samples: list[_Sample],
        transform: Callable | None,
        downscale: int | None,
    ):
        self.name = name
        self.classes = classes
        self.metric = metric
        self.transform = transform
        self.downscale = downscale
        self.labels = [sample.label for sample in samples]
        self.keys = [sample.key for sample in samples]
        self._images = [sample.image for sample in samples]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int, str]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        image = self._decode(index)
        if self.downscale is not None and min(image.shape[1:]) > self.downscale:
            image = resize(image, [self.downscale])
        if self.transform is not None:
            image = self.transform(image)
        return image, self.labels[index], self.keys[index]

    def fingerprint(self) -> str:
        """SHA-256 of what determines images and labels, except the transform.

        Images in memory enter with their content, files with their size and modification time.
        """
        digest = hashlib.sha256(json.dumps([self.name, self.classes, self.downscale]).encode())
        for image, label, key in zip(self._images, self.labels, self.keys, strict=True):
            if isinstance(image, bytes | np.ndarray):
                digest.update(image if isinstance(image, bytes) else image.tobytes())
            else:
                found = os.stat(image)
                digest.update(os.fsencode(f"{os.path.abspath(image)} {found.st_size} {found.st_mtime_ns}"))
            digest.update(f"{label} {key}".encode())
        return digest.hexdigest()

    def _decode(self, index: int) -> torch.Tensor:
        """uint8 RGB (3, H, W)."""
        image = self._images[index]
        if isinstance(image, np.ndarray):
            return torch.from_numpy(image).permute(2, 0, 1).contiguous()
        try:
            if not isinstance(image, bytes):
                with open(image, "rb") as file:
                    image = file.read()
            return decode(image)
        except OSError as error:
            raise InputError(
                f"{self.name}: {self.keys[index]} cannot be read ({one_line(error)}); get it again"
            ) from error


def classification_dataset(
    name: str,
    split: str,
    root: str = "datasets",
    download: bool = False,
    transform: Callable | None = None,
    downscale: int | None = None,
    classes: Sequence[str | int] | None = None,
    per_class: int | None = None,
) -> ClassificationDataset:
    """A map-style data set of :data:`rt_detectron.transfer.sets.TRANSFER_SETS`, or a custom one.

    Args:
        name: "aircraft", "birdsnap", "caltech101", "caltech256", "cars", "cifar10", "cifar100", "dtd",
            "flowers", "food101", "pets", "sun397"; "folder" for class folders below ``root/train`` and
            ``root/test`` (or ``val``), "shards" for WebDataset shards ``root/*train-*.tar`` and
            ``root/*test-*.tar`` (or ``val``), which are read into memory undecoded.
        split: "train" or "test", as in the literature; "fit" or "held_out", a fixed 80 % and 20 % of each
            class of "train", for choosing hyperparameters.
        root: the folder that holds the folders of the data sets, or the custom data set itself.
        download: download the set from its authors if it is missing. You must comply with its licence.
        transform: of a uint8 RGB tensor (3, H, W); None leaves it as it is.
        downscale: short side in pixels to which larger images are resized before the transform.
        classes: names or indices of the classes to keep, renumbered from 0 in this order.
        per_class: number of images to keep of each class of "train", always the same ones; None keeps all.

    Raises:
        InputError: for an unknown name, split or class, and for a set that is missing, damaged or cannot be
            downloaded; from ``dataset[i]``, for an image that cannot be read.
    """
    if name not in TRANSFER_SETS:
        hint = did_you_mean(name, TRANSFER_SETS)
        raise InputError(f"unknown data set {name!r}; known are {', '.join(TRANSFER_SETS)}{hint}")
    if split not in SPLITS:
        raise InputError(f"unknown split {split!r} of {name}: {', '.join(SPLITS)}")
    if downscale is not None and downscale < 1:
        raise InputError(f"downscale is {downscale}: give the short side in pixels, such as 32, or null")
    if per_class is not None and per_class < 1:
        raise InputError(f"per_class is {per_class}: give a number of images from 1 on, or null")
    samples, names = _read(name, "test" if split == "test" else "train", root, download)
    if per_class is not None and split != "test":
        samples = _divided(samples, lambda positions: positions[:per_class])
    if split in ("fit", "held_out"):
        samples = _divided(samples, _held_out if split == "held_out" else _fit)
    if classes is not None:
        samples, names = _only(classes, samples, names, name)
    if not samples:
        raise InputError(f"{name} in {root} has no images for {split!r}: see datasets/README.md")
    return ClassificationDataset(name, names, TRANSFER_SETS[name].metric, samples, transform, downscale)


def _read(name: str, split: str, root: str, download: bool) -> tuple[list[_Sample], list[str]]:
    """The samples of "train" or "test", and the names of the classes."""
    entry = TRANSFER_SETS[name]
    folder = os.path.join(root, entry.folder)
    expected = f"expected {os.path.join(folder, entry.tree)}"
    way_out = f"not to be downloaded here, {entry.by_hand}" if entry.by_hand else "set dataset.download=true"
    download = download and not entry.by_hand
    if not download and not os.path.isdir(folder):
        raise InputError(f"{name} is not in {root}: {expected} ({way_out}; see datasets/README.md)")
    arguments = {"root": root, **({} if entry.by_hand else {"download": download})}
    lock: AbstractContextManager = nullcontext()
    if download:  # by one process at a time: trials of a study write the same files
        lock = locked(folder, "set dataset.download=false, or choose another dataset.root")
    # Broad, since torchvision, scipy and the network raise all kinds of errors, and only the user can replace
    # a damaged or missing set.
    try:
        with lock:
            parts = [entry.reader(**arguments, **part) for part in getattr(entry, split)]
        listings = [entry.listing(part) if entry.listing else part for part in parts]
    except InputError:
        raise
    except Exception as error:
        problem = "cannot be downloaded" if download else "cannot be read"
        raise InputError(
            f"{name} in {root} {problem} ({one_line(error)[:200]}): {expected}; see datasets/README.md"
        ) from error
    if any(list(listing.classes) != list(listings[0].classes) for listing in listings):
        raise InputError(f"{name} in {root}: its parts have different classes; {expected}, whole")
    samples = [sample for listing in listings for sample in _samples(listing, root)]
    if entry.drawn:
        samples = sorted(samples, key=lambda sample: sample.key)  # files come in any order
        samples = _divided(samples, functools.partial(_drawn, *entry.drawn, split))
    published = entry.sizes and entry.sizes[split == "test"]
    if published not in (None, len(samples)):
        logger.warning(
            "%s in %s has %d images for %s, where the literature has %d: the accuracies are not comparable",
            name, root, len(samples), split, published,
        )  # fmt: skip
    return samples, [printable(name) for name in listings[0].classes]


def _samples(listing: Listing, root: str) -> list[_Sample]:
    keys = listing.keys or [printable(os.path.relpath(str(path), root)) for path in listing.images]
    labels = map(int, listing.labels)
    return [_Sample(*sample) for sample in zip(listing.images, labels, keys, strict=True)]


def _divided(samples: list[_Sample], chosen: Callable[[list[int]], list[int]]) -> list[_Sample]:
    """The samples that ``chosen`` selects from each class, in the order of ``samples``.

    ``chosen`` gets the positions of a class in a fixed but arbitrary order, by the hashes of their keys.
    Unlike a random generator, this selects the same images with every version of every library.
    """

    def rank(position: int) -> bytes:
        return hashlib.sha256(os.fsencode(samples[position].key)).digest()

    positions = defaultdict(list)
    for position in sorted(range(len(samples)), key=rank):
        positions[samples[position].label].append(position)
    return [samples[position] for position in sorted(chain.from_iterable(map(chosen, positions.values())))]


def _drawn(num_train: int, num_test: int | None, split: str, positions: list[int]) -> list[int]:
    if split == "train":
        return positions[:num_train]
    return positions[num_train:][:num_test]


def _held_out(positions: list[int]) -> list[int]:
    """A fifth, but at least one image, unless there is only one."""
    return positions[: max(round(HELD_OUT * len(positions)), min(1, len(positions) - 1))]


def _fit(positions: list[int]) -> list[int]:
    return positions[len(_held_out(positions)) :]


def _only(
    classes: Sequence[str | int], samples: list[_Sample], names: list[str], dataset: str
) -> tuple[list[_Sample], list[str]]:
    """The samples of these classes, renumbered, and the names of the classes."""
    labels = []
    for choice in [classes] if isinstance(classes, str | int) else classes:
        if isinstance(choice, str) and choice in names:
            labels.append(names.index(choice))
        elif isinstance(choice, int) and 0 <= choice < len(names):
            labels.append(int(choice))
        else:
            raise InputError(
                f"{dataset} has no class {choice!r}; give names, such as {names[0]!r}, or indices of "
                f"0..{len(names) - 1}{did_you_mean(choice, names)}"
            )
    if len(set(labels)) < max(len(labels), 1):
        raise InputError(f"classes={list(classes)}: name at least one, and none of them twice")
    new = {label: index for index, label in enumerate(labels)}
    kept = [sample._replace(label=new[sample.label]) for sample in samples if sample.label in new]
    return kept, [names[label] for label in labels]
