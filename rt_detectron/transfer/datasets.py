"""The classification sets of the transfer study, by name, in the splits that the literature uses.

They are those of Salman et al., "Do Adversarially Robust ImageNet Models Transfer Better?" (2020), which are
those of Kornblith et al., "Do Better ImageNet Models Transfer Better?" (2019), table 1, with Caltech-256 in
place of PASCAL VOC. datasets/README.md shows the expected trees and names the sources.
"""

import difflib
import functools
import hashlib
import logging
import os
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset
from torchvision import datasets as tv
from torchvision.transforms.v2.functional import resize

from rt_detectron.errors import InputError, one_line
from rt_detectron.files import locked
from rt_detectron.pretrain.data import FolderDataset, ShardDataset, check_same_classes, decode

logger = logging.getLogger(__name__)

SPLITS = ("train", "test", "fit", "held_out")
HELD_OUT = 0.2  # of each class of "train"
_MOST_CLASSES = 100_000  # a class index of shards beyond it is a mistake


class Listing(NamedTuple):
    """What a split holds, images not yet decoded.

    Attributes:
        images: of each image its file, its file's content, or its pixels, uint8 RGB (H, W, 3).
        labels: class indices.
        classes: their names.
        keys: the images' names; None for files, which are named by their path below the root.
    """

    images: Sequence[str | os.PathLike | bytes | np.ndarray]
    labels: Sequence[int]
    classes: Sequence[str]
    keys: Sequence[str] | None = None


def _listed(part: Dataset) -> Listing:
    """What most of torchvision's sets know of their images."""
    return Listing(part._image_files, part._labels, part.classes)


def _caltech(part: Dataset, folder: str, name: str) -> Listing:
    """torchvision's Caltech sets number the images of each class from 1 on."""
    files = [
        os.path.join(part.root, folder, part.categories[label], name.format(label=label + 1, index=index))
        for label, index in zip(part.y, part.index, strict=True)
    ]
    return Listing(files, part.y, part.categories)


def _cifar(part: Dataset) -> Listing:
    split = "train" if part.train else "test"
    return Listing(part.data, part.targets, part.classes, [f"{split}/{i}" for i in range(len(part.data))])


def _birdsnap(root: str, split: str) -> Listing:
    """Birdsnap 1.1 as its own script downloads it: of its images those that were still to be had."""
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
    """WebDataset shards, read into memory. Both splits are, since only together they tell the classes."""
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


@functools.lru_cache(maxsize=2)  # a transfer asks for both splits of a set, and each time both are needed
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
        tree: the expected files, for messages; "FOLDER/..." for what lies in :attr:`folder`.
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
    listing: Callable[[Dataset], Listing] = _listed
    drawn: tuple[int, int | None] | None = None
    folder: str = ""
    num_classes: int | None = None
    sizes: tuple[int, int] | None = None
    by_hand: str | None = None


TOP1, PER_CLASS = "top1", "mean_per_class"
_TRAIN_AND_VAL = ({"split": "train"}, {"split": "val"})
_TRAINVAL = ({"split": "trainval"},)
_CIFAR = {"train": ({"train": True},), "test": ({"train": False},), "listing": _cifar}
_UNDIVIDED = {"train": ({},), "test": ({},)}

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
        listing=lambda part: Listing(*zip(*part._samples, strict=True), part.classes),
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
    "folder": TransferSet(
        tree="{train,test}/CLASS/*.jpg",
        reader=_folder,
        metric=TOP1,
        listing=None,
        by_hand="it is yours",
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
    "shards": TransferSet(
        tree="*{train,test}-*.tar",
        reader=_shards,
        metric=TOP1,
        listing=None,
        by_hand="it is yours",
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
}


class _Sample(NamedTuple):
    image: str | os.PathLike | bytes | np.ndarray  # as in Listing
    label: int
    key: str


class ClassificationDataset(Dataset):
    """Images and labels of one split of a data set; made by :func:`classification_dataset`.

    ``dataset[i]`` is (transformed image, label, key); the key names the image below the data set's root.

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
        except (OSError, SyntaxError) as error:
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
) -> ClassificationDataset:
    """A data set of :data:`TRANSFER_SETS`, or an own one, map-style.

    Args:
        name: "aircraft", "birdsnap", "caltech101", "caltech256", "cars", "cifar10", "cifar100", "dtd",
            "flowers", "food101", "pets", "sun397"; "folder" for class folders below ``root/train`` and
            ``root/test`` (or ``val``), "shards" for WebDataset shards ``root/*train-*.tar`` and
            ``root/*test-*.tar`` (or ``val``), which are read into memory undecoded.
        split: "train" or "test", those of the literature; "fit" or "held_out", a fixed 80 % and 20 % of
            each class of "train", to choose hyperparameters by.
        root: the folder that holds the sets' own folders, or the own set.
        download: fetch the set from its authors if it is not there. Its licence is yours to heed.
        transform: of a uint8 RGB tensor (3, H, W); None leaves it as it is.
        downscale: the short side in pixels to which larger images are reduced before the transform.
        classes: names or indices of the classes to keep, which are numbered anew from 0 in this order.

    Raises:
        InputError: for an unknown name, split or class, and for a set that is missing, damaged or cannot be
            downloaded. An image that cannot be read is one when it is asked for.
    """
    if name not in TRANSFER_SETS:
        near = difflib.get_close_matches(name, TRANSFER_SETS, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise InputError(f"unknown data set {name!r}: {hint}There are {', '.join(TRANSFER_SETS)}")
    if split not in SPLITS:
        raise InputError(f"unknown split {split!r} of {name}: {', '.join(SPLITS)}")
    samples, names = _read(name, "test" if split == "test" else "train", root, download)
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
    lock = locked(folder, "choose another dataset.root") if download else nullcontext()
    # torchvision, scipy and the network fail in every way there is, and a damaged set is the user's to replace.
    try:
        with lock:  # or several trials of a study would download at a time
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
            "%s in %s has %d images for %s, where the literature has %d: the accuracies do not compare",
            name, root, len(samples), split, published,
        )  # fmt: skip
    return samples, list(listings[0].classes)


def _samples(listing: Listing, root: str) -> list[_Sample]:
    keys = listing.keys or [os.path.relpath(path, root) for path in listing.images]
    labels = map(int, listing.labels)
    return [_Sample(*sample) for sample in zip(listing.images, labels, keys, strict=True)]


def _divided(samples: list[_Sample], chosen: Callable[[list[int]], list[int]]) -> list[_Sample]:
    """What ``chosen`` takes of each class, in the order of ``samples``.

    It gets the class's positions in an order that is fixed and means nothing: that of the hashes of the
    keys. Unlike with a random generator, the same images are chosen by every version of every library.
    """

    def rank(position: int) -> bytes:
        return hashlib.sha256(os.fsencode(samples[position].key)).digest()

    positions = defaultdict(list)
    for position in sorted(range(len(samples)), key=rank):
        positions[samples[position].label].append(position)
    return [samples[position] for position in sorted(sum(map(chosen, positions.values()), []))]


def _drawn(num_train: int, num_test: int | None, split: str, positions: list[int]) -> list[int]:
    if split == "train":
        return positions[:num_train]
    return positions[num_train:][:num_test]


def _held_out(positions: list[int]) -> list[int]:
    """A fifth, but at least one, unless it is the only one."""
    return positions[: max(round(HELD_OUT * len(positions)), min(1, len(positions) - 1))]


def _fit(positions: list[int]) -> list[int]:
    return positions[len(_held_out(positions)) :]


def _only(
    classes: Sequence[str | int], samples: list[_Sample], names: list[str], dataset: str
) -> tuple[list[_Sample], list[str]]:
    """The samples of these classes, numbered anew, and the classes' names."""
    labels = []
    for choice in [classes] if isinstance(classes, str | int) else classes:
        if isinstance(choice, str) and choice in names:
            labels.append(names.index(choice))
        elif isinstance(choice, int) and 0 <= choice < len(names):
            labels.append(int(choice))
        else:
            near = difflib.get_close_matches(str(choice), names, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"such as {names[0]!r}"
            raise InputError(
                f"{dataset} has no class {choice!r}: give names ({hint}) or indices of 0..{len(names) - 1}"
            )
    if len(set(labels)) < max(len(labels), 1):
        raise InputError(f"classes={list(classes)}: name at least one, and none of them twice")
    new = {label: index for index, label in enumerate(labels)}
    kept = [sample._replace(label=new[sample.label]) for sample in samples if sample.label in new]
    return kept, [names[label] for label in labels]
