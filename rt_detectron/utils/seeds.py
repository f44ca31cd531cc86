"""Random numbers that follow from a seed and leave the global ones alone."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def torch_seed(*seed: int) -> int:
    """One seed for torch from these numbers."""
    return int(np.random.SeedSequence(seed).generate_state(1, np.uint64)[0] >> 1)


def seeded_generator(*seed: int) -> torch.Generator:
    """Random numbers on the CPU that follow from these numbers."""
    return torch.Generator().manual_seed(torch_seed(*seed))


@contextmanager
def seeded(seed: int, device: torch.device | None = None) -> Iterator[None]:
    """Random numbers on the CPU and on ``device`` from ``seed``; then the global ones go on as before."""
    generators = [torch.default_generator]
    if device is not None and device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        generators.append(torch.cuda.default_generators[index])
    states = [generator.get_state() for generator in generators]
    for generator in generators:
        generator.manual_seed(seed)  # torch.manual_seed would touch all GPUs
    try:
        yield
    finally:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)


def seed_all(*seed: int, gpus: bool = True) -> None:
    """Have torch's, numpy's and Python's global random numbers follow from these numbers."""
    first, second, third = (int(n) for n in np.random.SeedSequence(seed).generate_state(3))
    (torch if gpus else torch.default_generator).manual_seed(first)
    np.random.seed(second)
    random.seed(third)


@contextmanager
def all_seeded(*seed: int) -> Iterator[None]:
    """As :func:`seeded`, but for torch's, numpy's and Python's random numbers on the CPU."""
    states = torch.default_generator.get_state(), np.random.get_state(), random.getstate()
    seed_all(*seed, gpus=False)
    try:
        yield
    finally:
        torch.default_generator.set_state(states[0])
        np.random.set_state(states[1])
        random.setstate(states[2])
