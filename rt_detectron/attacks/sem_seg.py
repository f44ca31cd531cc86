"""What an attack needs of a detector's semantic segmentation: its input, and its losses image by image."""

from collections.abc import Sequence

import torch.nn.functional as F
from detectron2.structures import ImageList
from torch import Tensor, nn

from rt_detectron.utils.errors import InputError


def preprocess(model: nn.Module, inputs: Sequence[dict]) -> ImageList:
    """The detector's own normalised and padded input; a SemanticSegmentor has no method for it."""
    if hasattr(model, "preprocess_image"):
        return model.preprocess_image(inputs)
    images = [(each["image"].to(model.device) - model.pixel_mean) / model.pixel_std for each in inputs]
    constraints = model.backbone.padding_constraints
    return ImageList.from_tensors(images, model.backbone.size_divisibility, padding_constraints=constraints)


def sem_seg_losses(
    model: nn.Module, features: dict[str, Tensor], given: dict, size: Sequence[int]
) -> dict[str, Tensor]:
    """The training losses of the semantic segmentation of one image, by name.

    Args:
        model: with a ``sem_seg_head`` that gives losses.
        features: of that image, (1, C, H, W) each.
        given: the image's input, with its "sem_seg", (H, W), int64.
        size: height and width of what the backbone was given, with its padding.

    Raises:
        InputError: for an input without "sem_seg", or a head unlike Detectron2's own.
    """
    head = model.sem_seg_head
    if "sem_seg" not in given:
        raise InputError("attack: the test set has no semantic segmentation, which the model's loss needs")
    if not all(hasattr(head, name) for name in ("ignore_value", "common_stride", "losses")):
        raise InputError(f"attack: {type(head).__name__} is unlike Detectron2's heads; it is not supported")
    target = given["sem_seg"].to(model.device)
    # The predictions' sides are multiples of their stride, which those of the image need not be.
    height, width = (-(-side // head.common_stride) * head.common_stride for side in size)
    beyond = (0, width - target.shape[1], 0, height - target.shape[0])
    return head(features, F.pad(target, beyond, value=head.ignore_value)[None])[1]
