"""Frozen batch norm at no cost: it is an affine map, which the convolution in front of it absorbs exactly."""

import torch
import torch.nn.functional as F
from detectron2.layers import Conv2d, FrozenBatchNorm2d
from torch import Tensor, nn


class FrozenNormConv2d(Conv2d):
    """Detectron2's convolution, which scales its weights by a frozen norm instead of its output.

    The same function of input and parameters up to float rounding, and the same state dict; two passes over
    the activations fewer forwards, one backwards (Jacob et al. 2018, section 3.2).
    """

    def forward(self, x: Tensor) -> Tensor:
        norm = self.norm
        if not isinstance(norm, FrozenBatchNorm2d):  # replaced since
            return super().forward(x)
        scale = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
        shift = -norm.running_mean if self.bias is None else self.bias - norm.running_mean
        x = F.conv2d(
            x,
            self.weight * scale.view(-1, 1, 1, 1),
            torch.addcmul(norm.bias, shift, scale),
            self.stride,
            self.padding,
            self.dilation,
            self.groups,
        )
        return x if self.activation is None else self.activation(x)


def fold_frozen_norms(model: nn.Module) -> nn.Module:
    """Make the convolutions of ``model`` with a frozen norm :class:`FrozenNormConv2d`, in place."""
    for module in model.modules():
        if type(module) is Conv2d and isinstance(module.norm, FrozenBatchNorm2d):
            module.__class__ = FrozenNormConv2d
    return model
