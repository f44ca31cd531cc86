"""Batches of labelled images, reproducible across interruptions."""

import itertools
import logging
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from detectron2.utils import comm
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate, get_worker_info

from rt_detectron.data.augmentation import ColorNoise, UnfinishedImages
from rt_detectron.data.shards import ShardDataset
from rt_detectron.data.workers import training_batches
from rt_detectron.utils.errors import InputError
from rt_detectron.utils.ranges import check_images
from rt_detectron.utils.seeds import seeded, seeded_generator

logger = logging.getLogger(__name__)


class TrainLoader:
    """Endless batches (images, labels, keys), the same whether or not training was interrupted.

    An iteration's images and augmentation depend on the files, the seed, the batch size and the number of
    processes, and for shards also on the number of workers. Torch's global random state is left alone.

    - Folders: an epoch is a permutation of all images without an incomplete last batch. Process r of w takes
      the images [r::w] of each batch, so that together they see the same batch as a single process.
    - Shards: an epoch deals the permuted shards to all workers of all processes. Each one shuffles its
      samples within a buffer and gives its share of the epoch's batches. A worker repeats its shards if they
      hold too few samples; surplus samples wait for another epoch.

    Args:
        dataset: :class:`FolderDataset` or :class:`ShardDataset`.
        total_batch_size: images in an iteration, over all processes.
        num_workers: loader processes for each training process; 0 loads in the training process. Of shards,
            no more than there are for a process.
        seed: of order and augmentation.
        batch_transform: what the device does to whole batches of uint8 images, such as :class:`ColorNoise`.
            The batches' images are then :class:`.UnfinishedImages`, which :func:`to_device` finishes.
        prefetch_factor: batches that each loader process has ready.
        device: where the batches go. If it is a GPU, they lie in pinned memory, from which they are copied
            while the GPU computes.

    Attributes:
        batch_size: images in an iteration of this process.
        iterations_per_epoch: ``len(dataset) // total_batch_size``.
    """

    def __init__(
        self,
        dataset: Dataset,
        total_batch_size: int,
        num_workers: int = 4,
        seed: int = 0,
        batch_transform: ColorNoise | None = None,
        prefetch_factor: int = 2,
        device: str | torch.device = "cpu",
    ):
        for name, value, least in (("num_workers", num_workers, 0), ("prefetch_factor", prefetch_factor, 1)):
            if type(value) is not int or value < least:
                raise InputError(f"{name} is {value!r}; it must be a whole number >= {least}")
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
            num_workers = _workers_with_shards(len(dataset.urls), num_workers)
        self.dataset = dataset
        self.total_batch_size = total_batch_size
        self.batch_size = total_batch_size // world_size
        self.iterations_per_epoch = len(dataset) // total_batch_size
        self.num_workers = num_workers
        self.seed = seed
        self.batch_transform = batch_transform
        self.prefetch_factor = prefetch_factor
        self.pin_memory = torch.device(device).type == "cuda"

    def __iter__(self) -> Iterator[list]:
        return self.batches()

    def batches(self, start: int = 0) -> Iterator[list]:
        """Batches from iteration ``start`` on. Earlier images are not decoded."""
        source: Dataset = _Augmented(self)
        options: dict[str, Any] = {"batch_sampler": _Order(self, start)}
        if isinstance(self.dataset, ShardDataset):
            source, options = _ShardStream(self, start), {"batch_size": self.batch_size}
        for images, labels, keys, *drawn in training_batches(
            source,
            num_workers=self.num_workers,
            prefetch_factor=self.prefetch_factor if self.num_workers else None,
            collate_fn=collate,
            pin_memory=self.pin_memory,
            **options,
        ):
            if self.batch_transform:
                images = UnfinishedImages(images, drawn[0], self.batch_transform)
            yield [images, labels, keys]

    def drawn(self) -> tuple[torch.Tensor, ...]:
        """What follows the key in a sample: the factors of the batch's transform, if there is one."""
        return (self.batch_transform.draw(),) if self.batch_transform else ()


def _workers_with_shards(shards: int, num_workers: int) -> int:
    """``num_workers``, but no more than each process has shards; logs how they are dealt."""
    world_size = comm.get_world_size()
    workers = min(num_workers, shards // world_size)
    if workers < num_workers:
        logger.warning(
            "%d shards for %d processes feed %d of num_workers=%d each; more and smaller shards feed more",
            shards, world_size, workers, num_workers,
        )  # fmt: skip
    few, more = divmod(shards, world_size * max(workers, 1))
    logger.info(
        "%d shards: %d%s for each of %d loader processes",
        shards, few, f" or {few + 1}" if more else "", world_size * max(workers, 1),
    )  # fmt: skip
    return workers


class _Order:
    """The order of a folder's images: for each batch a list of (index, seed of the augmentation)."""

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
    """A dataset whose index is (index, seed)."""

    def __init__(self, loader: TrainLoader):
        self.loader = loader

    def __getitem__(self, index_and_seed: tuple[int, int]):
        index, seed = index_and_seed
        with seeded(seed):
            return *self.loader.dataset[index], *self.loader.drawn()


class _ShardStream(IterableDataset):
    """This worker's samples of a training on shards, as :class:`TrainLoader` deals them."""

    def __init__(self, loader: TrainLoader, start: int):
        self.loader = loader
        self.start = start

    def __iter__(self) -> Iterator[tuple[torch.Tensor, int, str]]:
        loader = self.loader
        worker = get_worker_info()
        workers, worker_id = (worker.num_workers, worker.id) if worker else (1, 0)
        # The DataLoader begins with worker 0; in an uninterrupted run it may be another one's turn.
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
        """Samples ``start`` to ``stop`` of this worker's share of an epoch."""
        dataset, seed = self.loader.dataset, self.loader.seed
        order = torch.randperm(len(dataset.urls), generator=seeded_generator(seed, epoch))[slot::slots]
        samples = self._shuffled([dataset.urls[i] for i in order], seeded_generator(seed, epoch, slot))
        seeds = torch.randint(2**62, (stop,), generator=seeded_generator(seed, epoch, slot, 1)).tolist()
        ahead: deque[dict] = deque()  # read ahead of their turn
        for position in range(stop):
            sample = ahead.popleft() if ahead else next(samples)
            if position < start:
                continue
            decoded = self._decode(sample, seeds[position])
            tried = 0
            while decoded is None:  # unreadable: the next readable one takes its place, too
                tried += 1
                if tried > len(dataset):
                    raise InputError(f"{dataset.urls[order[0]]}: none of the images can be read")
                if len(ahead) < tried:
                    ahead.append(next(samples))
                decoded = self._decode(ahead[tried - 1], seeds[position])
            yield decoded

    def _decode(self, sample: dict, seed: int):
        with seeded(seed):
            decoded = self.loader.dataset.decode(sample)
            return decoded and (*decoded, *self.loader.drawn())

    def _shuffled(self, urls: list[str], generator: torch.Generator) -> Iterator[dict]:
        """The shards' samples, repeated endlessly, each drawn from a buffer of the next ones."""
        dataset = self.loader.dataset
        expected = len(dataset) * len(urls) / len(dataset.urls)
        while True:
            buffer: list[dict] = []
            count = 0
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
                    "%d of %d shards hold %d samples, but num_samples=%d means about %.0f: is it right?",
                    len(urls), len(dataset.urls), count, len(dataset), expected,
                )  # fmt: skip


def build_test_loader(dataset: Dataset, batch_size: int, num_workers: int = 4) -> DataLoader:
    """Every image once, in batches (images, labels, keys).

    Of w processes, process r has the images [r::w], so that all have as much to do, and together the first
    images of the set first. Of shards, with more than one worker, that is so only roughly.
    """
    sampler = None
    if isinstance(dataset, ShardDataset):
        num_workers = min(num_workers, len(dataset.urls))
    else:
        sampler = range(comm.get_rank(), len(dataset), comm.get_world_size())
    return DataLoader(
        dataset,
        batch_size=batch_size,
        sampler=sampler,
        num_workers=num_workers,
        collate_fn=collate,
        generator=torch.Generator(),  # else it draws from the global one
    )


def collate(samples: list[tuple]) -> list:
    """A batch (images, labels, keys, ...) of (image, label, key, ...).

    Images whose colours lie side by side in memory, as decoders give them, stay so.

    Raises:
        InputError: for images of different sizes, naming two of them.
    """
    first, _, first_key = samples[0][:3]
    for image, _, key, *_ in samples:
        if image.shape != first.shape:
            sizes = ["x".join(map(str, shape)) for shape in (first.shape, image.shape)]
            raise InputError(
                f"after the transform {first_key} is {sizes[0]} and {key} {sizes[1]}: end the transform in "
                "one that gives one size, such as CenterCrop"
            )
    if first.is_contiguous():
        return default_collate(samples)
    images, *others = default_collate([(image.permute(1, 2, 0), *rest) for image, *rest in samples])
    return [images.permute(0, 3, 1, 2), *others]


def share(images: int) -> int:
    """How many of the first ``images`` of :func:`build_test_loader` are this process's."""
    return len(range(comm.get_rank(), images, comm.get_world_size()))


def in_order(gathered: Sequence[Sequence[np.ndarray]]) -> np.ndarray:
    """The rows of all images, in their order.

    Args:
        gathered: for each process its batches of :func:`build_test_loader`, (N, ...) each.
    """
    parts = {rank: np.concatenate(batches) for rank, batches in enumerate(gathered) if len(batches)}
    images = sum(map(len, parts.values()))
    whole = np.empty((images, *parts[0].shape[1:]), np.result_type(*parts.values()))
    for rank, part in parts.items():
        whole[rank :: len(gathered)] = part
    return whole


def check_batch(images: "torch.Tensor | UnfinishedImages") -> None:
    """Raise :class:`InputError` for float images outside [0, 1]. On a GPU, the host would wait for it."""
    if not isinstance(images, UnfinishedImages) and images.dtype != torch.uint8:
        check_images(images)


def to_device(batch, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """The images of a batch, as float in [0, 1], and its labels on ``device``.

    Args:
        batch: images (N, 3, H, W), float in [0, 1], uint8 or unfinished; labels (N,); and keys or nothing.

    Raises:
        InputError: for other images, such as those of a transform that normalises.
    """
    images, labels = batch[:2]
    check_batch(images)
    images, labels = (part.to(device, non_blocking=True) for part in (images, labels))
    if isinstance(images, UnfinishedImages):
        return images.finish(), labels
    if images.dtype == torch.uint8:
        images = images.to(torch.float32, memory_format=torch.contiguous_format) / 255
    return images, labels
