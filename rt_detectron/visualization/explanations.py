"""Explanations of detections as pictures, one row for each detector."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from rt_detectron.visualization.draw import Instance, draw_instances, panel, stacked

_LONG_SIDE = 480  # of each picture in pixels
_SPREAD = 3.0  # standard deviations of a gradient from grey to full colour


@dataclass(frozen=True, eq=False)
class Explanation:
    """What one detector's row shows.

    Attributes:
        detections: in pixels of the image.
        gradient: (h, w, 3), of the detections' scores, in R, G and B.
        inverted: (h, w, 3), an image made from features, R, G and B in [0, 1].
        feature: the name of these features.
        distance: how far the features of that image are from those of the original, relative to their norm.
    """

    detections: Sequence[Instance]
    gradient: np.ndarray
    inverted: np.ndarray
    feature: str
    distance: float


def explained(image: Image.Image, rows: dict[str, Explanation]) -> Image.Image:
    """For each detector, by caption: detections, input gradient, and the image made from features."""
    panels = []
    for caption, row in rows.items():
        detections = draw_instances(image, row.detections, _LONG_SIDE)
        others = (gradient_picture(row.gradient), _picture(row.inverted))
        pictures = [detections, *(p.resize(detections.size, Image.Resampling.BILINEAR) for p in others)]
        captions = [
            caption,
            "gradient of the scores" if row.gradient.any() else "no gradient: no detections",
            f"from {row.feature} alone, distance {row.distance:.2f}",
        ]
        panels.append(panel(pictures, captions))
    return stacked(panels)


def gradient_picture(gradient: np.ndarray) -> Image.Image:
    """A gradient (h, w, 3) in colours: grey is 0, and brighter is more of R, G and B.

    Values beyond three standard deviations of the picture are clipped, as by Tsipras et al. (2019).
    """
    scale = _SPREAD * gradient.std()
    return _picture(0.5 + 0.5 * gradient / scale if scale > 0 else np.full_like(gradient, 0.5))


def _picture(values: np.ndarray) -> Image.Image:
    """From (h, w, 3) in [0, 1]; what is beyond is clipped."""
    return Image.fromarray((values.clip(0, 1) * 255).round().astype(np.uint8))
