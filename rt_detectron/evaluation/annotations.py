"""Annotation files are checked when an evaluator is made, not after hours of inference."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rt_detectron.utils.errors import InputError, one_line


@contextmanager
def readable(path: str) -> Iterator[None]:
    """What goes wrong while a library reads ``path`` becomes an :class:`InputError`."""
    try:
        yield
    except InputError:
        raise
    except (OSError, ValueError, LookupError, TypeError, AttributeError, AssertionError) as error:
        raise InputError(
            f"{path}: not usable annotations ({one_line(error)[:200]}); datasets/README.md names the format"
        ) from None


def check_annotations(dataset: dict[str, Any], path: str) -> None:
    """Stop unless every annotation can be evaluated; "iscrowd" becomes 0 where it is not given.

    Args:
        dataset: the content of a COCO or LVIS file.
        path: its name in messages.

    Raises:
        InputError: for missing images or categories, or an annotation without a box or an area.
    """
    for key in ("images", "categories"):
        if not dataset.get(key):
            raise InputError(f"{path}: '{key}' is missing or empty; datasets/README.md names the format")
    for annotation in dataset["annotations"]:
        try:
            numbers = [*annotation["bbox"], annotation["area"]]
            usable = len(numbers) == 5 and all(map(math.isfinite, numbers))
        except (KeyError, TypeError):
            usable = False
        if not usable:
            raise InputError(
                f"{path}: annotation {annotation['id']} needs a 'bbox' (x, y, width, height) and an 'area' "
                "in pixels; AP is undefined without them"
            )
        annotation.setdefault("iscrowd", 0)
