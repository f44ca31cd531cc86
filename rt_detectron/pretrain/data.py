"""Images and labels for pretraining: an ImageFolder tree or WebDataset shards."""

import functools
import glob
import io
import itertools
import logging
import math
import multiprocessing
import os
import re
import signal
import tarfile
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from multiprocessing.synchronize import Event

import torch
from detectron2.data.samplers import InferenceSampler
from detectron2.utils import comm
from PIL import Image
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info
from torchvision.datasets import ImageFolder
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms.v2.functional import pil_to_tensor, to_dtype

from rt_detectron.utils.errors import InputError, one_line
from rt_detectron.utils.seeds import seeded, seeded_generator

logger = logging.getLogger(__name__)

GRACE_SECONDS = 30  # for which a loader's worker survives a SIGTERM


class CorruptImages:
    """What happens to an image that cannot be decoded: ``"stop"`` the run, or ``"skip"`` and count it.

    The count is shared with the loader's worker processes.
    """

    def __init__(self, policy: str):
        if policy not in ("stop", "skip"):
            raise InputError(f"on_corrupt is {policy!r}; use 'stop' or 'skip'")
        self.policy = policy
        self._count = multiprocessing.Value("q", 0)

    @property
    def count(self) -> int:
        return self._count.value

    def report(self, name: str, error: Exception) -> None:
        if self.policy == "stop":
            raise InputError(
                f"{name}: cannot be read ({one_line(error)}); repair or delete it, or set on_corrupt=skip"
            ) from error
        with self._count.get_lock():
            self._count.value += 1
        logger.warning("skipped %s: cannot be read (%s); %d so far", name, one_line(error), self.count)


def decode(encoded: bytes) -> torch.Tensor:
    """An image file's bytes to uint8 RGB (3, H, W).

    By torchvision, and by PIL what torchvision does not know (BMP, TIFF); the pixels are the same.

    Raises:
        OSError, SyntaxError: for what is no image, or a truncated one.
    """
    try:
        image = decode_image(torch.frombuffer(bytearray(encoded), dtype=torch.uint8), ImageReadMode.RGB)
        image = image[0] if image.dim() == 4 else image  # the first picture of an animated GIF, as by PIL
        return image if image.dtype == torch.uint8 else to_dtype(image, torch.uint8, scale=True)
    except (RuntimeError, ValueError):
        with Image.open(io.BytesIO(encoded)) as image:
            return pil_to_tensor(image.convert("RGB"))


class FolderDataset(Dataset):
    """Images below ``root/CLASS/``, one folder per class, as torchvision's ImageFolder sorts them.

    Args:
        root: the folder of class folders.
        num_classes: how many class folders there must be; None takes what there is.
        transform: of a uint8 RGB tensor (3, H, W) to a uint8 one or a float one in [0, 1].
        on_corrupt: "stop" or "skip"; skipped images are replaced by the next readable one.
    """

    def __init__(self, root: str, num_classes: int | None, transform: Callable, on_corrupt: str = "stop"):
        if not os.path.isdir(root):
            raise InputError(f"{root}: no such folder; datasets/README.md shows the expected tree")
        try:
            folder = ImageFolder(root)
        except FileNotFoundError as error:
            # torchvision names the class folders without images; with none at all it says so.
            empty = re.search(r"for the classes? (.*?)\. ", str(error))
            problem = f"no images of {empty[1]}" if empty else "expected class folders, each with images"
            raise InputError(f"{root}: {problem}; datasets/README.md shows the tree") from None
        if num_classes is not None and len(folder.classes) != num_classes:
            raise InputError(
                f"{root}: has {len(folder.classes)} class folders, but num_classes is {num_classes}"
            )
        self.root = root
        self.classes = folder.classes
        self.images = folder.samples
        self.transform = transform
        self.corrupt = CorruptImages(on_corrupt)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int, str]:
        """Image, class and key, which is the path below the root."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        for offset in range(len(self)):
            path, label = self.images[(index + offset) % len(self)]
            try:
                with open(path, "rb") as file:
                    image = decode(file.read())
            except (OSError, SyntaxError) as error:
                self.corrupt.report(path, error)
                continue
            return self.transform(image), label, os.path.relpath(path, self.root)
        raise InputError(f"none of the {len(self)} images can be read")


def check_same_classes(train: Dataset, test: Dataset) -> None:
    """Raise :class:`InputError` if two folder trees disagree about which classes there are.

    They would be numbered differently. Shards hold numbers and cannot be compared.
    """
    if isinstance(train, FolderDataset) and isinstance(test, FolderDataset) and train.classes != test.classes:
        name = min(set(train.classes) ^ set(test.classes))
        has, lacks = (train, test) if name in train.classes else (test, train)
        raise InputError(
            f"{has.root} has the class {name!r} and {lacks.root} has not: make the folders agree"
        )


class ShardDataset(IterableDataset):
    """WebDataset shards: tar files with ``KEY.jpg`` (or .jpeg, .png) and ``KEY.cls``, the class index.

    Iterating it gives every sample once, in order; shards are divided among processes and their loader
    workers. :class:`TrainLoader` has an order of its own for training.

    Args:
        urls: one pattern or several: a local glob (``train-*.tar``), a brace range
            (``train-{000000..000146}.tar``), or anything else that webdataset opens.
        num_samples: how many samples the shards hold; tells an epoch's length.
        num_classes: labels must lie in 0..num_classes-1.
        transform: of a uint8 RGB tensor (3, H, W) to a uint8 one or a float one in [0, 1].
        on_corrupt: "stop" or "skip".
        shuffle_buffer: training draws from so many samples at a time.
        classes: keep only samples of these class indices, and number them from 0 in this order; None keeps
            all. ``num_samples`` and ``num_classes`` count what is kept.
    """

    def __init__(
        self,
        urls: str | list[str],
        num_samples: int,
        num_classes: int,
        transform: Callable,
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
        self.transform = transform
        self.shuffle_buffer = shuffle_buffer
        self.corrupt = CorruptImages(on_corrupt)

    def __len__(self) -> int:
        return self.num_samples

    def __iter__(self) -> Iterator[tuple[torch.Tensor, int, str]]:
        worker = get_worker_info()
        workers, worker_id = (worker.num_workers, worker.id) if worker else (1, 0)
        slot, slots = comm.get_rank() * workers + worker_id, workers * comm.get_world_size()
        for sample in self.read(self.urls[slot::slots]):
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
            except (OSError, EOFError, tarfile.TarError, zlib.error, ValueError) as error:
                self.corrupt.report(url, error)

    def decode(self, sample: dict) -> tuple[torch.Tensor, int, str] | None:
        """Image, class and key ("SHARD: KEY") of a sample; None if it is corrupt and to be skipped."""
        encoded, label, name = self.encoded(sample)
        try:
            image = decode(encoded)
        except (OSError, SyntaxError) as error:
            self.corrupt.report(name, error)
            return None
        return self.transform(image), label, name

    def encoded(self, sample: dict) -> tuple[bytes, int, str]:
        """Image file, class and key of a sample; one that lacks something is an :class:`InputError`."""
        name = f"{sample['__url__']}: {sample['__key__']}"
        encoded = next((sample[ending] for ending in ("jpg", "jpeg", "png") if ending in sample), None)
        if encoded is None or "cls" not in sample:
            raise InputError(f"{name} lacks an image (.jpg, .jpeg, .png) or its .cls")
        label = _class(sample)
        if self.classes is not None:
            label = self.classes.index(label)
        if not (isinstance(label, int) and label < self.num_classes):
            raise InputError(
                f"{name} has the class '{label}'; "
                f"num_classes={self.num_classes} allows 0..{self.num_classes - 1}"
            )
        return encoded, label, name


def _class(sample: dict) -> int | str:
    """What a sample's .cls says: a class index, or whatever else stands there."""
    text = sample.get("cls", b"").decode(errors="replace").strip()
    return int(text) if text.isdecimal() else text


def _expand(patterns: list[str]) -> list[str]:
    """Brace ranges and local globs to the list of shards, sorted; missing local files are an error."""
    try:
        from webdataset.shardlists import expand_urls
    except ImportError:
        raise InputError('reading shards needs webdataset: pip install "rt_detectron[webdataset]"') from None
    urls = []
    for url in itertools.chain.from_iterable(expand_urls(pattern) for pattern in patterns):
        if "://" in url or url.startswith("pipe:"):
            urls.append(url)
            continue
        matches = sorted(glob.glob(url))
        if not matches:
            raise InputError(f"{url}: no such shard; datasets/README.md shows the expected files")
        urls += matches
    return urls


class TrainLoader:
    """Endless batches (images, labels, keys), the same whether or not the training was interrupted.

    Order and augmentation of an iteration follow from files, seed, batch size and the number of processes,
    for shards also from the number of workers; torch's global random numbers are neither used nor disturbed.

    - Folders: an epoch is a permutation of all images, less an incomplete last batch. Process r of w has
      the images [r::w] of each batch, so several processes see together what a single one sees.
    - Shards: an epoch deals the permuted shards to all workers of all processes. Each shuffles its own within
      a buffer and gives its share of the epoch's batches; if its shards hold less than that, it begins them
      anew, and what they hold beyond it waits for another epoch.

    Args:
        dataset: :class:`FolderDataset` or :class:`ShardDataset`.
        total_batch_size: images of an iteration, over all processes.
        num_workers: loader processes for each training process.
        seed: of order and augmentation.

    Attributes:
        batch_size: images of this process in an iteration.
        iterations_per_epoch: ``len(dataset) // total_batch_size``.
    """

    def __init__(self, dataset: Dataset, total_batch_size: int, num_workers: int = 4, seed: int = 0):
        world_size = comm.get_world_size()
        if total_batch_size < 1 or total_batch_size % world_size:
            raise InputError(
                f"total_batch_size {total_batch_size} is not a multiple of the {world_size} processes"
            )
        if total_batch_size > len(dataset):
            raise InputError(
                f"total_batch_size {total_batch_size} exceeds the {len(dataset)} training images"
            )
        if isinstance(dataset, ShardDataset):
            if len(dataset.urls) < world_size:
                raise InputError(
                    f"{len(dataset.urls)} shards cannot feed {world_size} processes; make more or use fewer"
                )
            num_workers = min(num_workers, len(dataset.urls) // world_size)
        self.dataset = dataset
        self.total_batch_size = total_batch_size
        self.batch_size = total_batch_size // world_size
        self.iterations_per_epoch = len(dataset) // total_batch_size
        self.num_workers = num_workers
        self.seed = seed

    def __iter__(self) -> Iterator[list]:
        return self.batches()

    def batches(self, start: int = 0) -> Iterator[list]:
        """Batches from iteration ``start`` on; what lies before is not decoded."""
        if isinstance(self.dataset, ShardDataset):
            source = {"dataset": _ShardStream(self, start), "batch_size": self.batch_size}
        else:
            source = {"dataset": _Augmented(self.dataset), "batch_sampler": _Order(self, start)}
        closing = multiprocessing.Event()
        try:
            yield from DataLoader(
                **source,
                num_workers=self.num_workers,
                pin_memory=torch.cuda.is_available(),
                worker_init_fn=functools.partial(_leave_signals_to_the_trainer, closing),
                generator=torch.Generator(),  # else it draws from the global one
            )
        finally:
            closing.set()


def _leave_signals_to_the_trainer(closing: Event, worker_id: int) -> None:
    """A signal to the process group must not take the loaders from a trainer that finishes its step.

    SIGTERM is also how multiprocessing ends workers, so it is heeded once the loader is ``closing``, and
    otherwise after a while.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0) if closing.is_set() else signal.alarm(GRACE_SECONDS))
    signal.signal(signal.SIGALRM, lambda *_: os._exit(0))


class _Order:
    """Which images of a folder come when: lists of (index, seed of the augmentation), one list a batch."""

    def __init__(self, loader: TrainLoader, start: int):
        self.loader = loader
        self.start = start

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        loader = self.loader
        first, skip = divmod(self.start, loader.iterations_per_epoch)
        mine = slice(comm.get_rank(), None, comm.get_world_size())
        for epoch in itertools.count(first):
            generator = seeded_generator(loader.seed, epoch)
            indices = torch.randperm(len(loader.dataset), generator=generator)
            seeds = torch.randint(2**62, indices.shape, generator=generator)
            for i in range(skip, loader.iterations_per_epoch):
                batch = slice(i * loader.total_batch_size, (i + 1) * loader.total_batch_size)
                yield list(zip(indices[batch][mine].tolist(), seeds[batch][mine].tolist(), strict=True))
            skip = 0


class _Augmented(Dataset):
    """Takes (index, seed) for an index."""

    def __init__(self, dataset: FolderDataset):
        self.dataset = dataset

    def __getitem__(self, index_and_seed: tuple[int, int]):
        index, seed = index_and_seed
        with seeded(seed):
            return self.dataset[index]


class _ShardStream(IterableDataset):
    """This worker's samples of a training on shards, as :class:`TrainLoader` deals them."""

    def __init__(self, loader: TrainLoader, start: int):
        self.loader = loader
        self.start = start

    def __iter__(self) -> Iterator[tuple[torch.Tensor, int, str]]:
        loader = self.loader
        worker = get_worker_info()
        workers, worker_id = (worker.num_workers, worker.id) if worker else (1, 0)
        # The DataLoader begins with worker 0, whose turn it need not be in an uninterrupted run.
        worker_id = (self.start + worker_id) % workers
        slot = comm.get_rank() * workers + worker_id
        slots = comm.get_world_size() * workers
        for epoch in itertools.count(self.start // loader.iterations_per_epoch):
            first = epoch * loader.iterations_per_epoch
            mine = [i for i in range(first, first + loader.iterations_per_epoch) if i % workers == worker_id]
            done = sum(i < self.start for i in mine)
            yield from self._epoch(
                epoch, slot, slots, done * loader.batch_size, len(mine) * loader.batch_size
            )

    def _epoch(self, epoch: int, slot: int, slots: int, start: int, stop: int) -> Iterator:
        """The samples ``start`` to ``stop`` of this worker's epoch."""
        dataset, seed = self.loader.dataset, self.loader.seed
        order = torch.randperm(len(dataset.urls), generator=seeded_generator(seed, epoch))[slot::slots]
        samples = self._shuffled([dataset.urls[i] for i in order], seeded_generator(seed, epoch, slot))
        seeds = torch.randint(2**62, (stop,), generator=seeded_generator(seed, epoch, slot, 1)).tolist()
        ahead = deque()  # read, but not yet at their turn
        for position in range(stop):
            sample = ahead.popleft() if ahead else next(samples)
            if position < start:
                continue
            decoded = self._decode(sample, seeds[position])
            tried = 0
            while decoded is None:  # corrupt: the next readable one stands in, and keeps its own turn
                tried += 1
                if tried > len(dataset):
                    raise InputError(f"{dataset.urls[order[0]]}: none of the images can be read")
                if len(ahead) < tried:
                    ahead.append(next(samples))
                decoded = self._decode(ahead[tried - 1], seeds[position])
            yield decoded

    def _decode(self, sample: dict, seed: int):
        with seeded(seed):
            return self.loader.dataset.decode(sample)

    def _shuffled(self, urls: list[str], generator: torch.Generator) -> Iterator[dict]:
        """The shards' samples again and again, each drawn from a buffer of those that are next."""
        dataset = self.loader.dataset
        expected = len(dataset) * len(urls) / len(dataset.urls)
        while True:
            buffer, count = [], 0
            for sample in dataset.read(urls):
                count += 1
                if len(buffer) < dataset.shuffle_buffer:
                    buffer.append(sample)
                    continue
                place = int(torch.randint(len(buffer), (), generator=generator))
                buffer[place], sample = sample, buffer[place]
                yield sample
            for place in torch.randperm(len(buffer), generator=generator):
                yield buffer[place]
            if not count:
                raise InputError(f"{', '.join(urls)}: no readable sample (KEY.jpg with KEY.cls) inside")
            if abs(count - expected) > 0.1 * expected:
                logger.warning(
                    "%d of %d shards hold %d samples, where num_samples=%d lets expect %.0f: is it right?",
                    len(urls), len(dataset.urls), count, len(dataset), expected,
                )  # fmt: skip


def build_test_loader(dataset: Dataset, batch_size: int, num_workers: int = 4) -> DataLoader:
    """Every image once, in order, in batches (images, labels, keys); processes share the work."""
    sampler = None
    if isinstance(dataset, ShardDataset):
        num_workers = min(num_workers, math.ceil(len(dataset.urls) / comm.get_world_size()))
    else:
        sampler = InferenceSampler(len(dataset))
    return DataLoader(
        dataset,
        batch_size=batch_size,
        sampler=sampler,
        num_workers=num_workers,
        generator=torch.Generator(),  # else it draws from the global one
    )


class Lighting:
    """AlexNet's PCA noise on an RGB image (Krizhevsky et al. 2012, section 4.1).

    Args:
        std: standard deviation of the three components' weights.
    """

    # Eigenvalues and eigenvectors of the RGB covariance over ImageNet, for images in [0, 1].
    EIGENVALUES = torch.tensor([0.2175, 0.0188, 0.0045])
    EIGENVECTORS = torch.tensor(
        [[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140], [-0.5836, -0.6948, 0.4203]]
    )

    def __init__(self, std: float):
        self.std = std

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        """(3, H, W), uint8 or float in [0, 1], to float in [0, 1]."""
        image = to_dtype(image, torch.float32, scale=True)
        weights = torch.randn(3) * self.std
        shift = self.EIGENVECTORS @ (weights * self.EIGENVALUES)
        return (image + shift.view(3, 1, 1)).clamp(0, 1)
