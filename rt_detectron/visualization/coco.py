"""COCO annotations and results as instances to draw."""

import contextlib
import io
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from PIL import Image
from pycocotools import mask as rle_masks
from pycocotools.coco import COCO

from rt_detectron.visualization.draw import Instance
from rt_detectron.visualization.media import load_picture


def load_coco(json_file: str | Path) -> COCO:
    """pycocotools' index of an annotation file, without its messages on stdout."""
    with contextlib.redirect_stdout(io.StringIO()):
        return COCO(str(json_file))


def load_detections(json_file: str | Path) -> list[dict[str, Any]]:
    """All detections of a file in COCO's results format."""
    return json.loads(Path(json_file).read_text(encoding="utf-8"))


def load_predictions(json_file: str | Path, image_ids: Iterable[int]) -> dict[int, list[dict[str, Any]]]:
    """The detections (COCO results format) of the given images, by image."""
    chosen: dict[int, list[dict[str, Any]]] = {image_id: [] for image_id in image_ids}
    for detection in load_detections(json_file):
        if detection["image_id"] in chosen:
            chosen[detection["image_id"]].append(detection)
    return chosen


def load_image(coco: COCO, image_root: str | Path, image_id: int) -> Image.Image:
    """The image in RGB, turned upright by its EXIF tag, as in Detectron2."""
    return load_picture(Path(image_root) / coco.imgs[image_id]["file_name"])


def ground_truth_instances(coco: COCO, image_id: int) -> list[Instance]:
    """The annotated objects of an image, without crowd regions, which AP ignores."""
    return [
        Instance(
            box=tuple(annotation["bbox"]),
            label=_category_name(coco, annotation["category_id"]),
            color_index=_category_index(coco, annotation["category_id"]),
            mask=coco.annToMask(annotation).astype(bool) if annotation.get("segmentation") else None,
        )
        for annotation in coco.imgToAnns[image_id]
        if not annotation.get("iscrowd")
    ]


def predicted_instances(coco: COCO, detections: Iterable[dict[str, Any]], threshold: float) -> list[Instance]:
    """The detections of one image with a score of at least ``threshold``."""
    return [
        Instance(
            box=tuple(detection["bbox"]),
            label=f"{_category_name(coco, detection['category_id'])} {detection['score']:.0%}",
            color_index=_category_index(coco, detection["category_id"]),
            mask=rle_masks.decode(detection["segmentation"]).astype(bool)
            if "segmentation" in detection
            else None,
        )
        for detection in detections
        if detection["score"] >= threshold
    ]


def _category_name(coco: COCO, category_id: int) -> str:
    return str(coco.cats[category_id]["name"])


def _category_index(coco: COCO, category_id: int) -> int:
    return sorted(coco.cats).index(category_id)
