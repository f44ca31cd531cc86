"""Pictures of a detector's input and detections, before and after a change."""

import os
import re
from collections.abc import Callable, Sequence

import numpy as np
import torch
from detectron2.data.detection_utils import convert_image_to_rgb
from PIL import Image
from torch import Tensor, nn

from rt_detectron.visualization.detections import detected_instances
from rt_detectron.visualization.draw import draw_instances, draw_segments, panel

SCORE_THRESHOLD = 0.5  # detections below it are not drawn
_JPEG_QUALITY = 85


class BeforeAfter:
    """Saves pictures of some images of a test set: the original beside the changed one.

    Args:
        model: the detector that is evaluated.
        originals: the dataset dicts of the images to draw.
        mapper: from such a dict to the unchanged input.
        image_format: of the detector's input, "RGB" or "BGR".
        class_names: of things, by class index; not needed for semantic segmentation alone.
        folder: of the pictures, ``imageID.jpg``.
        change: what happened to the images, such as "L2 eps 0.5".
        perturbation: whether to also show the difference, amplified.
    """

    def __init__(
        self,
        model: nn.Module,
        originals: Sequence[dict],
        mapper: Callable[[dict], dict],
        image_format: str,
        class_names: Sequence[str],
        folder: str,
        change: str,
        perturbation: bool = False,
    ):
        self.model = model
        self.originals = {original["image_id"]: original for original in originals}
        self.mapper = mapper
        self.image_format = image_format
        self.class_names = class_names
        self.folder = folder
        self.change = change
        self.perturbation = perturbation
        self.saved: list[dict[str, str]] = []  # {"file": path, "caption": text}

    def __call__(self, inputs: list[dict], outputs: list[dict]) -> None:
        for given, output in zip(inputs, outputs, strict=True):
            if given["image_id"] in self.originals:
                self._save(given, output)

    def _save(self, given: dict, found: dict) -> None:
        original = self.mapper(self.originals[given["image_id"]])
        height, width = original["image"].shape[1:]
        given = {**given, "image": given["image"][:, :height, :width]}  # without an attack's padding
        with torch.no_grad():
            found_before = self.model([original])[0]
        views, captions = [], []
        for title, image, output in (
            ("original", original, found_before),
            (self.change, given, found),
        ):
            view, count = self._drawn(self._picture(image["image"], image), output)
            views.append(view)
            captions.append(f"{title}: {count}")
        if self.perturbation:
            difference = given["image"].cpu() - original["image"].cpu()
            factor = 127 / max(float(difference.abs().max()), 1e-3)
            views.append(draw_instances(self._picture(128 + factor * difference, given), []))
            captions.append(f"perturbation x {factor:.0f}")
        image_id = re.sub(r"[^A-Za-z0-9_.-]", "_", str(given["image_id"]))
        path = os.path.join(self.folder, f"image{image_id}.jpg")
        panel(views, captions).save(path, quality=_JPEG_QUALITY)
        caption = f"image {given['image_id']}; "
        if "instances" in found:
            caption += f"detections of score {SCORE_THRESHOLD:g} and more; "
        self.saved.append({"file": path, "caption": caption + "; ".join(captions)})

    def _drawn(self, picture: Image.Image, output: dict) -> tuple[Image.Image, str]:
        """The picture with a detector's output on it, and how much that is."""
        if "instances" in output:
            shown = detected_instances(output["instances"], self.class_names, SCORE_THRESHOLD)
            return draw_instances(picture, shown), f"{len(shown)} detection{'s' * (len(shown) != 1)}"
        labels = output["sem_seg"].argmax(0).cpu().numpy()
        classes = len(np.unique(labels))
        return draw_segments(picture, labels), f"{classes} class{'es' * (classes != 1)}"

    def _picture(self, image: Tensor, source: dict) -> Image.Image:
        """From (C, H, W) in 0..255 in the detector's channel order, at the size that its output refers to."""
        pixels = convert_image_to_rgb(image.detach().cpu().permute(1, 2, 0), self.image_format)
        picture = Image.fromarray(np.asarray(pixels).round().clip(0, 255).astype(np.uint8))
        return picture.resize((source["width"], source["height"]), Image.Resampling.BILINEAR)
