"""What is wrong with annotations, in one line: files that cannot be read, objects that cannot be used."""

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from detectron2.structures import BoxMode
from pycocotools.coco import COCO

from rt_detectron.utils.errors import InputError, one_line

logger = logging.getLogger(__name__)


@contextmanager
def annotations_of(path: str) -> Iterator[None]:
    """A block that reads or interprets the annotations in ``path``.

    Raises:
        InputError: instead of the errors that libraries raise for a missing or malformed file, and of
            Detectron2's warning of annotations whose images the file does not list. As :func:`check_ids`,
            too.
    """
    reader = logging.getLogger("detectron2.data.datasets.coco")
    reader.addFilter(_refuse_unlisted)

    def create_index(coco: COCO) -> None:
        check_ids(coco.dataset, path)
        original(coco)

    original, COCO.createIndex = COCO.createIndex, create_index
    try:
        yield
    except InputError:
        raise
    except (
        OSError,
        ValueError,
        ArithmeticError,
        LookupError,
        TypeError,
        AttributeError,
        AssertionError,
    ) as error:
        raise InputError(
            f"{path}: not usable annotations ({one_line(error)[:200]}); datasets/README.md names the format"
        ) from None
    finally:
        COCO.createIndex = original
        reader.removeFilter(_refuse_unlisted)


def _refuse_unlisted(record: logging.LogRecord) -> bool:
    """A filter of Detectron2's messages as it reads a file, which has parsed it then."""
    text = " ".join(record.getMessage().split())
    if "of them match to images in the file" in text:
        text = text.replace(" contains ", ": contains ", 1).rstrip(".")
        raise InputError(f"{text}: list the images of the others, or drop these annotations")
    return True


def check_ids(dataset: dict[str, Any], path: str) -> None:
    """Check that no two images, and no two categories, of a COCO or LVIS file have the same id.

    The libraries keep the last one only, and give it the objects of both. An image that is merely listed
    twice does no harm. Detectron2 checks the ids of annotations.

    Args:
        path: the file's name in messages.

    Raises:
        InputError: naming two.
    """
    for kind, name in (("images", "file_name"), ("categories", "name")):
        seen: dict[Any, dict] = {}
        for entry in dataset.get(kind) or ():
            first = seen.setdefault(entry["id"], entry)
            if first is not entry and (kind == "categories" or first != entry):
                raise InputError(
                    f"{path}: two {kind} have the id {entry['id']!r}, {first.get(name)!r} and "
                    f"{entry.get(name)!r}: give each one an id of its own"
                )


def check_objects(records: Sequence[dict], mask_format: str | None = None, keypoints: int = 0) -> None:
    """Check that a detector can be trained on, or attacked with, the objects of dataset dicts.

    Args:
        records: in Detectron2's format. Crowds are passed over, since Detectron2's mapper drops them.
        mask_format: INPUT.MASK_FORMAT, "polygon" or "bitmask"; None if masks are not needed.
        keypoints: how many each object needs; 0 if none.

    Raises:
        InputError: naming the image, for an object without a box, a mask or keypoints as they are needed.
    """
    for record in records:
        for number, annotation in enumerate(record.get("annotations", [])):
            problem = None
            if not are_numbers(annotation.get("bbox"), 4):
                problem = "has no box; every annotation needs a 'bbox' of four numbers"
            elif _is_inside_out(annotation):
                problem = "has a box of negative width or height; a 'bbox' is x, y, width, height"
            elif annotation.get("iscrowd", 0) not in (0, 1):
                problem = f"has 'iscrowd' {annotation['iscrowd']!r}; it is 0 or 1"
            elif annotation.get("iscrowd", 0) == 0:
                problem = (
                    (mask_format and _mask_problem(annotation, record, mask_format))
                    or (keypoints and _keypoints_problem(annotation, keypoints))
                    or None
                )
            if problem:
                raise InputError(f"{record['file_name']}: annotation {number} {problem}")


def warn_of_boxes_outside(records: Sequence[dict], name: str) -> None:
    """Warn of boxes that reach out of their image by more than a pixel, or have no area.

    Such are in COCO, too. If there are many, their four numbers are probably something else.
    """
    boxes = [(record, each) for record in records for each in record.get("annotations", ())]
    odd = [record for record, each in boxes if _is_odd(each, record)]
    if odd:
        logger.warning(
            "%s: %d of %d boxes have no area or reach out of the image, such as one in %s; a 'bbox' is "
            "x, y, width, height",
            name, len(odd), len(boxes), odd[0]["file_name"],
        )  # fmt: skip


def _is_inside_out(annotation: dict) -> bool:
    x1, y1, x2, y2 = _corners(annotation)
    return x2 < x1 or y2 < y1


def _is_odd(annotation: dict, record: dict) -> bool:
    x1, y1, x2, y2 = _corners(annotation)
    beyond = x2 > record.get("width", math.inf) + 1 or y2 > record.get("height", math.inf) + 1
    return beyond or min(x1, y1) < -1 or x2 == x1 or y2 == y1


def _corners(annotation: dict) -> tuple[float, float, float, float]:
    """As BoxMode.convert, which takes twenty microseconds for a box."""
    x, y, x2, y2 = annotation["bbox"]
    is_xywh = annotation.get("bbox_mode") == BoxMode.XYWH_ABS
    return (x, y, x + x2, y + y2) if is_xywh else (x, y, x2, y2)


def are_numbers(value: Any, count: int | None = None) -> bool:
    """Whether ``value`` is a sequence of finite numbers, of that length if one is given."""
    try:
        return count in (None, len(value)) and all(map(math.isfinite, value))
    except TypeError:
        return False


def shape_problem(segmentation: Any, height: int, width: int) -> str | None:
    """What is wrong with a COCO segmentation, polygons or RLE, of an image of that size; None if nothing.

    A polygon of two points is wrong, since pycocotools takes its four numbers for a box.
    """
    if not segmentation:
        return "'segmentation' is missing or empty"
    if isinstance(segmentation, dict):
        if list(segmentation.get("size", ())) != [height, width] or "counts" not in segmentation:
            return f"its RLE is of the size {segmentation.get('size')}, its image {[height, width]}"
        return None
    if not isinstance(segmentation, list):
        return "'segmentation' is neither polygons nor RLE"
    for polygon in segmentation:
        if not are_numbers(polygon) or len(polygon) < 6 or len(polygon) % 2:
            return "a polygon needs x and y of three points or more"
    return None


def _mask_problem(annotation: dict, record: dict, mask_format: str) -> str | None:
    segmentation = annotation.get("segmentation")
    problem = shape_problem(segmentation, record.get("height", -1), record.get("width", -1))
    if problem:
        return f"has no usable mask ({problem}): annotate it, or set MODEL.MASK_ON False"
    if mask_format == "polygon" and isinstance(segmentation, dict):
        return (
            "has a mask in RLE, not polygons: set INPUT.MASK_FORMAT bitmask (in a LazyConfig, the mapper's "
            "instance_mask_format)"
        )
    return None


def _keypoints_problem(annotation: dict, keypoints: int) -> str | None:
    if are_numbers(annotation.get("keypoints"), 3 * keypoints):
        return None
    return (
        f"has no {keypoints} keypoints (x, y, visibility): annotate them, or set MODEL.KEYPOINT_ON False or "
        "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS"
    )
