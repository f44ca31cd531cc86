"""What changes in the course of a training beside the learning rate: the attack and the size of images."""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from rt_detectron.attacks.schedule import FULL_STRENGTH, EpsSchedule
from rt_detectron.utils.errors import InputError

__all__ = ["FULL_STRENGTH", "EpsSchedule", "Resolution"]


@dataclass(frozen=True)
class Resolution:
    """Smaller images at first, which cost less (progressive resizing; Howard 2018).

    eps stays the same, so at half the side an l2 eps moves each pixel twice as far.

    Attributes:
        start: side in pixels at the beginning. It grows linearly to the side of the loader's images.
        until: share of the training after which images have their full size.
        multiple: sides are multiples of it, which keeps their number small and fits the network's strides.
    """

    start: int
    until: float
    multiple: int = 32

    def __post_init__(self):
        for name in ("start", "multiple"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise InputError(f"Resolution: {name} is {value!r}; it must be a whole number of pixels >= 1")
        if type(self.until) not in (int, float) or not 0 <= self.until <= 1:
            raise InputError(f"Resolution: until is {self.until!r}; it is a share of training, 0 to 1")

    def side(self, full: int, progress: float) -> int:
        """The shorter side, in pixels, after the share ``progress`` of the training; ``full`` at the end."""
        if progress >= self.until or self.start >= full:
            return full
        side = self.start + (full - self.start) * progress / self.until
        return min(max(round(side / self.multiple), 1) * self.multiple, full)

    def __call__(self, images: Tensor, progress: float) -> Tensor:
        """``images``, (N, 3, H, W) in [0, 1], resized."""
        full = min(images.shape[2:])
        side = self.side(full, progress)
        if side == full:
            return images
        size = [round(length * side / full) for length in images.shape[2:]]
        return F.interpolate(images, size, mode="bilinear", antialias=True)
