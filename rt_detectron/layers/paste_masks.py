"""Pasting of Mask R-CNN's masks on CPUs as two products of small matrices.

Each output pixel is bilinearly interpolated, with weights that are a product of one for its row and one
for its column: so a mask M becomes ``rows @ M @ columns.T``. Detectron2 has ``grid_sample`` look up four
pixels of M for each pixel of the image instead.
"""

import math

import torch
from detectron2.modeling import GeneralizedRCNN
from detectron2.structures import BitMasks, Boxes, ROIMasks
from torch import Tensor, nn


class ProductROIMasks(ROIMasks):
    """Detectron2's ROIMasks; pasted, what is compared with the threshold is equal up to float rounding."""

    def __getitem__(self, item) -> "ProductROIMasks":
        return type(self)(super().__getitem__(item).tensor)

    def to_bitmasks(self, boxes: Boxes, height: int, width: int, threshold: float = 0.5) -> BitMasks:
        """As Detectron2's. In memory, the masks lie column by column, as COCO's run lengths count them."""
        if threshold < 0 or torch.jit.is_tracing():  # other types
            return super().to_bitmasks(boxes, height, width, threshold)
        size = self.tensor.shape[-1]
        pasted = torch.zeros(len(self), width, height, dtype=torch.bool)
        for whole, mask, (left, top, right, bottom) in zip(
            pasted, self.tensor.transpose(1, 2).float(), boxes.tensor.tolist(), strict=True
        ):
            x, columns = _weights(left, right, size, width)
            y, rows = _weights(top, bottom, size, height)
            whole[x, y] = columns @ mask @ rows.T >= threshold
        return BitMasks(pasted.transpose(1, 2))


def _weights(start: float, end: float, size: int, limit: int) -> tuple[slice, Tensor]:
    """The pixels of the image that a side of a box touches, and for each the weights of a mask's pixels.

    They are those of ``grid_sample`` with the mask in the middle of zeros.

    Args:
        start, end: of the box, in pixels.
        size: pixels of the mask.
        limit: pixels of the image.
    """
    first, last = (min(max(place, 0), limit) for place in (math.floor(start) - 1, math.ceil(end) + 1))
    place = (torch.arange(first, last) + 0.5 - start) * (size / (end - start)) - 0.5
    return slice(first, last), (1 - (place[:, None] - torch.arange(size)).abs()).clamp_(min=0)


class PastingRCNN(GeneralizedRCNN):
    """Detectron2's GeneralizedRCNN with :class:`ProductROIMasks`."""

    def inference(self, batched_inputs, detected_instances=None, do_postprocess=True):
        results = super().inference(batched_inputs, detected_instances, do_postprocess=False)
        if not do_postprocess:
            return results
        for found in results:
            if found.has("pred_masks") and found.pred_masks.device.type == "cpu":
                found.pred_masks = ProductROIMasks(found.pred_masks[:, 0])
        sizes = [found.image_size for found in results]
        return GeneralizedRCNN._postprocess(results, batched_inputs, sizes)


def use_product_paste(model: nn.Module) -> nn.Module:
    """Turn a Mask R-CNN into a :class:`PastingRCNN`, in place."""
    if type(model) is GeneralizedRCNN and getattr(model.roi_heads, "mask_on", False):
        model.__class__ = PastingRCNN
    return model
