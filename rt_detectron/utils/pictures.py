"""Pictures in files: what is wrong with one, and one way to turn it into 8 bits a channel."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO

from PIL import Image, ImageOps, UnidentifiedImageError

from rt_detectron.utils.errors import InputError, one_line

_ORIENTATION = 0x0112  # EXIF tag; from 5 on, the picture is turned by 90 degrees one way or the other
# The last bytes of a whole file, by Pillow's format. MPO is what many phones write: JPEG and more.
_ENDS = {"JPEG": b"\xff\xd9", "MPO": b"\xff\xd9", "PNG": b"IEND\xaeB`\x82"}


class DepthError(OSError):
    """An image of one channel with more than 8 bits, whole numbers or floating point.

    Which of its values are black and white is not in the file. Pillow would clip nearly all to white.
    """


def to_rgb(image: Image.Image) -> Image.Image:
    """``image`` as RGB with 8 bits a channel. Colours of 16 bits are reduced to 8, as Pillow does.

    Raises:
        DepthError: for one channel of more than 8 bits.
    """
    _check_depth(image)
    return image.convert("RGB")


def read_upright(file: str | os.PathLike | IO[bytes]) -> Image.Image:
    """A picture as Detectron2 reads it: RGB, turned upright by its EXIF tag.

    Raises:
        DepthError: as :func:`to_rgb`.
        OSError: if it is not a whole picture, or has more pixels than Pillow reads.
    """
    with pillow_errors(), Image.open(file) as image:
        return to_rgb(ImageOps.exif_transpose(image))


def upright_size(file: IO[bytes], verify: bool = False) -> tuple[int, int]:
    """Width and height of a picture once it is turned upright, from its header.

    Only header and last bytes are read, unless these are not those of a whole JPEG or PNG file: then the
    picture is decoded.

    Args:
        verify: whether to compare the checksums of a PNG. Detectron2 takes what it can decode of a broken
            one without an error.

    Raises:
        DepthError, OSError: as :func:`read_upright`.
    """
    with pillow_errors(), Image.open(file) as image:
        _check_depth(image)
        width, height = image.size
        # Pillow decodes a PNG to look for a tag behind the pixels, where hardly any program writes it.
        tagged = image.format != "PNG" or "exif" in image.info
        turned = tagged and image.getexif().get(_ORIENTATION, 1) >= 5
        if not _ends_well(file, image.format):
            image.load()
        if verify and image.format == "PNG":
            file.seek(0)
            with Image.open(file) as unread:
                unread.verify()
        return (height, width) if turned else (width, height)


def check_narrow(error: Exception, width: int, height: int, name: str = "an image") -> None:
    """Raise an InputError if ``error`` is of resizing, which leaves no pixel of a side of a narrow image."""
    if isinstance(error, ValueError) and "height and width must be > 0" in str(error):  # Pillow's
        raise InputError(
            f"{name}: its {width} x {height} pixels are so narrow that none is left of a side when it is "
            "resized: leave it out, or cut it into pieces"
        ) from None


def _check_depth(image: Image.Image) -> None:
    if image.mode[0] in "IF":  # I, F, I;16, I;16B, ...
        raise DepthError(f"it has more than 8 bits a channel (mode {image.mode}): convert it to 8 bits")


def _ends_well(file: IO[bytes], image_format: str | None) -> bool:
    end = _ENDS.get(image_format or "")
    if end is None:
        return False
    file.seek(-len(end), os.SEEK_END)
    return file.read() == end


@contextmanager
def pillow_errors() -> Iterator[None]:
    """Pillow raises all kinds of errors; here they are OSErrors that say what is wrong in a few words."""
    try:
        yield
    except DepthError:
        raise
    except FileNotFoundError:
        raise OSError("there is no such file") from None
    except UnidentifiedImageError:
        raise OSError("it is no image, or of a format that Pillow does not know") from None
    except Image.DecompressionBombError:
        limit = 2 * (Image.MAX_IMAGE_PIXELS or 0) / 1e6
        raise OSError(f"it has more than {limit:.0f} million pixels: cut it into tiles") from None
    except Exception as error:
        raise OSError(one_line(error)[:200]) from None
