"""The range that every image has here: 0 (black) to 1 (white)."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from torch import Tensor

from rt_detectron.utils.errors import InputError

ROUNDING = 1e-4  # how far beyond the range a resampled image may be
_are_checked = ContextVar("are_checked", default=False)


@contextmanager
def images_are_checked() -> Iterator[None]:
    """Within this :func:`check_images` lets all float images pass, since the caller has checked them.

    To read the range of images on a GPU, the host would wait for all that it has been given to do.
    """
    token = _are_checked.set(True)
    try:
        yield
    finally:
        _are_checked.reset(token)


def check_images(images: Tensor) -> None:
    """Check that ``images``, of any shape, are float in [0, 1], as attacks and classifiers take them.

    Raises:
        InputError: if not, or if one is not a number.
    """
    if not images.is_floating_point():
        raise InputError(f"images are {str(images.dtype)[6:]}; give them as float in [0, 1], so 0..255 / 255")
    if not images.numel() or _are_checked.get():
        return
    low, high = (value.item() for value in images.aminmax())
    if not (low >= -ROUNDING and high <= 1 + ROUNDING):
        raise InputError(
            f"images range from {low:.4g} to {high:.4g}, which must be 0 to 1: divide 0..255 by 255, and "
            "leave normalisation to the model"
        )
