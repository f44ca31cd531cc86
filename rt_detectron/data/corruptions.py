"""Common corruptions of images, as a mapper for Detectron2's test loader.

The 15 + 4 corruptions in 5 severities of Hendrycks & Dietterich (2019), "Benchmarking Neural Network
Robustness to Common Corruptions and Perturbations", in the version for images of any size of Michaelis et al.
(2019), "Benchmarking Robustness in Object Detection": the package imagecorruptions, imported on first use.
"""

import contextlib
import hashlib
import os
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator

import numpy as np
from detectron2.data.detection_utils import read_image
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
_SMALLEST_SIDE = 32  # pixels; imagecorruptions' own bound


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
    """A corrupted copy of ``image``, which depends on nothing but the arguments.

    Args:
        image: H x W x 3, uint8, RGB; no side shorter than 32 pixels.
        name: a corruption's name, see :func:`corruption_names`.
        severity: 1 (slight) to 5.
        seed, image_id: together with name and severity they choose the random numbers.

    Raises:
        InputError: for a smaller image, an unknown name or severity, and where imagecorruptions is missing.
    """
    function = _function(name)
    if severity not in SEVERITIES:
        raise InputError(f"corruption severity {severity!r}: severities are 1, 2, 3, 4 and 5")
    if min(image.shape[:2]) < _SMALLEST_SIDE:
        height, width = image.shape[:2]
        raise InputError(
            f"an image of {width} x {height} pixels is too small to be corrupted: leave out images with a "
            f"side below {_SMALLEST_SIDE} pixels"
        )
    # imagecorruptions draws from numpy's global generator, and prints where it crops by a pixel.
    with _numpy_seeded(seed, image_id, name, severity), contextlib.redirect_stdout(None):
        corrupted = np.asarray(function(Image.fromarray(image), severity))
    return corrupted.astype(np.uint8)


class CorruptionMapper:
    """Any mapper, on corrupted images; for ``build_detection_test_loader(dataset, mapper=...)``.

    The image is corrupted as it is stored, before it is resized, as Michaelis et al. do, in whatever worker
    process the mapper runs in. ``mapper`` finds the result in a temporary file, so it runs unchanged, its
    colour order and annotations included.

    Args:
        mapper: takes a dataset dict, reads its "file_name"; usually Detectron2's DatasetMapper.
        name, severity, seed: as for :func:`corrupt`; its image id is the dict's, else the file's name.

    Raises:
        InputError: where imagecorruptions is missing, or the name or severity is unknown; from a call, naming
            the file, for an image that is too small.
    """

    def __init__(self, mapper: Callable[[dict], dict], name: str, severity: int, seed: int = 0):
        corrupt(np.zeros((_SMALLEST_SIDE, _SMALLEST_SIDE, 3), np.uint8), name, severity)  # say it now if not
        self.mapper, self.name, self.severity, self.seed = mapper, name, severity, seed

    def __call__(self, dataset_dict: dict) -> dict:
        path = dataset_dict["file_name"]
        image_id = dataset_dict.get("image_id", os.path.basename(path))
        try:
            image = corrupt(read_image(path, "RGB"), self.name, self.severity, self.seed, image_id)
        except InputError as error:
            raise InputError(f"{path}: {error}") from None
        with tempfile.NamedTemporaryFile(
            suffix=".bmp"
        ) as file:  # lossless, and the fastest to write and read
            Image.fromarray(image).save(file, "BMP")
            file.flush()
            mapped = self.mapper({**dataset_dict, "file_name": file.name})
        return {**mapped, "file_name": path}


@contextlib.contextmanager
def _numpy_seeded(*key: int | str) -> Iterator[None]:
    """Numpy's global generator seeded by ``key`` within the block, and as it was after it."""
    digest = hashlib.sha256("|".join(map(str, key)).encode()).digest()
    state = np.random.get_state()
    np.random.seed(np.frombuffer(digest, "<u4"))
    try:
        yield
    finally:
        np.random.set_state(state)


def _function(name: str) -> Callable[[Image.Image, int], np.ndarray | Image.Image]:
    (name,) = corruption_names([name])
    with warnings.catch_warnings():  # of its imports from deprecated places
        warnings.simplefilter("ignore")
        corruptions = optional_import(
            "imagecorruptions.corruptions",
            "imagecorruptions>=1.1.2 scikit-image>=0.22 setuptools<81",
            "image corruptions",
        )
    return _REPLACEMENTS.get(name) or getattr(corruptions, name)


# What follows replaces functions of imagecorruptions 1.1.2: three that use arguments and names which
# scikit-image and numpy no longer have, one that draws from a generator which cannot be seeded from outside
# any more, and one that gives NaN where there is nothing to draw. Constants and formulas are the originals'.


def _gaussian_blur(image: Image.Image, severity: int) -> np.ndarray:
    sigma = (1, 2, 3, 4, 6)[severity - 1]
    return np.clip(_blurred(np.array(image) / 255.0, sigma), 0, 1) * 255


def _glass_blur(image: Image.Image, severity: int) -> np.ndarray:
    """The original's loop over pixels, each of which takes the value of a near one, as array operations.

    Its "swap" through numpy's views copies only: x[p] = x[q]. So the result is where each pixel's value comes
    from in the end: from q itself, if the loop reached q later or never, else from where q's came from.
    """
    sigma, delta, iterations = ((0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2))[severity - 1]
    blurred = (_blurred(np.array(image) / 255.0, sigma) * 255).astype(np.uint8)
    height, width = blurred.shape[:2]
    ys, xs = np.arange(height - delta, delta, -1), np.arange(width - delta, delta, -1)
    visited = (ys[:, None] * width + xs).ravel()  # in the loop's order: backwards
    order = np.full(height * width, visited.size)  # of each pixel's turn; after all others' if it has none
    order[visited] = np.arange(visited.size)
    pixels = blurred.reshape(height * width, -1)
    for _ in range(iterations):
        dx, dy = np.random.randint(-delta, delta, size=(visited.size, 2)).T
        source = np.arange(height * width)
        source[visited] += dy * width + dx
        final = np.ones(source.size, bool)
        final[visited] = order[source[visited]] >= order[visited]
        while not final.all():  # doubles the length of the chains that are followed
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
    rng = np.random.randint(2**31)  # so that numpy's global seed decides, as in scikit-image of old
    return np.clip(random_noise(np.array(image) / 255.0, mode="s&p", amount=amount, rng=rng), 0, 1) * 255


def _spatter(image: Image.Image, severity: int) -> np.ndarray:
    """A small image may happen to get no drop: then the original divides zero by zero."""
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
