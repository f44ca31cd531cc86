"""Labelled images in WebDataset shards."""

import glob
import itertools
import tarfile
import zlib
from collections.abc import Callable, Iterator

import torch
from detectron2.utils import comm
from torch.utils.data import IterableDataset, get_worker_info
from torchvision.datasets.folder import IMG_EXTENSIONS

from rt_detectron.data.images import load, unchanged
from rt_detectron.data.unreadable import UnreadableImages
from rt_detectron.utils.errors import InputError, optional_import
from rt_detectron.utils.files import printable


class ShardDataset(IterableDataset):
    """WebDataset shards: tar files with ``KEY.jpg`` (or .png, .webp ...) and ``KEY.cls``, the class index.

    Iterating over it gives every sample once, in order. Each process reads all shards, dealt to its loader
    workers, and decodes its share of the samples. For training, :class:`TrainLoader` shuffles.

    Args:
        urls: one pattern or several: a local glob (``train-*.tar``), a brace range
            (``train-{000000..000146}.tar``), or anything else that webdataset opens.
        num_samples: the number of samples in the shards, which is an epoch's length.
        num_classes: labels must lie in 0..num_classes-1.
        transform: as for :func:`.load`, to uint8 RGB (3, H, W) or to float in [0, 1]; None is none.
        on_corrupt: "stop" or "skip".
        shuffle_buffer: the number of samples from which training draws the next one.
        classes: keep only samples of these class indices, and number them from 0 in this order; None keeps
            all. ``num_samples`` and ``num_classes`` count those that are kept.
    """

    def __init__(
        self,
        urls: str | list[str],
        num_samples: int,
        num_classes: int,
        transform: Callable | None,
        on_corrupt: str = "stop",
        shuffle_buffer: int = 5000,
        classes: list[int] | None = None,
    ):
        self.urls = _expand([urls] if isinstance(urls, str) else list(urls))
        if num_samples < 1:
            raise InputError(f"num_samples is {num_samples}; give the number of samples in the shards")
        if classes is not None and not len(set(classes)) == len(classes) == num_classes:
            raise InputError(f"classes {list(classes)}: give {num_classes} (num_classes) different ones")
        self.num_samples = num_samples
        self.num_classes = num_classes
        self.classes = None if classes is None else list(classes)
        self.transform = transform or unchanged
        self.shuffle_buffer = shuffle_buffer
        self.unreadable = UnreadableImages(on_corrupt)
        self._chosen = num_samples

    def __len__(self) -> int:
        return self._chosen

    def choose(self, images: int) -> None:
        """Iterate over about so many samples only, evenly spaced over the shards."""
        self._chosen = min(images, self.num_samples)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, int, str]]:
        worker = get_worker_info()
        workers, worker_id = (worker.num_workers, worker.id) if worker else (1, 0)
        for shard in range(worker_id, len(self.urls), workers):
            first = shard * self.num_samples // len(self.urls)  # its place in the set, if all are as large
            for place, sample in enumerate(self.read(self.urls[shard : shard + 1]), first):
                number, rest = divmod(place * self._chosen, self.num_samples)
                if rest >= self._chosen or number % comm.get_world_size() != comm.get_rank():
                    continue
                decoded = self.decode(sample)
                if decoded is not None:
                    yield decoded

    def read(self, urls: list[str]) -> Iterator[dict]:
        """The samples of these shards in order, not decoded."""
        import webdataset as wds

        for url in urls:
            count = 0
            try:
                for sample in wds.tarfile_to_samples()([{"url": url}]):
                    count += 1
                    if self.classes is None or _class(sample) in self.classes:
                        yield sample
                if not count:
                    raise EOFError("no samples, KEY.jpg with KEY.cls, inside")
            except (OSError, EOFError, tarfile.TarError, zlib.error) as error:
                self.unreadable.report(url, error)
            except ValueError as error:  # WebDataset's, whose message is the first of several parts
                parts = error.args[0] if error.args and isinstance(error.args[0], tuple) else error.args
                self.unreadable.report(url, ValueError(*parts[:1]))

    def decode(self, sample: dict) -> tuple[torch.Tensor, int, str] | None:
        """Image, class and key ("SHARD: KEY") of a sample; None if it cannot be decoded and is skipped."""
        encoded, label, name = self.encoded(sample)
        try:
            image = load(encoded, self.transform)
        except OSError as error:
            self.unreadable.report(name, error)
            return None
        return image, label, name

    def encoded(self, sample: dict) -> tuple[bytes, int, str]:
        """Image file, class and key of a sample.

        Raises:
            InputError: if one of them is missing or the class is out of range.
        """
        name = printable(f"{sample['__url__']}: {sample['__key__']}")
        encoded = next((sample[ending[1:]] for ending in IMG_EXTENSIONS if ending[1:] in sample), None)
        if encoded is None or "cls" not in sample:
            found = printable(", ".join(f".{ending}" for ending in sample if not ending.startswith("__")))
            raise InputError(
                f"{name} lacks an image or its .cls, and has {found}: KEY.jpg (or .png, .webp ...) and "
                "KEY.cls must lie side by side, with no dot in KEY"
            )
        label = _class(sample)
        if self.classes is not None and isinstance(label, int):
            label = self.classes.index(label)
        if not (isinstance(label, int) and label < self.num_classes):
            raise InputError(
                f"{name} has the class '{label}'; "
                f"num_classes={self.num_classes} allows 0..{self.num_classes - 1}"
            )
        return encoded, label, name


def _class(sample: dict) -> int | str:
    """The class index in a sample's .cls, or its text if that is not a number."""
    text = sample.get("cls", b"").decode(errors="replace").strip()
    return int(text) if text.isdecimal() else text


def _expand(patterns: list[str]) -> list[str]:
    """The shards that brace ranges and local globs name, sorted.

    Raises:
        InputError: for a pattern without local files.
    """
    shardlists = optional_import("webdataset.shardlists", "webdataset>=1.0", "WebDataset shards")
    urls = []
    for url in itertools.chain.from_iterable(shardlists.expand_urls(pattern) for pattern in patterns):
        if "://" in url or url.startswith("pipe:"):
            urls.append(url)
            continue
        matches = sorted(glob.glob(url))
        if not matches:
            raise InputError(f"{url}: no such shard; datasets/README.md shows the expected files")
        urls += matches
    return urls
