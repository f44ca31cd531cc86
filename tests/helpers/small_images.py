"""Small images in the formats that data sets hold."""

import io

import numpy as np
from PIL import Image
from torchvision.transforms import v2 as T

as_is = T.Identity()


def encoded(image: Image.Image, format: str, **kwargs) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **kwargs)
    return buffer.getvalue()


def jpeg(value: int) -> bytes:
    """A grey 8x8 JPEG; its grey value tells the images apart."""
    return encoded(Image.fromarray(np.full((8, 8, 3), value, np.uint8)), "JPEG", quality=100)
