"""A detector's output as instances to draw, and several detectors' pictures side by side."""

from collections.abc import Sequence

from PIL import Image

from rt_detectron.visualization.draw import Instance, draw_instances, panel

_LONG_SIDES = (960, 1280)  # limits of a picture's longer side in pixels: readable labels, small files


def detected_instances(instances, class_names: Sequence[str], threshold: float) -> list[Instance]:
    """The detections with a score of at least ``threshold``.

    Args:
        instances: Detectron2's Instances of one image with pred_boxes, scores, pred_classes and, optionally,
            pred_masks; in the image's own pixels.
        class_names: by class index. A class without a name is written as its number.
    """
    instances = instances.to("cpu")
    instances = instances[instances.scores >= threshold]
    masks = instances.pred_masks.numpy() if instances.has("pred_masks") else [None] * len(instances)
    return [
        Instance(
            box=(x1, y1, x2 - x1, y2 - y1),
            label=f"{class_names[index] if index < len(class_names) else f'class {index}'} {score:.0%}",
            color_index=index,
            mask=mask,
        )
        for (x1, y1, x2, y2), score, index, mask in zip(
            instances.pred_boxes.tensor.tolist(),
            instances.scores.tolist(),
            instances.pred_classes.tolist(),
            masks,
            strict=True,
        )
    ]


def side_by_side(
    image: Image.Image, detections: Sequence[Sequence[Instance]], captions: Sequence[str]
) -> Image.Image:
    """``image`` with each detector's detections, under its caption; a single picture has no caption."""
    shortest, longest = _LONG_SIDES
    long_side = min(max(*image.size, shortest), longest)
    pictures = [draw_instances(image, found, long_side) for found in detections]
    return pictures[0] if len(pictures) == 1 else panel(pictures, captions)
