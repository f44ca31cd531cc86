"""The metadata of a weights file, in its entry ``rt_detectron``."""

import math
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields

from rt_detectron.utils.errors import InputError

NORMS = ("l1", "l2", "linf")
INPUT_FORMATS = ("RGB", "BGR")


@dataclass(frozen=True)
class Metadata:
    """The network, training and input format of a file's weights.

    Attributes:
        arch: a name of :data:`rt_detectron.checkpoint.architectures.ARCHITECTURES`, or ``timm/NAME``.
        norm, eps: the threat model of the training; eps of images in [0, 1], for "linf" in 1/255. Standard
            training has eps 0, with or without a norm; None and None: not known.
        input_format: the order of the colours, "RGB" or "BGR".
        pixel_mean, pixel_std: three numbers in 0..255 in that order, which an image is normalised by.
        stride_in_1x1: where bottlenecks have their stride, as in MODEL.RESNETS.STRIDE_IN_1X1.
        source: the file, or the training, that the weights come from.
        sha256: of the source, in hexadecimal; None for a training.

    Raises:
        InputError: for a value that cannot be, naming it.
    """

    arch: str
    norm: str | None
    eps: float | None
    input_format: str
    pixel_mean: tuple[float, ...]
    pixel_std: tuple[float, ...]
    stride_in_1x1: bool
    source: str
    sha256: str | None = None

    def __post_init__(self):
        for key in ("arch", "source"):
            if not isinstance(getattr(self, key), str) or not getattr(self, key):
                raise InputError(f"{key} is {getattr(self, key)!r}; it must be a name")
        if self.norm is not None and self.norm not in NORMS:
            raise InputError(f"unknown norm {self.norm!r}: {', '.join(NORMS)}")
        if (self.norm, self.eps) != (None, None):
            if type(self.eps) not in (int, float) or not 0 <= self.eps < math.inf:
                raise InputError(f"eps must be a number from 0 on, found {self.eps!r}")
            object.__setattr__(self, "eps", float(self.eps))
        if self.input_format not in INPUT_FORMATS:
            raise InputError(f"unknown input format {self.input_format!r}: {' or '.join(INPUT_FORMATS)}")
        if type(self.stride_in_1x1) is not bool:
            raise InputError(f"stride_in_1x1 is {self.stride_in_1x1!r}; it must be true or false")
        if self.sha256 is not None and not isinstance(self.sha256, str):
            raise InputError(f"sha256 is {self.sha256!r}; it must be 64 hexadecimal digits")
        for key, lowest in (("pixel_mean", 0.0), ("pixel_std", 1e-3)):  # a std of 0 would divide by it
            object.__setattr__(self, key, _pixels(getattr(self, key), key, lowest))

    @classmethod
    def from_dict(cls, content: object, path: str) -> "Metadata":
        """The entry ``rt_detectron`` of the file ``path``.

        Raises:
            InputError: naming file and key, if one is missing or damaged.
        """
        if not isinstance(content, Mapping):
            raise InputError(f"{path}: its metadata is damaged: download, convert or train it again")
        known = {each.name: each.default is MISSING for each in fields(cls)}
        missing = [key for key, is_needed in known.items() if is_needed and key not in content]
        try:
            if missing:
                raise InputError(f"{', '.join(missing)} missing")
            return cls(**{key: content[key] for key in known if key in content})
        except InputError as error:
            raise InputError(
                f"{path}: its metadata is damaged ({error}): download, convert or train it again"
            ) from None

    def to_dict(self) -> dict:
        """The stored form: plain lists and numbers."""
        content = {**asdict(self), "pixel_mean": list(self.pixel_mean), "pixel_std": list(self.pixel_std)}
        if self.sha256 is None:
            del content["sha256"]
        return content


def _pixels(values, name: str, lowest: float) -> tuple[float, ...]:
    try:
        found = tuple(float(value) for value in values)
    except (TypeError, ValueError):
        found = ()
    if len(found) != 3 or not all(lowest <= value <= 255 for value in found):
        raise InputError(f"{name} is not three numbers in 0..255")
    return found
