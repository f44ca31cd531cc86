"""The batches of a detector's training, the same whether or not it was interrupted."""

import itertools
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterable, Iterator

import torch
from detectron2.data import MapDataset
from detectron2.data.build import trivial_batch_collator
from detectron2.data.common import AspectRatioGroupedDataset, ToIterableDataset
from detectron2.data.samplers import RandomSubsetTrainingSampler
from detectron2.utils import comm
from torch.utils.data import DataLoader, Dataset

from rt_detectron.data.workers import training_batches
from rt_detectron.utils.errors import InputError
from rt_detectron.utils.seeds import all_seeded

logger = logging.getLogger(__name__)

TRIES = 100  # images in a row that a mapper may refuse


def is_wide(record: dict) -> bool:
    """Detectron2's groups: by orientation."""
    return record.get("width", 0) > record.get("height", 0)


class ResumableLoader:
    """What Detectron2's ``build_detection_train_loader`` gives, but able to begin at any iteration.

    An iteration's images and their augmentation depend on the data set, the sampler and its seed and the
    total batch size only, so neither on interruptions nor on the numbers of processes and workers. Images of
    one orientation are grouped over all processes, of which process r of w takes the images [r::w] of each
    batch. Numpy's, Python's and torch's global random states are left alone.

    Args:
        loader: a DataLoader over a :class:`ToIterableDataset`, grouped by orientation or not.

    Attributes:
        group: of a record; the images of a batch have the same. Used where ``is_grouped``.
    """

    group: Callable[[dict], Hashable] = staticmethod(is_wide)

    def __init__(self, loader: DataLoader | AspectRatioGroupedDataset):
        self.is_grouped = isinstance(loader, AspectRatioGroupedDataset)
        images = loader.dataset if self.is_grouped else loader
        self.options = {"num_workers": images.num_workers, "pin_memory": images.pin_memory}
        self.options["collate_fn"] = trivial_batch_collator if self.is_grouped else images.collate_fn
        if images.num_workers:
            self.options |= {"prefetch_factor": images.prefetch_factor, "timeout": images.timeout}
        self.images = images.dataset.dataset
        self.sampler = images.dataset.sampler
        self.batch_size = loader.batch_size

    def __iter__(self) -> Iterator[list[dict]]:
        return self.batches()

    def batches(self, start: int = 0) -> Iterator[list[dict]]:
        """Batches from iteration ``start`` on. Earlier images are not loaded."""
        return training_batches(_Seeded(self.images), batch_sampler=_Order(self, start), **self.options)

    def state_dict(self) -> dict:
        """The seed, which may have been drawn, and what else the order follows from."""
        state = {"seed": self.sampler._seed}
        if isinstance(self.sampler, RandomSubsetTrainingSampler):
            state["subset"] = self.sampler._indexes_subset
        return state

    def load_state_dict(self, state: dict) -> None:
        self.sampler._seed = state["seed"]
        if "subset" in state:
            self.sampler._indexes_subset = state["subset"]


def resumable(loader: Iterable) -> Iterable:
    """:class:`ResumableLoader` of ``loader`` if it is one of Detectron2's, else ``loader`` itself."""
    images = loader.dataset if isinstance(loader, AspectRatioGroupedDataset) else loader
    is_known = (
        isinstance(images, DataLoader)
        and isinstance(images.dataset, ToIterableDataset)
        and isinstance(images.dataset.dataset, MapDataset)
        and hasattr(images.dataset.sampler, "_infinite_indices")  # all of Detectron2's
    )
    return ResumableLoader(loader) if is_known else loader


def batches_from(loader: Iterable, start: int) -> Iterator:
    """The batches of ``loader`` from iteration ``start`` on.

    One that is not resumable begins at its beginning, with a warning.
    """
    if hasattr(loader, "batches"):
        return loader.batches(start)
    if start:
        logger.warning("%s cannot go on in its middle: the images start over", type(loader).__name__)
    return iter(loader)


class ChangedBatches(ABC):
    """A training loader whose batches are those of another one, with changed images.

    Args:
        loader: that other one.
    """

    def __init__(self, loader: Iterable):
        self.loader = loader

    def __iter__(self) -> Iterator[list[dict]]:
        return self.batches()

    @abstractmethod
    def batches(self, start: int = 0) -> Iterator[list[dict]]:
        """Batches from iteration ``start`` on, if the other loader can begin there."""

    def state_dict(self) -> dict:
        return self.loader.state_dict() if hasattr(self.loader, "state_dict") else {}

    def load_state_dict(self, state: dict) -> None:
        if hasattr(self.loader, "load_state_dict") and state:
            self.loader.load_state_dict(state)

    @abstractmethod
    def state_of_process(self) -> dict:
        """What this process alone needs to go on after a step, as torch saves it."""

    @abstractmethod
    def load_state_of_process(self, states: list[dict]) -> None:
        """Take over what :meth:`state_of_process` gave in each process, at least one."""


class _Order:
    """This process's batches: for each a list of (index, seed of the augmentation)."""

    def __init__(self, loader: ResumableLoader, start: int):
        self.loader = loader
        self.start = start
        self._groups: dict[int, Hashable] = {}

    def __iter__(self) -> Iterator[list[tuple[int, tuple[int, int]]]]:
        world_size = comm.get_world_size()
        mine = slice(comm.get_rank(), None, world_size)
        total = self.loader.batch_size * world_size
        sampler = self.loader.sampler
        groups: dict[Hashable, list] = {}
        done = 0
        for number, index in enumerate(sampler._infinite_indices()):
            group = groups.setdefault(self._group(index), [])
            group.append((index, (sampler._seed, number)))
            if len(group) == total:
                if done >= self.start:
                    yield group[mine]
                group.clear()
                done += 1

    def _group(self, index: int) -> Hashable:
        if not self.loader.is_grouped:
            return None
        if index not in self._groups:
            self._groups[index] = self.loader.group(self.loader.images._dataset[index])
        return self._groups[index]


class _Seeded(Dataset):
    """The images of a MapDataset, by (index, seed)."""

    def __init__(self, images: MapDataset):
        self.records = images._dataset
        self.map = images._map_func

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index_and_seed: tuple[int, tuple[int, int]]):
        index, seed = index_and_seed
        with all_seeded(*seed):
            for number in itertools.count(1):
                image = self.map(self.records[index])
                if image is not None:
                    return image
                if number == TRIES:
                    raise InputError(f"none of {TRIES} training images in a row can be used")
                # MapDataset, too, takes another image for one that its mapper refuses.
                index = int(torch.randint(len(self), ()))
