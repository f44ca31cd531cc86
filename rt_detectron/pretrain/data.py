"""Images and labels for pretraining: an ImageFolder tree or WebDataset shards."""

import glob
import io
import itertools
import logging
import math
import multiprocessing
import os
import tarfile
import zlib
from collections.abc import Callable, Iterator

import torch
from detectron2.data.samplers import InferenceSampler, TrainingSampler
from detectron2.utils import comm
from PIL import Image
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info
from torchvision.datasets import ImageFolder

from rt_detectron.errors import InputError, one_line

logger = logging.getLogger(__name__)


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


class FolderDataset(Dataset):
    """Images below ``root/CLASS/``, one folder per class, as torchvision's ImageFolder sorts them.

    Args:
        root: the folder of class folders.
        num_classes: how many class folders there must be.
        transform: of a PIL image in RGB to a tensor (3, H, W).
        on_corrupt: "stop" or "skip"; skipped images are replaced by the next readable one.
    """

    def __init__(self, root: str, num_classes: int, transform: Callable, on_corrupt: str = "stop"):
        if not os.path.isdir(root):
            raise InputError(f"{root}: no such folder; datasets/README.md shows the expected tree")
        try:
            self.images = ImageFolder(root).samples
        except FileNotFoundError:
            raise InputError(
                f"{root}: expected class folders, each with images; datasets/README.md shows the tree"
            ) from None
        found = len({label for _, label in self.images})
        if found != num_classes:
            raise InputError(f"{root}: has {found} class folders, but num_classes is {num_classes}")
        self.transform = transform
        self.corrupt = CorruptImages(on_corrupt)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        for offset in range(len(self)):
            path, label = self.images[(index + offset) % len(self)]
            try:
                with Image.open(path) as image:
                    return self.transform(image.convert("RGB")), label
            except (OSError, SyntaxError) as error:  # what PIL raises for a broken file
                self.corrupt.report(path, error)
        raise InputError(f"none of the {len(self)} images can be read")


class ShardDataset(IterableDataset):
    """WebDataset shards: tar files with ``KEY.jpg`` (or .jpeg, .png) and ``KEY.cls``, the class index.

    Shards are divided among processes and their loader workers. For training the stream never ends and
    is shuffled: shards first, then samples within a buffer.

    Args:
        urls: one pattern or several: a local glob (``train-*.tar``), a brace range
            (``train-{000000..000146}.tar``), or anything else that webdataset opens.
        num_samples: how many samples the shards hold; tells an epoch's length.
        num_classes: labels must lie in 0..num_classes-1.
        transform: of a PIL image in RGB to a tensor (3, H, W).
        training: shuffle and repeat.
        seed: of the shuffling.
        on_corrupt: "stop" or "skip".
    """

    def __init__(
        self,
        urls: str | list[str],
        num_samples: int,
        num_classes: int,
        transform: Callable,
        training: bool,
        seed: int = 0,
        on_corrupt: str = "stop",
        shuffle_buffer: int = 5000,
    ):
        self.urls = _expand([urls] if isinstance(urls, str) else list(urls))
        if num_samples < 1:
            raise InputError(f"num_samples is {num_samples}; give the number of samples in the shards")
        self.num_samples = num_samples
        self.num_classes = num_classes
        self.transform = transform
        self.training = training
        self.seed = seed
        self.shuffle_buffer = shuffle_buffer
        self.corrupt = CorruptImages(on_corrupt)

    def __len__(self) -> int:
        return self.num_samples

    def __iter__(self) -> Iterator[tuple[torch.Tensor, int]]:
        import webdataset as wds

        worker = get_worker_info()
        workers, worker_id = (worker.num_workers, worker.id) if worker else (1, 0)
        rank = comm.get_rank() * workers + worker_id
        for epoch in itertools.count() if self.training else [0]:
            urls = self.urls
            if self.training:
                generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
                urls = [urls[i] for i in torch.randperm(len(urls), generator=generator)]
            urls = urls[rank :: workers * comm.get_world_size()]
            if not urls:
                return
            samples = self._samples(urls)
            if self.training:
                seed = self.seed * 1_000_003 + epoch * 997 + rank
                samples = wds.shuffle(self.shuffle_buffer, seed=seed)(samples)
            yielded = False
            for sample in samples:
                decoded = self._decode(sample)
                if decoded is not None:
                    yielded = True
                    yield decoded
            if not yielded:
                raise InputError(f"{', '.join(urls)}: no readable sample (KEY.jpg with KEY.cls) inside")

    def _samples(self, urls: list[str]) -> Iterator[dict]:
        import webdataset as wds

        for url in urls:
            try:
                yield from wds.tarfile_to_samples()([{"url": url}])
            except (OSError, EOFError, tarfile.TarError, zlib.error, ValueError) as error:
                self.corrupt.report(url, error)

    def _decode(self, sample: dict) -> tuple[torch.Tensor, int] | None:
        name = f"{sample['__url__']}: {sample['__key__']}"
        encoded = next((sample[ending] for ending in ("jpg", "jpeg", "png") if ending in sample), None)
        if encoded is None or "cls" not in sample:
            raise InputError(f"{name} lacks an image (.jpg, .jpeg, .png) or its .cls")
        label = sample["cls"].decode().strip()
        if not label.isdigit() or int(label) >= self.num_classes:
            raise InputError(
                f"{name} has the class {label!r}; "
                f"num_classes={self.num_classes} allows 0..{self.num_classes - 1}"
            )
        try:
            with Image.open(io.BytesIO(encoded)) as image:
                return self.transform(image.convert("RGB")), int(label)
        except (OSError, SyntaxError) as error:
            self.corrupt.report(name, error)
            return None


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


def build_train_loader(
    dataset: Dataset, total_batch_size: int, num_workers: int = 4, seed: int = 0
) -> DataLoader:
    """An endless loader of shuffled batches; each process gets ``total_batch_size / world size`` images."""
    world_size = comm.get_world_size()
    if total_batch_size < 1 or total_batch_size % world_size:
        raise InputError(
            f"total_batch_size {total_batch_size} is not a multiple of the {world_size} processes"
        )
    if total_batch_size > len(dataset):
        raise InputError(f"total_batch_size {total_batch_size} exceeds the {len(dataset)} training images")
    sampler = None
    if isinstance(dataset, ShardDataset):
        if len(dataset.urls) < world_size:
            raise InputError(
                f"{len(dataset.urls)} shards cannot feed {world_size} processes; make more or use fewer"
            )
        num_workers = min(num_workers, len(dataset.urls) // world_size)
    else:
        sampler = TrainingSampler(len(dataset), seed=seed)
    return DataLoader(
        dataset,
        batch_size=total_batch_size // world_size,
        sampler=sampler,
        num_workers=num_workers,
        drop_last=True,
        pin_memory=torch.cuda.is_available(),
        persistent_workers=num_workers > 0,
    )


def build_test_loader(dataset: Dataset, batch_size: int, num_workers: int = 4) -> DataLoader:
    """Every image once, in order; processes share the images among them."""
    sampler = None
    if isinstance(dataset, ShardDataset):
        num_workers = min(num_workers, math.ceil(len(dataset.urls) / comm.get_world_size()))
    else:
        sampler = InferenceSampler(len(dataset))
    return DataLoader(dataset, batch_size=batch_size, sampler=sampler, num_workers=num_workers)


class Lighting:
    """AlexNet's PCA noise on an RGB image in [0, 1] (Krizhevsky et al. 2012, section 4.1).

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
        """(3, H, W) to (3, H, W), clamped to [0, 1]."""
        weights = torch.randn(3) * self.std
        shift = self.EIGENVECTORS @ (weights * self.EIGENVALUES)
        return (image + shift.view(3, 1, 1)).clamp(0, 1)
