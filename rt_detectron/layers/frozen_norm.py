"""Frozen batch norm at no cost: the convolution before it absorbs this affine map exactly."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from detectron2.layers import Conv2d, FrozenBatchNorm2d
from detectron2.modeling import Backbone
from torch import Tensor, nn

from rt_detectron.layers.eval_norm import EvalBatchNorm2d
from rt_detectron.layers.folding import absorb_norm, can_be_absorbed, is_plain
from rt_detectron.utils.modes import eval_mode

_FIXED = (FrozenBatchNorm2d, EvalBatchNorm2d)  # norms whose statistics stay


class FrozenNormConv2d(Conv2d):
    """Detectron2's convolution, which scales its weights by a frozen norm instead of its output.

    It is the same function of input and parameters, up to float rounding, and has the same state dict. It
    saves two passes over the activations in the forward pass and one in the backward pass (Jacob et al. 2018,
    section 3.2), for one over the weights in each. Where the weights are more, as in the last stages of a
    network, the output is scaled.
    """

    def forward(self, x: Tensor) -> Tensor:
        norm = self.norm
        if not isinstance(norm, _FIXED):  # replaced since
            return super().forward(x)
        scale, bias = absorb_norm(norm, self.bias)
        geometry = self.stride, self.padding, self.dilation, self.groups
        pixels = x.numel() // x.shape[1] // (self.stride[0] * self.stride[1])
        if pixels < self.weight[0].numel():
            x = F.conv2d(x, self.weight, None, *geometry)
            scale, bias = (each.to(x.dtype).view(-1, 1, 1) for each in (scale, bias))  # as Detectron2's norm
            x = torch.addcmul(bias, x, scale)
        else:
            x = F.conv2d(x, self.weight * scale.view(-1, 1, 1, 1), bias, *geometry)
        return x if self.activation is None else self.activation(x)


def fold_frozen_norms(model: nn.Module) -> nn.Module:
    """Turn the convolutions of ``model`` that have a frozen norm into :class:`FrozenNormConv2d`, in place."""
    for module in model.modules():
        if type(module) is Conv2d and isinstance(module.norm, _FIXED):
            module.__class__ = FrozenNormConv2d
    return model


@contextmanager
def fixed_weights(model: nn.Module) -> Iterator[None]:
    """Within the block, ``model`` is in eval mode and its convolutions have the form that is fastest there.

    For evaluations: the parameters must stay as they are, and those of convolutions take no gradient. A
    convolution of Detectron2's absorbs the norm behind it once, not in each pass. On CPUs the weights of a
    backbone are channels_last, and so become its feature maps, which oneDNN then need not reorder. What it
    gives is contiguous as ever, since heads may count on that: Detectron2's loss of keypoints does.
    """
    fixed = []
    backbones = _outermost(model, Backbone)
    in_backbones = {module for backbone in backbones for module in backbone.modules()}
    hooks = [backbone.register_forward_hook(_contiguous) for backbone in backbones]
    try:
        with eval_mode(model):
            for module in model.modules():
                # Detectron2's convolutions always pad with zeros.
                plain = is_plain(module, (Conv2d, FrozenNormConv2d)) or (
                    is_plain(module, (nn.Conv2d,)) and module.padding_mode == "zeros"
                )
                if plain and "forward" not in vars(module):  # of a block around this one, or of the user's
                    module.forward = partial(_convolve, module, *_fixed(module, module in in_backbones))
                    fixed.append(module)
            yield
    finally:
        for module in fixed:
            del module.forward
        for hook in hooks:
            hook.remove()


def _outermost(model: nn.Module, kind: type) -> list[nn.Module]:
    """The modules of that kind that are in no other one."""
    if isinstance(model, kind):
        return [model]
    return [module for child in model.children() for module in _outermost(child, kind)]


def _contiguous(_module, _args, maps):
    return {name: each.contiguous() for name, each in maps.items()} if isinstance(maps, dict) else maps


@torch.no_grad()
def _fixed(module: nn.Conv2d, in_backbone: bool) -> tuple[Tensor, Tensor | None, bool]:
    """Weight and bias, and whether these have absorbed the norm."""
    weight, bias = module.weight.detach(), module.bias
    absorbs = can_be_absorbed(getattr(module, "norm", None))
    if absorbs:
        scale, bias = absorb_norm(module.norm, bias)
        weight = weight * scale.view(-1, 1, 1, 1)
    if in_backbone and weight.device.type == "cpu":
        weight = weight.contiguous(memory_format=torch.channels_last)
    return weight, bias, absorbs


def _convolve(module: nn.Conv2d, weight: Tensor, bias: Tensor | None, absorbed: bool, x: Tensor) -> Tensor:
    x = F.conv2d(x, weight, bias, module.stride, module.padding, module.dilation, module.groups)
    norm, activation = (getattr(module, name, None) for name in ("norm", "activation"))
    x = x if norm is None or absorbed else norm(x)
    if activation is None:
        return x
    return F.relu(x, inplace=True) if activation is F.relu else activation(x)  # nothing else has ``x``
