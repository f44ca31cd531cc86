"""ROIAlign on CPUs as a weighted sum of rows.

An output pixel of ROIAlign is a weighted sum of a few pixels of the feature map: a row of a sparse matrix
times the matrix of all pixels (rows) and channels. torchvision's kernel instead visits the map pixel by pixel
for each channel, and its gradient is several times slower still. The weights are a product of one factor for
y and one for x, since sampling points form a grid and interpolation is bilinear (He et al. 2017,
https://arxiv.org/abs/1703.06870, section 3).
"""

import torch
import torch.nn.functional as F
from detectron2.layers import ROIAlign
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from rt_detectron.layers.folding import runs_on_cpu


class RowsROIAlign(ROIAlign):
    """Detectron2's ROIAlign, equal up to float rounding; other devices and types go to torchvision's."""

    def forward(self, input: Tensor, rois: Tensor) -> Tensor:
        if not (runs_on_cpu(input) and len(rois) and _are_proper(rois)):
            return super().forward(input, rois)
        counts, pixels, weights = self._sums(input.shape, rois.to(input.dtype))
        rows = input.permute(0, 2, 3, 1).flatten(0, 2)  # (N*H*W, C)
        sums = _WeightedRows.apply(rows, counts, pixels, weights)
        return sums.view(len(rois), *self.output_size, -1).permute(0, 3, 1, 2)

    @torch.no_grad()
    def _sums(self, shape: torch.Size, rois: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What each output pixel is the sum of.

        Returns:
            counts: summands of each output pixel, (R*h*w,), int32.
            pixels: the summands' rows, (sum of counts,), int32.
            weights: and their weights, float.
        """
        (height, width), (_, _, map_height, map_width) = self.output_size, shape
        offset = 0.5 if self.aligned else 0.0
        image = rois[:, 0].int()
        left, top, right, bottom = (rois[:, 1:] * self.spatial_scale - offset).unbind(1)
        first_y, count_y, weight_y = self._line(top, bottom - top, height, map_height)
        first_x, count_x, weight_x = self._line(left, right - left, width, map_width)
        # From here on one dimension for all summands. The i-th of an output pixel is at (i // x's, i % x's).
        counts = (count_y[:, :, None] * count_x[:, None]).flatten()
        output = torch.repeat_interleave(counts)
        i = torch.arange(len(output), dtype=torch.int32) - (counts.cumsum(0).int() - counts)[output]
        in_row = count_x[:, None].expand(-1, height, -1).flatten()[output]
        y, x = i.div(in_row, rounding_mode="floor"), i % in_row
        first = ((image * map_height)[:, None] + first_y)[:, :, None] * map_width + first_x[:, None]
        pixels = first.flatten()[output] + y * map_width + x
        roi_and_y = output // width
        roi_and_x = output // (height * width) * width + output % width
        weights = weight_y.flatten(0, 1)[roi_and_y, y] * weight_x.flatten(0, 1)[roi_and_x, x]
        return counts, pixels, weights

    def _line(self, start: Tensor, length: Tensor, bins: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
        """The weights in one dimension, as torchvision's kernel has them.

        Args:
            start, length: of the regions, (R,), in pixels of the map.
            bins: output pixels of a region.
            size: of the map.

        Returns:
            First pixel and number of pixels of each bin, (R, bins), int32, and their weights, (R, bins, max).
        """
        if not self.aligned:
            length = length.clamp(min=1)
        width = (length / bins)[:, None, None]
        samples = width.ceil() if self.sampling_ratio <= 0 else torch.full_like(width, self.sampling_ratio)
        each = torch.arange(max(int(samples.max()), 1))
        counts = each < samples
        samples = samples.clamp(min=1)
        place = start[:, None, None] + torch.arange(bins)[:, None] * width + (each + 0.5) * width / samples
        share = (counts & (place >= -1) & (place <= size)) / samples
        place = place.clamp(0, size - 1)
        low = place.floor()
        to_high = share * (place - low)
        first = low[:, :, :1]
        low = (low - first).long()
        high = low + (to_high > 0)
        pixels = torch.where(share > 0, high, 0).amax(2) + 1
        weights = torch.zeros(*pixels.shape, int(high.max()) + 1)
        weights.scatter_add_(2, low, share - to_high).scatter_add_(2, high, to_high)
        return first[:, :, 0].int(), pixels.int(), weights


def _are_proper(rois: Tensor) -> bool:
    return bool(rois.isfinite().all() and (rois[:, 3:] >= rois[:, 1:3]).all())


class _WeightedRows(torch.autograd.Function):
    """``sums[o] = sum of weights[i] * rows[pixels[i]]`` over the ``counts[o]`` next i; grad of rows only."""

    @staticmethod
    def forward(ctx, rows, counts, pixels, weights):
        ctx.save_for_backward(counts, pixels, weights)
        ctx.number = len(rows)
        return _weighted_sums(rows, counts, pixels, weights)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        counts, pixels, weights = ctx.saved_tensors
        order = pixels.argsort(stable=True)
        outputs = torch.repeat_interleave(counts).int()[order]
        uses = pixels.bincount(minlength=ctx.number).int()
        return _weighted_sums(grad, uses, outputs, weights[order]), None, None, None


def _weighted_sums(rows: Tensor, counts: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    offsets = counts.cumsum(0).int() - counts
    return F.embedding_bag(indices, rows.contiguous(), offsets, mode="sum", per_sample_weights=weights)


def use_rows_roi_align(model: nn.Module) -> nn.Module:
    """Turn every :class:`ROIAlign` of ``model`` into a :class:`RowsROIAlign`, in place."""
    for module in model.modules():
        if type(module) is ROIAlign:
            module.__class__ = RowsROIAlign
    return model
