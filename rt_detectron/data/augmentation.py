"""Random crops that decode no more than they need, and colour noise for whole batches on the device."""

import io
import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import RandomResizedCrop as _Draw
from torchvision.transforms import v2 as T
from torchvision.transforms.v2.functional import pil_to_tensor, resize, to_dtype

from rt_detectron.data.images import EncodedTransform, decode
from rt_detectron.utils.errors import InputError
from rt_detectron.utils.pictures import pillow_errors, to_rgb

_JPEG = b"\xff\xd8"
_ORDERS = list(itertools.permutations(range(3)))  # of brightness, contrast and saturation


class RandomResizedCrop(T.RandomResizedCrop, EncodedTransform):
    """torchvision's RandomResizedCrop with antialiasing, which can also begin with a file's bytes.

    libjpeg can decode a JPEG at 1/2, 1/4 or 1/8 of its size, each pixel the mean of those that it stands for,
    but for rounding. Where the crop is at least twice (4, 8 times) as wide and as high as the output, this
    saves time and changes little, since the resizing would average the pixels anyway. The crop's corners are
    then rounded to whole pixels of the smaller picture. Anything else is decoded in full, and gives the same
    pixels as torchvision's transform of the decoded image.

    Args:
        size: of the output, pixels: one number, or height and width.
        scale: smallest and largest share of the image's area.
        ratio: smallest and largest ratio of width to height.
        scaled_decoding: False always decodes in full.
    """

    def __init__(
        self,
        size: int | tuple[int, int],
        scale: tuple[float, float] = (0.08, 1.0),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
        scaled_decoding: bool = True,
    ):
        super().__init__(size=size, scale=scale, ratio=ratio, antialias=True)
        self.scaled_decoding = scaled_decoding

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Called by torchvision for what it is applied to."""
        return self._resized(inpt, **params) if type(inpt) is Tensor else super().transform(inpt, params)

    def from_encoded(self, encoded: bytes) -> Tensor:
        """A crop, uint8 RGB (3, *size), of an image file's bytes.

        Raises:
            as :func:`rt_detectron.data.images.decode`.
        """
        if not self.scaled_decoding or not encoded.startswith(_JPEG):
            return self(decode(encoded))
        try:
            opened = Image.open(io.BytesIO(encoded))  # reads the header only
        except Exception:
            return self(decode(encoded))  # tells what is wrong with it
        with opened:
            top, left, height, width = self._box(*opened.size)
            factor = self.factor(height, width)
            if factor == 1:
                return self._resized(decode(encoded), top, left, height, width)
            with pillow_errors():
                opened.draft(None, (opened.width // factor, opened.height // factor))
                box = scaled_box((left, top, width, height), factor, opened.size)
                cropped = pil_to_tensor(to_rgb(opened.crop(box)))
            return self._resized(cropped)

    def factor(self, height: int, width: int) -> int:
        """By how much a picture can be reduced whose crop is of this size: 1, 2, 4 or 8."""
        most = min(height // self.size[0], width // self.size[1])
        return next(factor for factor in (8, 4, 2, 1) if factor <= most or factor == 1)

    def _box(self, width: int, height: int) -> tuple[int, int, int, int]:
        """Top, left, height and width of a random crop, drawn as torchvision does."""
        picture = torch.empty(3, height, width, device="meta")
        return _Draw.get_params(picture, list(self.scale), list(self.ratio))

    def _resized(
        self, image: Tensor, top: int = 0, left: int = 0, height: int = -1, width: int = -1
    ) -> Tensor:
        if height > 0:
            image = image[..., top : top + height, left : left + width]
        # Decoders give colours that lie side by side. torch resizes them faster so, but not a part of rows.
        if image.dim() == 3:
            image = image.permute(1, 2, 0).contiguous().permute(2, 0, 1)
        return resize(image, list(self.size), antialias=True)


def scaled_box(
    box: tuple[int, int, int, int], factor: int, size: tuple[int, int]
) -> tuple[int, int, int, int]:
    """Where a crop lies in a picture that is ``factor`` times smaller, to whole pixels.

    Args:
        box: left, top, width and height in the original.
        size: width and height of the smaller picture.

    Returns:
        left, top, right and bottom.
    """
    extent = [min(max(round(length / factor), 1), most) for length, most in zip(box[2:], size, strict=True)]
    start = [
        min(round(position / factor), most - length)
        for position, length, most in zip(box[:2], extent, size, strict=True)
    ]
    return start[0], start[1], start[0] + extent[0], start[1] + extent[1]


class Lighting:
    """AlexNet's PCA noise on an RGB image (Krizhevsky et al. 2012, section 4.1).

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

    def shift(self) -> Tensor:
        """What is added to red, green and blue, (3,), from torch's global random numbers."""
        weights = torch.randn(3, dtype=torch.float32) * self.std
        return self.EIGENVECTORS @ (weights * self.EIGENVALUES)

    def __call__(self, image: Tensor) -> Tensor:
        """(3, H, W), uint8 or float in [0, 1], to float in [0, 1]."""
        image = to_dtype(image, torch.float32, scale=True)
        return (image + self.shift().view(3, 1, 1)).clamp(0, 1)


class ColorNoise:
    """torchvision's ColorJitter of brightness, contrast and saturation, then :class:`.Lighting`, in batches.

    Equal in distribution, in float32 instead of 8 bits. The factors of each image are drawn where it is
    loaded, so they follow from its seed, whatever batch it is in; the device applies them to all images at
    once, without waiting for their values.

    Args:
        brightness, contrast, saturation: each factor is drawn from 1 - value (at least 0) to 1 + value; the
            three follow one another in random order.
        lighting: standard deviation of the PCA noise's weights; 0 is none.
    """

    def __init__(
        self, brightness: float = 0.0, contrast: float = 0.0, saturation: float = 0.0, lighting: float = 0.0
    ):
        values = {
            "brightness": brightness,
            "contrast": contrast,
            "saturation": saturation,
            "lighting": lighting,
        }
        for name, value in values.items():
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
                raise InputError(f"ColorNoise: {name} is {value!r}; it must be a number >= 0")
        self.jitter = [brightness, contrast, saturation]
        self.lighting = Lighting(lighting)

    def draw(self) -> Tensor:
        """The factors of one image, (9,), from torch's global random numbers.

        Which of the three comes first, second and third (0 brightness, 1 contrast, 2 saturation); their
        factors in that order; what is added to red, green and blue.
        """
        first, *places = torch.rand(4).tolist()
        order = _ORDERS[min(int(first * len(_ORDERS)), len(_ORDERS) - 1)]
        low = [max(1 - value, 0.0) for value in self.jitter]
        factors = [low[i] + places[i] * (1 + self.jitter[i] - low[i]) for i in order]
        return torch.cat([torch.tensor([*order, *factors], dtype=torch.float32), self.lighting.shift()])

    @torch.no_grad()
    def __call__(self, images: Tensor, factors: Tensor) -> Tensor:
        """Float32 images in [0, 1] of uint8 RGB ones, (N, 3, H, W), and their factors, (N, 9).

        Raises:
            InputError: for images of another type.
        """
        if images.dtype != torch.uint8:
            raise InputError(
                f"ColorNoise takes uint8 images, and the transform gives {images.dtype}: leave out what "
                "makes floats of them, such as ToDtype"
            )
        images = images.to(torch.float32, memory_format=torch.contiguous_format).div_(255)
        columns = factors.view(len(factors), -1, 1, 1, 1).unbind(1)
        for kind, factor in zip(columns[:3], columns[3:6], strict=True):
            red, green, blue = images.unbind(1)
            grey = red.mul(0.2989).add_(green, alpha=0.587).add_(blue, alpha=0.114).unsqueeze(1)
            mean = grey.mean((2, 3), keepdim=True)
            # Towards black, the mean grey, or each pixel's own grey.
            other = torch.where(kind == 2, grey, mean * (kind == 1))
            images.mul_(factor).add_(other.mul_(1 - factor)).clamp_(0, 1)
        shift = factors[:, 6:].view(-1, 3, 1, 1)
        return images.add_(shift).clamp_(0, 1)


class UnfinishedImages:
    """A batch of images whose last transform is still to be applied, on the device.

    Args:
        pixels: uint8 (N, 3, H, W).
        factors: what the transform has drawn for each image, (N, ...).
        transform: from these two to float images in [0, 1], such as :class:`ColorNoise`.
    """

    def __init__(self, pixels: Tensor, factors: Tensor, transform: Callable[[Tensor, Tensor], Tensor]):
        self.pixels = pixels
        self.factors = factors
        self.transform = transform

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, part: slice) -> "UnfinishedImages":
        return UnfinishedImages(self.pixels[part], self.factors[part], self.transform)

    def to(self, device: torch.device, non_blocking: bool = False) -> "UnfinishedImages":
        pixels, factors = (part.to(device, non_blocking=non_blocking) for part in (self.pixels, self.factors))
        return UnfinishedImages(pixels, factors, self.transform)

    def finish(self) -> Tensor:
        """Float images in [0, 1], (N, 3, H, W), the same whenever it is called."""
        return self.transform(self.pixels, self.factors)
