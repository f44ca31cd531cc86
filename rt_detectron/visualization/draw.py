"""Draw boxes, masks and segments on an image, and images side by side."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from rt_detectron.visualization.colors import color_of, readable_on

_MASK_OPACITY = 0.45
_FONT_SIZE = 18
_CAPTION_HEIGHT = 32
_CAPTION_COLORS = ((38, 42, 48), (255, 255, 255))  # background and text, for light and dark pages
_GAP = 6


@dataclass(frozen=True, eq=False)
class Instance:
    """One object in an image.

    Attributes:
        box: x, y, width, height in pixels of the image, as COCO has it.
        label: text at the box.
        color_index: the category's, see :func:`colors.color_of`.
        mask: H x W bool, of the image's size, or None.
    """

    box: tuple[float, float, float, float]
    label: str
    color_index: int
    mask: np.ndarray | None = None


def draw_instances(image: Image.Image, instances: Sequence[Instance], long_side: int = 480) -> Image.Image:
    """A copy of ``image``, its longer side scaled to ``long_side`` pixels, with the instances drawn on it.

    The image is scaled first, so that lines and text have the same size on all images.
    """
    scale = long_side / max(image.size)
    width, height = (max(1, round(side * scale)) for side in image.size)
    size = width, height
    picture = image.convert("RGB").resize(size, Image.Resampling.LANCZOS)
    ordered = sorted(instances, key=lambda instance: -instance.box[2] * instance.box[3])  # small ones on top
    for instance in ordered:
        if instance.mask is not None:
            _paint_mask(picture, instance.mask, instance.color_index)
    draw = ImageDraw.Draw(picture)
    for instance in ordered:
        _draw_box(draw, instance, scale)
    taken: list[tuple[float, float, float, float]] = []
    for instance in ordered:
        taken.append(_draw_label(draw, instance, scale, size, taken))
    return picture


def draw_segments(image: Image.Image, labels: np.ndarray, long_side: int = 480) -> Image.Image:
    """A copy of ``image``, scaled as by :func:`draw_instances`, with each class of its pixels in a colour.

    Args:
        labels: (H, W) the class of each pixel; class 0 is left as it is.
    """
    picture = draw_instances(image, [], long_side)
    for number in np.unique(labels[labels > 0]).tolist():
        _paint_mask(picture, labels == number, number)
    return picture


def panel(pictures: Sequence[Image.Image], captions: Sequence[str]) -> Image.Image:
    """The pictures in a row, in their own sizes, each under its caption."""
    width = sum(picture.width for picture in pictures) + _GAP * (len(pictures) - 1)
    height = max(picture.height for picture in pictures) + _CAPTION_HEIGHT
    background, text = _CAPTION_COLORS
    row = Image.new("RGB", (width, height), background)
    draw = ImageDraw.Draw(row)
    left = 0
    for picture, caption in zip(pictures, captions, strict=True):
        fitted = _fit(draw, caption, picture.width - 12)
        draw.text((left + 6, _CAPTION_HEIGHT // 2), fitted, font=_font(), fill=text, anchor="lm")
        row.paste(picture, (left, _CAPTION_HEIGHT))
        left += picture.width + _GAP
    return row


def stacked(rows: Sequence[Image.Image]) -> Image.Image:
    """The pictures below each other, in their own sizes, at the left."""
    height = sum(row.height for row in rows) + _GAP * (len(rows) - 1)
    column = Image.new("RGB", (max(row.width for row in rows), height), _CAPTION_COLORS[0])
    top = 0
    for row in rows:
        column.paste(row, (0, top))
        top += row.height + _GAP
    return column


def _paint_mask(picture: Image.Image, mask: np.ndarray, color_index: int) -> None:
    alpha = Image.fromarray(mask.astype(np.uint8) * round(255 * _MASK_OPACITY))
    picture.paste(color_of(color_index), mask=alpha.resize(picture.size, Image.Resampling.BILINEAR))


def _draw_box(draw: ImageDraw.ImageDraw, instance: Instance, scale: float) -> None:
    x, y, width, height = (value * scale for value in instance.box)
    corners = (x, y, x + max(width, 1), y + max(height, 1))
    # The dark border keeps light colours visible on a light background.
    draw.rectangle(tuple(np.add(corners, (-1, -1, 1, 1))), outline=(0, 0, 0), width=4)
    draw.rectangle(corners, outline=color_of(instance.color_index), width=2)


def _draw_label(
    draw: ImageDraw.ImageDraw,
    instance: Instance,
    scale: float,
    size: tuple[int, int],
    taken: Sequence[tuple[float, float, float, float]],
) -> tuple[float, float, float, float]:
    """Above the box, inside it at the top or the bottom, or below it: the first place without a label."""
    x, y, _, box_height = instance.box
    text = _fit(draw, instance.label, size[0] - 8)
    width, height = draw.textlength(text, font=_font()) + 6, _FONT_SIZE + 4
    left, top, bottom = (value * scale for value in (x, y, y + box_height))
    x = min(max(left - 1, 0), size[0] - width)  # inside the image, as y is
    places = [min(max(y, 0), size[1] - height) for y in (top - height, top, bottom - height, bottom)]
    labels = [(x, y, x + width, y + height) for y in places]
    label = next((free for free in labels if not any(_overlap(free, other) for other in taken)), labels[0])
    color = color_of(instance.color_index)
    draw.rectangle(label, fill=color)
    middle = (label[1] + label[3]) / 2
    draw.text((x + 3, middle), text, font=_font(), fill=readable_on(color), anchor="lm")
    return label


def _overlap(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _fit(draw: ImageDraw.ImageDraw, text: str, width: float) -> str:
    """``text``, shortened with an ellipsis if it is wider than ``width`` pixels."""
    if draw.textlength(text, font=_font()) <= width:
        return text
    while text and draw.textlength(text + "…", font=_font()) > width:
        text = text[:-1]
    return text + "…"


def _font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(_FONT_SIZE)  # comes with Pillow: the same on every machine
