"""The classification data sets of the transfer study: their files, splits and metrics.

The twelve are those of Salman et al., "Do Adversarially Robust ImageNet Models Transfer Better?" (2020): the
ones of Kornblith et al., "Do Better ImageNet Models Transfer Better?" (2019), table 1, with Caltech-256 in
place of PASCAL VOC. datasets/README.md shows the trees and says where the conventions come from.
"""

import functools
import os
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from torch.utils.data import Dataset
from torchvision import datasets as tv

from rt_detectron.data.images import FolderDataset, check_same_classes
from rt_detectron.data.shards import ShardDataset
from rt_detectron.utils.errors import InputError

_MOST_CLASSES = 100_000  # a class index of shards beyond it is a mistake


class Listing(NamedTuple):
    """The contents of a split, with images not yet decoded.

    Attributes:
        images: for each image its path, its encoded bytes, or its pixels, uint8 RGB (H, W, 3).
        labels: class indices.
        classes: their names.
        keys: names of the images; None for files, whose names are their paths below the root.
    """

    images: Sequence[str | bytes | np.ndarray]
    labels: Sequence[int]
    classes: Sequence[str]
    keys: Sequence[str] | None = None


def _listed(part: Dataset) -> Listing:
    """From the attributes that most of torchvision's data sets have."""
    return Listing(part._image_files, part._labels, part.classes)


def _caltech(part: Dataset, folder: str, name: str) -> Listing:
    """torchvision's Caltech data sets number the images of each class from 1."""
    files = [
        os.path.join(part.root, folder, part.categories[label], name.format(label=label + 1, index=index))
        for label, index in zip(part.y, part.index, strict=True)
    ]
    return Listing(files, part.y, part.categories)


def _cifar(part: Dataset) -> Listing:
    split = "train" if part.train else "test"
    return Listing(part.data, part.targets, part.classes, [f"{split}/{i}" for i in range(len(part.data))])


def _cars(part: Dataset) -> Listing:
    files, labels = zip(*part._samples, strict=True)
    return Listing(files, labels, part.classes)


def _birdsnap(root: str, split: str) -> Listing:
    """Birdsnap 1.1 as its own script downloads it: only the images that are still available."""
    folder = os.path.join(root, "birdsnap")
    with open(os.path.join(folder, "test_images.txt")) as file:
        test = set(file.read().split()[1:])  # below a heading: SPECIES/NUMBER.jpg
    images = FolderDataset(os.path.join(folder, "download", "images"), None, None)
    kept = [
        (path, label)
        for path, label in images.images
        if (os.path.relpath(path, images.root).replace(os.sep, "/") in test) == (split == "test")
    ]
    return Listing([path for path, _ in kept], [label for _, label in kept], images.classes)


def _folder(root: str, split: str) -> Listing:
    """Class folders below ``train``, and below ``test`` or ``val``."""
    test = "test" if os.path.isdir(os.path.join(root, "test")) else "val"
    train, test = (FolderDataset(os.path.join(root, name), None, None) for name in ("train", test))
    check_same_classes(train, test)
    files, labels = zip(*(train if split == "train" else test).images, strict=True)
    return Listing(files, labels, train.classes)


def _shards(root: str, split: str) -> Listing:
    """WebDataset shards, read into memory. Both splits are read, since the classes follow from both."""
    shards = defaultdict(list)
    for name in sorted(os.listdir(root)):
        if found := re.fullmatch(r"(?:.*[-_])?(train|test|val)[-_.](?:.*\.)?tar(?:\.\w+)?", name):
            shards[found[1]].append(os.path.join(root, name))
    samples = {}
    for part, paths in (("train", shards["train"]), ("test", shards["test"] or shards["val"])):
        if not paths:
            raise InputError(
                f"{root} holds no shards *{part}-*.tar of {part}; datasets/README.md shows the expected files"
            )
        samples[part] = _read_shards(tuple((path, os.stat(path).st_mtime_ns) for path in paths))
    most = max(label for part in samples.values() for _, label, _ in part)
    images, labels, keys = zip(*samples[split], strict=True)
    return Listing(images, labels, [str(label) for label in range(most + 1)], keys)


@functools.lru_cache(maxsize=2)  # a transfer needs both splits, and each of them reads both
def _read_shards(shards: tuple[tuple[str, int], ...]) -> list[tuple[bytes, int, str]]:
    """Image file, class and key ("SHARD: KEY") of all samples in these shards: (path, time of change)."""
    paths = [path for path, _ in shards]
    dataset = ShardDataset(paths, len(paths), _MOST_CLASSES, None)
    samples = []
    for sample in dataset.read(paths):
        encoded, label, _ = dataset.encoded(sample)
        samples.append((encoded, label, f"{os.path.basename(sample['__url__'])}: {sample['__key__']}"))
    return samples


@dataclass(frozen=True)
class TransferSet:
    """How a data set is found, read, divided and scored.

    Attributes:
        tree: the expected files in :attr:`folder`, for messages.
        reader: torchvision's class, or a function that gives the :class:`Listing` itself.
        metric: the accuracy that the literature reports: "top1" or "mean_per_class".
        train, test: the reader's arguments, for each of the parts that make up the split.
        listing: gives the :class:`Listing` of what the reader made.
        drawn: images of each class for training and for testing (None: the others), for a set that comes
            without a division; its names decide which.
        folder: what must be there, below the root.
        num_classes, sizes: of the published set; sizes of its training and test images.
        by_hand: why it cannot be downloaded here; None if it can.
    """

    tree: str
    reader: Callable
    metric: str
    train: tuple[dict, ...] = ({"split": "train"},)
    test: tuple[dict, ...] = ({"split": "test"},)
    listing: Callable[[Dataset], Listing] | None = _listed
    drawn: tuple[int, int | None] | None = None
    folder: str = ""
    num_classes: int | None = None
    sizes: tuple[int, int] | None = None
    by_hand: str | None = None


TOP1, PER_CLASS = "top1", "mean_per_class"
_TRAIN_AND_VAL = ({"split": "train"}, {"split": "val"})
_TRAINVAL = ({"split": "trainval"},)
_CIFAR: dict[str, Any] = {"train": ({"train": True},), "test": ({"train": False},), "listing": _cifar}
_UNDIVIDED: dict[str, Any] = {"train": ({},), "test": ({},)}

TRANSFER_SETS = {
    "aircraft": TransferSet(
        tree="data/{images/*.jpg, variants.txt, images_variant_{trainval,test}.txt}",
        reader=tv.FGVCAircraft,
        metric=PER_CLASS,
        train=_TRAINVAL,
        folder="fgvc-aircraft-2013b",
        num_classes=100,
        sizes=(6667, 3333),
    ),
    "birdsnap": TransferSet(
        tree="{test_images.txt, download/images/SPECIES/*.jpg}",
        reader=_birdsnap,
        metric=TOP1,
        listing=None,
        folder="birdsnap",
        num_classes=500,
        sizes=(47386, 2443),
        by_hand="its own script fetches the images from Flickr",
    ),
    "caltech101": TransferSet(
        tree="101_ObjectCategories/CLASS/image_*.jpg",
        reader=tv.Caltech101,
        metric=PER_CLASS,
        listing=functools.partial(_caltech, folder="101_ObjectCategories", name="image_{index:04d}.jpg"),
        drawn=(30, None),
        folder="caltech101",
        num_classes=101,
        sizes=(3030, 5647),
        **_UNDIVIDED,
    ),
    "caltech256": TransferSet(
        tree="256_ObjectCategories/CLASS/*.jpg",
        reader=tv.Caltech256,
        metric=PER_CLASS,
        listing=functools.partial(
            _caltech, folder="256_ObjectCategories", name="{label:03d}_{index:04d}.jpg"
        ),
        drawn=(60, None),
        folder="caltech256",
        num_classes=257,
        sizes=(15420, 15187),
        **_UNDIVIDED,
    ),
    "cars": TransferSet(
        tree="{cars_train/*.jpg, cars_test/*.jpg, cars_test_annos_withlabels.mat, devkit/*.mat}",
        reader=tv.StanfordCars,
        metric=TOP1,
        listing=_cars,
        folder="stanford_cars",
        num_classes=196,
        sizes=(8144, 8041),
        by_hand="its authors' links are dead",
    ),
    "cifar10": TransferSet(
        tree="{data_batch_[1-5], test_batch, batches.meta}",
        reader=tv.CIFAR10,
        metric=TOP1,
        folder="cifar-10-batches-py",
        num_classes=10,
        sizes=(50000, 10000),
        **_CIFAR,
    ),
    "cifar100": TransferSet(
        tree="{train, test, meta}",
        reader=tv.CIFAR100,
        metric=TOP1,
        folder="cifar-100-python",
        num_classes=100,
        sizes=(50000, 10000),
        **_CIFAR,
    ),
    "dtd": TransferSet(
        tree="dtd/{images/CLASS/*.jpg, labels/{train,val,test}1.txt}",
        reader=tv.DTD,
        metric=TOP1,
        train=_TRAIN_AND_VAL,
        folder="dtd",
        num_classes=47,
        sizes=(3760, 1880),
    ),
    "flowers": TransferSet(
        tree="{jpg/image_*.jpg, imagelabels.mat, setid.mat}",
        reader=tv.Flowers102,
        metric=PER_CLASS,
        train=_TRAIN_AND_VAL,
        folder="flowers-102",
        num_classes=102,
        sizes=(2040, 6149),
    ),
    "food101": TransferSet(
        tree="{images/CLASS/*.jpg, meta/{train,test}.json}",
        reader=tv.Food101,
        metric=TOP1,
        folder="food-101",
        num_classes=101,
        sizes=(75750, 25250),
    ),
    "pets": TransferSet(
        tree="{images/*.jpg, annotations/{trainval,test}.txt}",
        reader=tv.OxfordIIITPet,
        metric=PER_CLASS,
        train=_TRAINVAL,
        listing=lambda part: Listing(part._images, part._labels, part.classes),
        folder="oxford-iiit-pet",
        num_classes=37,
        sizes=(3680, 3669),
    ),
    "sun397": TransferSet(
        tree="{ClassName.txt, a/abbey/sun_*.jpg, ...}",
        reader=tv.SUN397,
        metric=TOP1,
        drawn=(50, 50),
        folder="SUN397",
        num_classes=397,
        sizes=(19850, 19850),
        **_UNDIVIDED,
    ),
    "folder": TransferSet(
        tree="{train,test}/CLASS/*.jpg",
        reader=_folder,
        metric=TOP1,
        listing=None,
        by_hand="it is yours",
    ),
    "shards": TransferSet(
        tree="*{train,test}-*.tar",
        reader=_shards,
        metric=TOP1,
        listing=None,
        by_hand="it is yours",
    ),
}
