"""Build the demo data from what installed packages ship: handwritten digits painted onto photographs.

Backgrounds are photographs inside the scikit-image and scikit-learn wheels, objects are scikit-learn's
8x8 handwritten digits. Nothing is downloaded. Photographs and digit samples belong to one split each.
"""

import argparse
import json
import os
import shutil
import signal
import sys
import uuid
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from pycocotools import mask as mask_utils
from tqdm import tqdm

from rt_detectron.utils.errors import InputError, one_line_errors

# Only photographs that are inside the wheels, so that nothing is downloaded. Each one is in a single split.
# Pictures with writing (page, text, color) are left out, since they contain digits and letters.
PHOTOGRAPHS = {
    "train": (
        "skimage/astronaut.png",
        "skimage/brick.png",
        "skimage/camera.png",
        "skimage/coffee.png",
        "skimage/grass.png",
        "skimage/hubble_deep_field.jpg",
        "skimage/ihc.png",
        "skimage/moon.png",
        "skimage/motorcycle_left.png",
        "sklearn/china.jpg",
    ),
    "val": (
        "skimage/chelsea.png",
        "skimage/coins.png",
        "skimage/gravel.png",
        "skimage/retina.jpg",
        "skimage/rocket.jpg",
        "sklearn/flower.jpg",
    ),
}
# scikit-learn's digits are sorted by writer, so a split by position keeps nearly all writers apart, too.
DIGIT_SAMPLES = {"train": slice(0, 1437), "val": slice(1437, None)}

CATEGORIES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
# Bright digits on dimmed photographs. With dark digits as well, a small network needs far more passes over
# the data than a demo has time for.
BRIGHTNESS = (0.35, 0.65)  # photographs are multiplied by a factor from this range
PALETTE = np.array(  # RGB
    [
        (255, 225, 25), (250, 250, 250), (120, 240, 40), (30, 230, 215), (255, 150, 40), (255, 190, 200),
        (255, 90, 230), (120, 190, 255), (255, 110, 100), (190, 150, 255),
    ],
    dtype=np.float32,
)  # fmt: skip

MIN_COLOR_DISTANCE = 110  # Euclidean, RGB 0..255, between a digit's colour and the background's mean below it
MAX_ROTATION = 25  # degrees; much more would turn a 6 into a 9
DIGIT_HEIGHT = (0.18, 0.40)  # of the image's side: 29 to 64 px at 160
DIGIT_HEIGHT_CLASSIFICATION = (0.55, 0.9)
DIGITS_PER_IMAGE = (2, 5)
MIN_VISIBLE_FRACTION = 0.65  # digits of which less would be visible are not painted
MIN_VISIBLE_PIXELS = 24
PLACEMENT_TRIES = 4  # few, so that partial occlusion stays common

RECORD = "prepare_demo.json"  # marks a finished folder as ours; holds the arguments it was made with
FORMAT = 2  # increase it when the same arguments give other data


class Source(NamedTuple):
    """Photographs and digits of one split."""

    photographs: dict[str, np.ndarray]  # name to HxWx3 uint8 RGB
    digits: np.ndarray  # (N, 8, 8) float32 in 0..1
    labels: np.ndarray  # (N,) int, 0..9
    first_sample: int  # index of digits[0] in scikit-learn's set, for provenance


class Layer(NamedTuple):
    """One digit before it is painted."""

    label: int
    sample: int  # index in scikit-learn's set
    coverage: np.ndarray  # (H, W) float32, 0..1, anti-aliased; the digit is where it is at least 0.5

    @property
    def mask(self) -> np.ndarray:
        return self.coverage >= 0.5


def load_sources() -> dict[str, Source]:
    """Read photographs and digits, already divided: {"train": Source, "val": Source}.

    Raises:
        InputError: a package is missing, or its version does not ship a photograph.
    """
    for package in ("skimage", "sklearn"):
        if find_spec(package) is None:
            name = {"skimage": "scikit-image", "sklearn": "scikit-learn"}[package]
            raise InputError(f"the demo data needs {name}, which is not installed: pip install -e .[demo]")
    from sklearn.datasets import load_digits

    digits = load_digits()
    return {
        split: Source(
            photographs={name: _load_photograph(name) for name in PHOTOGRAPHS[split]},
            digits=(digits.images[samples] / 16.0).astype(np.float32),
            labels=digits.target[samples],
            first_sample=samples.start,
        )
        for split, samples in DIGIT_SAMPLES.items()
    }


def _load_photograph(name: str) -> np.ndarray:
    """Read a photograph of ``PHOTOGRAPHS`` as HxWx3 uint8 RGB from the installed package's own folder.

    scikit-image's loaders would download what a wheel lacks; reading the file itself cannot.
    """
    package, file_name = name.split("/")
    folder = {"skimage": "data", "sklearn": "datasets/images"}[package]
    path = Path(find_spec(package).submodule_search_locations[0], folder, file_name)
    image = cv2.imread(str(path), cv2.IMREAD_COLOR) if path.is_file() else None
    if image is None:
        raise InputError(f"the installed {package} does not ship {file_name}: pip install -U -e .[demo]")
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


def background(rng: np.random.Generator, source: Source, size: int) -> tuple[str, np.ndarray]:
    """A random crop of a random photograph: its name and a size x size x 3 float32 RGB image in 0..255."""
    name = list(source.photographs)[rng.integers(len(source.photographs))]
    photograph = source.photographs[name]
    height, width = photograph.shape[:2]
    largest = min(height, width)
    side = int(rng.integers(min(size, largest), min(3 * size, largest) + 1))
    top, left = rng.integers(height - side + 1), rng.integers(width - side + 1)
    crop = photograph[top : top + side, left : left + side]
    crop = cv2.resize(crop, (size, size), interpolation=cv2.INTER_AREA).astype(np.float32)
    if rng.random() < 0.5:
        crop = crop[:, ::-1]
    crop *= np.float32(rng.uniform(*BRIGHTNESS))
    mean = crop.mean(axis=(0, 1))
    tint, contrast = rng.uniform(0.85, 1.15, 3).astype(np.float32), np.float32(rng.uniform(0.7, 1.1))
    return name, np.clip((crop - mean) * contrast + mean * tint, 0, 255)


def glyph(digit: np.ndarray) -> np.ndarray:
    """Enlarge an 8x8 digit smoothly and crop it tightly: (h, w) float32 in 0..1, edge at 0.5."""
    enlarged = cv2.resize(np.pad(digit, 1), None, fx=10, fy=10, interpolation=cv2.INTER_CUBIC)
    smooth = cv2.GaussianBlur(enlarged, (0, 0), 2)
    smooth = np.clip(0.5 + (smooth / smooth.max() - 0.45) * 2.5, 0, 1)  # steepen around the stroke's edge
    rows, columns = np.nonzero(smooth > 0)
    return smooth[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1].astype(np.float32)


def random_layer(
    rng: np.random.Generator,
    source: Source,
    size: int,
    heights: tuple[float, float],
    label: int | None = None,
) -> Layer:
    """Draw a digit (of class ``label``, or any) with random scale, slant and rotation, at a random place.

    ``heights`` is the range of its height before rotation, as fractions of ``size``. It lies inside the
    image wherever it fits.
    """
    label = int(rng.integers(10)) if label is None else label
    index = int(rng.choice(np.flatnonzero(source.labels == label)))
    shape = glyph(source.digits[index])
    scale = rng.uniform(*heights) * size / shape.shape[0]
    angle = np.deg2rad(rng.uniform(-MAX_ROTATION, MAX_ROTATION))
    rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    slant = np.array([[rng.uniform(0.9, 1.25), rng.uniform(-0.15, 0.15)], [0, 1]])
    linear = scale * rotation @ slant
    middle = np.array([shape.shape[1] - 1, shape.shape[0] - 1]) / 2
    reach = np.abs(linear) @ middle + 1  # half width and half height of the turned rectangle
    low = np.minimum(reach, size / 2)
    center = rng.uniform(low, size - low)
    affine = np.column_stack([linear, center - linear @ middle])
    # Bilinear sampling of a shrunken glyph would skip pixels; blurring first keeps the edge smooth.
    if scale < 1:
        shape = cv2.GaussianBlur(shape, (0, 0), 0.4 / scale)
    coverage = cv2.warpAffine(shape, affine, (size, size), flags=cv2.INTER_LINEAR)
    return Layer(label, source.first_sample + index, coverage)


def visible_masks(layers: list[Layer]) -> list[tuple[Layer, np.ndarray]]:
    """Each layer that is kept, topmost first, with the (H, W) bool mask of its part that no other covers.

    A layer with too little left to see is dropped altogether, so it neither hides others nor gets painted.
    """
    covered = np.zeros_like(layers[0].mask)
    kept = []
    for layer in layers:
        visible = layer.mask & ~covered
        count = int(visible.sum())
        if count < MIN_VISIBLE_PIXELS or count < MIN_VISIBLE_FRACTION * layer.mask.sum():
            continue
        covered |= visible
        kept.append((layer, visible))
    return kept


def paint(rng: np.random.Generator, image: np.ndarray, layer: Layer, visible: np.ndarray) -> None:
    """Blend a digit into ``image`` (HxWx3 float32, 0..255, changed in place), on its visible pixels only."""
    color = _contrasting_color(rng, image[visible].mean(axis=0))
    opacity = rng.uniform(0.75, 1.0)
    rows, columns = np.nonzero(visible)
    direction = rng.uniform(-25, 25, 2)  # a linear gradient of light over the digit, in grey levels
    shade = direction @ np.stack([rows, columns]) / max(image.shape[:2])
    alpha = (opacity * layer.coverage[visible])[:, None]
    ink = color + (shade - shade.mean())[:, None]
    image[visible] = np.clip(image[visible] * (1 - alpha) + ink * alpha, 0, 255)


def _contrasting_color(rng: np.random.Generator, behind: np.ndarray) -> np.ndarray:
    """A jittered colour of the palette, at least ``MIN_COLOR_DISTANCE`` from the mean colour ``behind``."""
    far = PALETTE[np.linalg.norm(PALETTE - behind, axis=1) >= MIN_COLOR_DISTANCE]
    return np.clip(far[rng.integers(len(far))] + rng.uniform(-15, 15, 3), 0, 255)


def detection_image(
    rng: np.random.Generator, source: Source, size: int
) -> tuple[np.ndarray, str, list[tuple[Layer, np.ndarray]]]:
    """A picture (size x size x 3 uint8 RGB), its photograph's name, its digits with their visible masks."""
    name, image = background(rng, source, size)
    layers = []
    for _ in range(rng.integers(DIGITS_PER_IMAGE[0], DIGITS_PER_IMAGE[1] + 1)):
        for _ in range(PLACEMENT_TRIES):
            candidate = random_layer(rng, source, size, DIGIT_HEIGHT)
            if len(visible_masks([*layers, candidate])) > len(layers):
                layers.append(candidate)
                break
    objects = visible_masks(layers)
    for layer, visible in objects:
        paint(rng, image, layer, visible)
    return image.round().astype(np.uint8), name, objects


def coco_annotation(layer: Layer, visible: np.ndarray) -> dict:
    """COCO annotation (without ids of image and annotation) of a visible mask: RLE, area, tight XYWH box."""
    rle = mask_utils.encode(np.asfortranarray(visible, dtype=np.uint8))
    return {
        "category_id": layer.label + 1,
        "segmentation": {"size": [int(n) for n in rle["size"]], "counts": rle["counts"].decode("ascii")},
        "area": int(mask_utils.area(rle)),
        "bbox": [float(value) for value in mask_utils.toBbox(rle)],
        "iscrowd": 0,
        "digit_sample": layer.sample,
    }


def write_detection(
    root: Path, split: str, source: Source, count: int, size: int, seed: int
) -> Iterator[None]:
    """Write ``count`` pictures to root/split/*.jpg and their annotations. Yields after each picture."""
    (root / split).mkdir(parents=True)
    images, annotations = [], []
    for image_id in range(1, count + 1):
        picture, photograph, objects = detection_image(_rng(seed, "detection", split, image_id), source, size)
        file_name = f"{image_id:06d}.jpg"
        # 4:4:4 at high quality: coarser chroma would spread a digit's colour beyond its mask.
        quality = [cv2.IMWRITE_JPEG_QUALITY, 95]
        quality += [cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444]
        _write_image(root / split / file_name, picture, quality)
        image = {"id": image_id, "file_name": file_name, "width": size, "height": size}
        images.append({**image, "photograph": photograph})
        for layer, visible in objects:
            ids = {"id": len(annotations) + 1, "image_id": image_id}
            annotations.append({**ids, **coco_annotation(layer, visible)})
        yield
    categories = [{"id": i, "name": name, "supercategory": "digit"} for i, name in enumerate(CATEGORIES, 1)]
    (root / "annotations").mkdir(exist_ok=True)
    info = {"description": f"rt_detectron demo data, {split}, seed {seed}"}
    content = {"info": info, "images": images, "annotations": annotations, "categories": categories}
    (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(content), encoding="utf-8")


def write_classification(
    root: Path, split: str, source: Source, count: int, size: int, seed: int
) -> Iterator[None]:
    """Write ``count`` pictures, classes in turn, to root/split/0..9. Yields after each picture.

    A file is named after its running number, its photograph and its digit sample: 000012_grass_0731.png.
    """
    for label in range(10):
        (root / split / str(label)).mkdir(parents=True)
    for index in range(count):
        rng = _rng(seed, "classification", split, index)
        photograph, image = background(rng, source, size)
        layer = random_layer(rng, source, size, DIGIT_HEIGHT_CLASSIFICATION, label=index % 10)
        paint(rng, image, layer, layer.mask)
        name = f"{index:06d}_{Path(photograph).stem}_{layer.sample:04d}.png"
        _write_image(root / split / str(layer.label) / name, image.round().astype(np.uint8), [])
        yield


def _rng(seed: int, task: str, split: str, index: int) -> np.random.Generator:
    """A random generator for each picture, so that none depends on how many came before it."""
    return np.random.default_rng(
        [seed, ("detection", "classification").index(task), ("train", "val").index(split), index]
    )


def _write_image(path: Path, image: np.ndarray, parameters: list[int]) -> None:
    """Encode an RGB picture and write it. Not cv2.imwrite, which only returns False on a full disk."""
    _, encoded = cv2.imencode(path.suffix, cv2.cvtColor(image, cv2.COLOR_RGB2BGR), parameters)
    path.write_bytes(encoded)


def is_finished(output: Path, arguments: dict) -> bool:
    """Whether ``output`` holds complete data made with exactly these arguments.

    Raises:
        InputError: ``output`` exists, is not empty and was not made by this script, or is not a folder.
    """
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return False
    try:
        record = json.loads((output / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise InputError(
            f"{output} exists and was not made by prepare_demo.py: choose another --output or move it away"
        ) from None
    return record.get("arguments") == arguments and record.get("files") == _count_files(output)


def _count_files(folder: Path) -> int:
    """Number of files below ``folder`` without the record."""
    return sum(len(files) for _, _, files in os.walk(folder)) - (folder / RECORD).is_file()


def build(root: Path, arguments: dict) -> None:
    """Write the whole demo data into the new folder ``root``, its record last."""
    sources = load_sources()
    root.mkdir(parents=True)
    total, writers = 0, []
    for task, write, size in (
        ("detection", write_detection, arguments["image_size"]),
        ("classification", write_classification, arguments["classification_size"]),
    ):
        for split, source in sources.items():
            count = arguments[f"{task}_{split}"]
            total += count
            writer = write(root / task, split, source, count, size, arguments["seed"])
            writers.append((f"{task} {split}", writer))
    with tqdm(total=total, unit="image", mininterval=0.5) as progress:
        for name, writer in writers:
            progress.set_description(name)
            for _ in writer:
                progress.update()
    record = {"made_by": "datasets/prepare_demo.py", "arguments": arguments, "files": _count_files(root)}
    (root / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def swap(new: Path, output: Path) -> None:
    """Move the finished folder ``new`` to ``output`` and replace that if it exists."""
    if not output.exists():
        new.rename(output)
        return
    old = new.with_suffix(".old")
    output.rename(old)
    try:
        new.rename(output)
    except BaseException:
        old.rename(output)
        raise
    shutil.rmtree(old)


def prepare(output: Path, arguments: dict) -> bool:
    """Make sure that ``output`` holds the data of ``arguments``. Returns False if it already did.

    The data grow in a hidden sibling folder, which goes away when anything stops the work.
    """
    output = output.expanduser().resolve()
    temporary = output.with_name(f".{output.name}-{uuid.uuid4().hex[:8]}.partial")
    try:
        if is_finished(output, arguments):
            return False
        build(temporary, arguments)
        swap(temporary, output)
    except OSError as error:
        raise InputError(
            f"cannot write {output}: {error.strerror or error}; choose another --output"
        ) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return True


EPILOG = """
what it writes:
  OUTPUT/detection/annotations/instances_{train,val}.json   COCO format, RLE masks, 10 categories
  OUTPUT/detection/{train,val}/*.jpg
  OUTPUT/classification/{train,val}/{0..9}/*.png            ImageFolder format
  OUTPUT/prepare_demo.json                                  the arguments it was made with

The same arguments give the same bytes; running again with finished data costs nothing. Other arguments
replace the folder, at once and only when everything is written. To use the masks in Detectron2, set
INPUT.MASK_FORMAT bitmask.

examples:
  python datasets/prepare_demo.py
  python datasets/prepare_demo.py --output quick --detection-train 40 --detection-val 10 \\
      --classification-train 100 --classification-val 50
"""


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows defaults and keeps the epilog's lines."""


def argument_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, epilog=EPILOG, formatter_class=_Help)
    parser.add_argument("--output", type=Path, default=Path("datasets/demo"), help="folder to make")
    parser.add_argument("--seed", type=int, default=0, help="another seed gives other pictures")
    parser.add_argument("--image-size", type=int, default=160, help="side of a detection picture, px")
    parser.add_argument("--detection-train", type=int, default=800, help="detection pictures to train on")
    parser.add_argument("--detection-val", type=int, default=150, help="detection pictures to evaluate on")
    parser.add_argument(
        "--classification-size", type=int, default=64, help="side of a classification picture, px"
    )
    parser.add_argument(
        "--classification-train", type=int, default=4000, help="classification pictures to train on"
    )
    parser.add_argument(
        "--classification-val", type=int, default=1000, help="classification pictures to evaluate on"
    )
    return parser


def check_arguments(arguments: dict) -> None:
    """Raise an InputError that names the option if a value cannot give usable data."""
    limits = {
        "seed": (0, 2**32 - 1),
        "image_size": (64, 1024),
        "detection_train": (1, 999_999),
        "detection_val": (1, 999_999),
        "classification_size": (32, 512),
        "classification_train": (10, 999_999),  # at least one picture of every class
        "classification_val": (10, 999_999),
    }
    for name, (low, high) in limits.items():
        if not low <= arguments[name] <= high:
            option = "--" + name.replace("_", "-")
            raise InputError(
                f"{option} {arguments[name]} is out of range: give a number from {low} to {high}"
            )


def main(argv: list[str] | None = None) -> None:
    arguments = vars(argument_parser().parse_args(argv))
    output = arguments.pop("output")
    check_arguments(arguments)
    made = prepare(output, {"format": FORMAT, **arguments})
    print(f"demo data written to {output}" if made else f"demo data already in {output}, nothing to do")


if __name__ == "__main__":
    # Ctrl-C and SIGTERM both clean up and leave without a traceback.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: sys.exit(128 + number))
    with one_line_errors():
        main()
