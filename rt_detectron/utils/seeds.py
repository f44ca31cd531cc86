"""Random numbers that follow from a seed and leave torch's global ones alone."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def seeded_generator(*seed: int) -> torch.Generator:
    """Random numbers on the CPU that follow from these numbers."""
    state = np.random.SeedSequence(seed).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0] >> 1))


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Random numbers on the CPU from ``seed``; afterwards the global ones go on as if nothing had been."""
    state = torch.default_generator.get_state()
    torch.default_generator.manual_seed(seed)  # torch.manual_seed would touch GPUs, too
    try:
        yield
    finally:
        torch.default_generator.set_state(state)
