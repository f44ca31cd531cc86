"""Labelled images in class folders, and their decoding."""

import io
import os
from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from PIL import Image
from torch.utils.data import Dataset
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms.v2.functional import pil_to_tensor

from rt_detectron.data.class_folders import list_images
from rt_detectron.data.unreadable import UnreadableImages
from rt_detectron.utils.errors import InputError
from rt_detectron.utils.files import printable
from rt_detectron.utils.pictures import pillow_errors, to_rgb

PNG = b"\x89PNG"


def decode(encoded: bytes) -> torch.Tensor:
    """An image file's bytes to uint8 RGB (3, H, W).

    Decoded by torchvision, but by PIL if torchvision does not know the format (BMP, TIFF), if a channel has
    more than 8 bits, and for PNG: on a damaged one torchvision ends the process with a segmentation fault
    (0.29.1), and PIL compares the checksums.

    Raises:
        DepthError: as :func:`rt_detectron.utils.pictures.to_rgb`.
        OSError: if it is not a whole image, or has more pixels than Pillow reads.
    """
    if not encoded.startswith(PNG):
        try:
            image = decode_image(torch.frombuffer(bytearray(encoded), dtype=torch.uint8), ImageReadMode.RGB)
            image = image[0] if image.dim() == 4 else image  # the first picture of a GIF, as with PIL
            if image.dtype == torch.uint8:
                return image
        except (RuntimeError, ValueError):
            pass
    with pillow_errors(), Image.open(io.BytesIO(encoded)) as opened:
        return pil_to_tensor(to_rgb(opened))


def unchanged(image: torch.Tensor) -> torch.Tensor:
    """No transform; a function, so that it can be sent to worker processes."""
    return image


class EncodedTransform(ABC):
    """A transform that can begin with an image file's bytes, and so need not decode all of the image."""

    @abstractmethod
    def from_encoded(self, encoded: bytes) -> torch.Tensor:
        """The transformed image of a file's bytes.

        Raises:
            as :func:`decode`.
        """


def load(encoded: bytes, transform: Callable) -> torch.Tensor:
    """An image file's bytes, decoded and transformed.

    Args:
        transform: of a uint8 RGB tensor (3, H, W), or torchvision's Compose of such. The first one may be
            an :class:`EncodedTransform`.

    Raises:
        as :func:`decode`.
    """
    first, *others = getattr(transform, "transforms", [transform])
    image = first.from_encoded(encoded) if isinstance(first, EncodedTransform) else first(decode(encoded))
    for other in others:
        image = other(image)
    return image


class FolderDataset(Dataset):
    """Images below ``root/CLASS/``, one folder per class, as torchvision's ImageFolder sorts them.

    Args:
        root: the folder of class folders.
        num_classes: the expected number of class folders; None takes any.
        transform: as for :func:`load`, to uint8 RGB (3, H, W) or to float in [0, 1]; None is none.
        on_corrupt: "stop" or "skip"; skipped images are replaced by the next readable one.
    """

    def __init__(
        self, root: str, num_classes: int | None, transform: Callable | None, on_corrupt: str = "stop"
    ):
        classes, images = list_images(root)
        if num_classes is not None and len(classes) != num_classes:
            raise InputError(f"{root}: has {len(classes)} class folders, but num_classes is {num_classes}")
        self.root = root
        self.classes = [printable(name) for name in classes]
        self.images = images
        self.transform = transform or unchanged
        self.unreadable = UnreadableImages(on_corrupt)

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
                    image = load(file.read(), self.transform)
            except OSError as error:
                self.unreadable.report(path, error)
                continue
            return image, label, printable(os.path.relpath(path, self.root))
        raise InputError(f"none of the {len(self)} images can be read")


def check_same_classes(train: Dataset, test: Dataset) -> None:
    """Check that two folder trees have the same classes, since they are numbered by name.

    Shards hold class numbers only and cannot be compared.

    Raises:
        InputError: naming a class that only one of them has.
    """
    if isinstance(train, FolderDataset) and isinstance(test, FolderDataset) and train.classes != test.classes:
        name = min(set(train.classes) ^ set(test.classes))
        has, lacks = (train, test) if name in train.classes else (test, train)
        raise InputError(
            f"{has.root} has the class {name!r}, but {lacks.root} does not: make the folders agree"
        )
