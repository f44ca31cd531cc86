"""The metadata of a weights file, in its entry ``rt_detectron``."""

import re
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields, replace

from rt_detectron.utils.errors import InputError

NORMS = ("l1", "l2", "linf")
INPUT_FORMATS = ("RGB", "BGR")
MAX_EPS = 1e9
MAX_NAME = 500  # letters; errors show names, in one line


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
            value = getattr(self, key)
            if not isinstance(value, str) or not value.isprintable() or not 0 < len(value) <= MAX_NAME:
                raise InputError(f"{key} is {value!r:.80}; it must be a name")
        if self.norm is not None and not _is_one_of(self.norm, NORMS):
            raise InputError(f"unknown norm {self.norm!r:.80}: {', '.join(NORMS)}")
        if self.norm is not None or self.eps is not None:
            if type(self.eps) not in (int, float) or not 0 <= self.eps < MAX_EPS:
                raise InputError(f"eps must be a number from 0 on, found {self.eps!r:.80}")
            object.__setattr__(self, "eps", float(self.eps))
        if not _is_one_of(self.input_format, INPUT_FORMATS):
            raise InputError(f"unknown input format {self.input_format!r:.80}: {' or '.join(INPUT_FORMATS)}")
        if type(self.stride_in_1x1) is not bool:
            raise InputError(f"stride_in_1x1 is {self.stride_in_1x1!r:.80}; it must be true or false")
        if self.sha256 is not None and not re.fullmatch(r"[0-9a-f]{64}", str(self.sha256)):
            raise InputError(f"sha256 is {self.sha256!r:.80}; it must be 64 hexadecimal digits")
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

    def folded(self) -> "Metadata":
        """Of the same weights with Detectron2's default preprocessing folded into the stem: BGR and std 1."""
        return replace(self, input_format="BGR", pixel_mean=self.pixel_mean[::-1], pixel_std=(1.0,) * 3)


def _is_one_of(value: object, known: tuple[str, ...]) -> bool:
    return isinstance(value, str) and value in known  # an array would answer `in` with an array


def _pixels(values, name: str, lowest: float) -> tuple[float, ...]:
    numbers = values if isinstance(values, list | tuple) else ()
    found = [number for number in numbers if type(number) in (int, float) and lowest <= number <= 255]
    if len(found) != 3 or len(numbers) != 3:
        raise InputError(f"{name} is not three numbers in 0..255")
    return tuple(map(float, found))
