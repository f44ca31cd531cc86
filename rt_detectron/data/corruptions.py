"""Common corruptions of images, for Detectron2's test loader.

The 15 + 4 corruptions in 5 severities of Hendrycks & Dietterich (2019), "Benchmarking Neural Network
Robustness to Common Corruptions and Perturbations", in the version for images of any size of Michaelis et al.
(2019), "Benchmarking Robustness in Object Detection": the package imagecorruptions, imported on first use.
"""

import contextlib
import copy
import hashlib
import os
import warnings
from collections.abc import Callable, Iterable, Iterator

import numpy as np
from detectron2.data import DatasetMapper
from detectron2.data.transforms import Augmentation, AugmentationList
from detectron2.data.transforms.transform import ColorTransform
from PIL import Image

from rt_detectron.utils.errors import InputError, did_you_mean, optional_import

COMMON_CORRUPTIONS = (
    "gaussian_noise",
    "shot_noise",
    "impulse_noise",
    "defocus_blur",
    "glass_blur",
    "motion_blur",
    "zoom_blur",
    "snow",
    "frost",
    "fog",
    "brightness",
    "contrast",
    "elastic_transform",
    "pixelate",
    "jpeg_compression",
)
EXTRA_CORRUPTIONS = ("speckle_noise", "gaussian_blur", "spatter", "saturate")
SEVERITIES = (1, 2, 3, 4, 5)
SMALLEST_SIDE = 32  # pixels; imagecorruptions' own bound
USUAL_SIDE = 224  # pixels; what the severities were chosen for


def corruption_names(names: Iterable[str]) -> tuple[str, ...]:
    """``names``, each once, with "common" for the 15 corruptions and "all" for the 15 + 4.

    Raises:
        InputError: for an unknown name.
    """
    everything = COMMON_CORRUPTIONS + EXTRA_CORRUPTIONS
    groups = {"common": COMMON_CORRUPTIONS, "all": everything, **{name: (name,) for name in everything}}
    for name in names:
        if name not in groups:
            hint = did_you_mean(name, groups) or f"; known are {', '.join(groups)}"
            raise InputError(f"unknown corruption {name!r}{hint}")
    return tuple(dict.fromkeys(corruption for name in names for corruption in groups[name]))


def corrupt(
    image: np.ndarray, name: str, severity: int, seed: int = 0, image_id: int | str = ""
) -> np.ndarray:
    """A corrupted copy of ``image``. It depends on the arguments alone.

    Args:
        image: H x W x 3, uint8, RGB; no side shorter than 32 pixels.
        name: a corruption's name, see :func:`corruption_names`.
        severity: 1 (slight) to 5.
        seed, image_id: the random numbers depend on these, the name and the severity.

    Raises:
        InputError: for a smaller image, an unknown name or severity, or if imagecorruptions is missing.
    """
    function = _function(name)
    if severity not in SEVERITIES:
        raise InputError(f"corruption severity {severity!r}: severities are 1, 2, 3, 4 and 5")
    if min(image.shape[:2]) < SMALLEST_SIDE:
        height, width = image.shape[:2]
        raise InputError(
            f"an image of {width} x {height} pixels is too small to be corrupted: leave out images with a "
            f"side shorter than {SMALLEST_SIDE} pixels"
        )
    # imagecorruptions uses numpy's global generator, and prints a line if it crops by a pixel.
    with _numpy_seeded(seed, image_id, name, severity), contextlib.redirect_stdout(None):
        corrupted = np.asarray(function(Image.fromarray(image), severity))
    return corrupted.astype(np.uint8)


class CorruptionAugmentation(Augmentation):
    """A corruption as one of Detectron2's augmentations; for the image as it was read, so put it first.

    Args:
        name, severity, seed, image_id: as for :func:`corrupt`.
        image_format: the images' channel order, "RGB" or "BGR".

    Raises:
        InputError: for another format, and see :func:`corrupt`.
    """

    def __init__(
        self, name: str, severity: int, seed: int = 0, image_id: int | str = "", image_format: str = "RGB"
    ):
        if image_format not in ("RGB", "BGR"):
            raise InputError(f"corruptions: INPUT.FORMAT is {image_format!r}; it must be RGB or BGR")
        self.name, self.severity, self.seed, self.image_id = name, severity, seed, image_id
        self.image_format = image_format

    def get_transform(self, image: np.ndarray) -> ColorTransform:
        return ColorTransform(self._corrupt)

    def _corrupt(self, image: np.ndarray) -> np.ndarray:
        """H x W x 3, uint8."""
        channels = slice(None, None, -1 if self.image_format == "BGR" else 1)  # imagecorruptions takes RGB
        rgb = np.ascontiguousarray(image[:, :, channels])
        return corrupt(rgb, self.name, self.severity, self.seed, self.image_id)[:, :, channels]


class CorruptionMapper:
    """A DatasetMapper on corrupted images, for ``build_detection_test_loader(dataset, mapper=...)``.

    The image is corrupted as it is stored, before it is resized, as Michaelis et al. do. Annotations are
    unchanged.

    Args:
        mapper: Detectron2's DatasetMapper, or another with its ``augmentations`` and ``image_format``.
        name, severity, seed: as for :func:`corrupt`. Its image id is the dict's, else the file's name.

    Raises:
        InputError: if imagecorruptions is missing, or for an unknown name or severity. When called, for an
            image that is too small, with its file.
    """

    def __init__(self, mapper: DatasetMapper, name: str, severity: int, seed: int = 0):
        corrupt(np.zeros((SMALLEST_SIDE, SMALLEST_SIDE, 3), np.uint8), name, severity)  # fails early
        self.mapper, self.name, self.severity, self.seed = mapper, name, severity, seed

    def __call__(self, dataset_dict: dict) -> dict:
        path = dataset_dict["file_name"]
        image_id = dataset_dict.get("image_id", os.path.basename(path))
        corruption = CorruptionAugmentation(
            self.name, self.severity, self.seed, image_id, self.mapper.image_format
        )
        # An augmentation is not told which image it gets, so each image has its own.
        mapper = copy.copy(self.mapper)
        mapper.augmentations = AugmentationList([corruption, self.mapper.augmentations])
        try:
            return mapper(dataset_dict)
        except InputError as error:
            raise InputError(f"{path}: {error}") from None


@contextlib.contextmanager
def _numpy_seeded(*key: int | str) -> Iterator[None]:
    """Seed numpy's global generator with ``key`` in the block and restore its state afterwards."""
    digest = hashlib.sha256("|".join(map(str, key)).encode()).digest()
    state = np.random.get_state()
    np.random.seed(np.frombuffer(digest, "<u4"))
    try:
        yield
    finally:
        np.random.set_state(state)


def _function(name: str) -> Callable[[Image.Image, int], np.ndarray | Image.Image]:
    (name,) = corruption_names([name])
    with warnings.catch_warnings():  # about its deprecated imports
        warnings.simplefilter("ignore")
        corruptions = optional_import(
            "imagecorruptions.corruptions",
            "imagecorruptions>=1.1.2 scikit-image>=0.22 setuptools<81",
            "image corruptions",
        )
    return _REPLACEMENTS.get(name) or getattr(corruptions, name)


# These replace functions of imagecorruptions 1.1.2: three use arguments and names that scikit-image and numpy
# no longer have, one uses a generator that can no longer be seeded from outside, and one returns NaN if there
# is nothing to draw. Constants and formulas are the same.


def _gaussian_blur(image: Image.Image, severity: int) -> np.ndarray:
    sigma = (1, 2, 3, 4, 6)[severity - 1]
    return np.clip(_blurred(np.array(image) / 255.0, sigma), 0, 1) * 255


def _glass_blur(image: Image.Image, severity: int) -> np.ndarray:
    """The original's loop over pixels, each of which takes the value of a near one, as array operations.

    The original means to swap pixels, but through numpy's views it only copies: x[p] = x[q]. So p ends up
    with q's original value if the loop reaches q later or never, else with the value that q has received.
    """
    sigma, delta, iterations = ((0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2))[severity - 1]
    blurred = (_blurred(np.array(image) / 255.0, sigma) * 255).astype(np.uint8)
    height, width = blurred.shape[:2]
    ys, xs = np.arange(height - delta, delta, -1), np.arange(width - delta, delta, -1)
    visited = (ys[:, None] * width + xs).ravel()  # in the loop's order: backwards
    order = np.full(height * width, visited.size)  # each pixel's turn; last if the loop skips it
    order[visited] = np.arange(visited.size)
    pixels = blurred.reshape(height * width, -1)
    for _ in range(iterations):
        dx, dy = np.random.randint(-delta, delta, size=(visited.size, 2)).T
        source = np.arange(height * width)
        source[visited] += dy * width + dx
        final = np.ones(source.size, bool)
        final[visited] = order[source[visited]] >= order[visited]
        while not final.all():  # each pass doubles the length of the chains followed
            source, final = np.where(final, source, source[source]), final | final[source]
        pixels = pixels[source]
    return np.clip(_blurred(pixels.reshape(blurred.shape) / 255.0, sigma), 0, 1) * 255


def _fog(image: Image.Image, severity: int) -> np.ndarray:
    strength, decay = ((1.5, 2), (2.0, 2), (2.5, 1.7), (2.5, 1.5), (3.0, 1.4))[severity - 1]
    pixels = np.array(image) / 255.0
    height, width = pixels.shape[:2]
    brightest = pixels.max()
    clouds = _plasma_fractal(1 << (max(height, width) - 1).bit_length(), decay)[:height, :width, None]
    return np.clip((pixels + strength * clouds) * brightest / (brightest + strength), 0, 1) * 255


def _plasma_fractal(size: int, decay: float) -> np.ndarray:
    """A height map by the diamond-square algorithm: size x size (a power of two), in [0, 1]."""
    heights = np.zeros((size, size))
    step, wibble = size, 100.0

    def displaced(total_of_four: np.ndarray) -> np.ndarray:
        return total_of_four / 4 + wibble * np.random.uniform(-wibble, wibble, total_of_four.shape)

    while step >= 2:
        half = step // 2
        corners = heights[::step, ::step]
        total = corners + np.roll(corners, -1, axis=0)
        heights[half::step, half::step] = displaced(total + np.roll(total, -1, axis=1))
        centers = heights[half::step, half::step]
        right, below = corners + np.roll(corners, -1, axis=1), corners + np.roll(corners, -1, axis=0)
        heights[::step, half::step] = displaced(centers + np.roll(centers, 1, axis=0) + right)
        heights[half::step, ::step] = displaced(centers + np.roll(centers, 1, axis=1) + below)
        step, wibble = half, wibble / decay
    heights -= heights.min()
    return heights / heights.max()


def _impulse_noise(image: Image.Image, severity: int) -> np.ndarray:
    from skimage.util import random_noise

    amount = (0.03, 0.06, 0.09, 0.17, 0.27)[severity - 1]
    rng = np.random.randint(2**31)  # numpy's global seed decides, as in old scikit-image
    return np.clip(random_noise(np.array(image) / 255.0, mode="s&p", amount=amount, rng=rng), 0, 1) * 255


def _spatter(image: Image.Image, severity: int) -> np.ndarray:
    """The original, except where a small image gets no drop: there it divides zero by zero."""
    from imagecorruptions import corruptions

    with np.errstate(invalid="ignore"):
        spattered = corruptions.spatter(image, severity)
    return np.where(np.isnan(spattered), np.array(image), spattered)


def _blurred(image: np.ndarray, sigma: float) -> np.ndarray:
    from skimage.filters import gaussian

    return gaussian(image, sigma=sigma, channel_axis=-1)


_REPLACEMENTS = {
    "gaussian_blur": _gaussian_blur,
    "glass_blur": _glass_blur,
    "fog": _fog,
    "impulse_noise": _impulse_noise,
    "spatter": _spatter,
}
