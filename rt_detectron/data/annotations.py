"""What goes wrong while COCO's annotation files are read, in one line."""

from collections.abc import Iterator
from contextlib import contextmanager

from rt_detectron.utils.errors import InputError, one_line


@contextmanager
def annotations_of(path: str) -> Iterator[None]:
    """A block that reads or interprets the annotations in ``path``.

    Raises:
        InputError: instead of the errors that libraries raise for a missing or malformed file.
    """
    try:
        yield
    except InputError:
        raise
    except (OSError, ValueError, LookupError, TypeError, AttributeError, AssertionError) as error:
        raise InputError(
            f"{path}: not usable annotations ({one_line(error)[:200]}); datasets/README.md names the format"
        ) from None
