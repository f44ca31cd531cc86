"""Convolutions on small feature maps, as in the last stages of a network on small images.

There a direct convolution mostly multiplies padding, and oneDNN reaches a fraction of the speed of a matrix
product. So the convolution is computed as a bilinear function of few pixels and few taps:

    y = outputs @ ((taps @ weight) * (pixels @ x))

where each of the products ``*`` is a matrix product over all images and channels. The algorithms of Winograd
(1980; for convolutional networks Lavin & Gray 2016) need the fewest products.
"""

import functools
import itertools
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

# Of a map, in pixels. A larger one is faster directly, and bfloat16 is too coarse for Winograd's sums.
MAX_SIDE = {torch.float32: 4, torch.float64: 4, torch.bfloat16: 2}


@dataclass(frozen=True)
class SmallMap:
    """A convolution of a map of a certain size as a bilinear algorithm.

    Attributes:
        pixels: (products, pixels of the input).
        taps: (products, taps of the kernel).
        outputs: (pixels of the output, products).
        size: height and width of the output.
    """

    pixels: Tensor
    taps: Tensor
    outputs: Tensor
    size: tuple[int, ...]

    def transform(self, weight: Tensor) -> Tensor:
        """(O, C, *kernel) to (products, O, C)."""
        if len(self.taps) == 1:  # the map has one pixel, which meets one tap
            return weight.flatten(2).select(2, int(self.taps.argmax()))[None]
        return _each(self.taps, weight.permute(0, 2, 3, 1).flatten(1, 2)).transpose(0, 1)

    def prepare(self, weight: Tensor) -> Tensor:
        """The same, laid out for many uses."""
        return self.transform(weight).contiguous()

    def convolve(self, x: Tensor, transformed: Tensor) -> Tensor:
        """(N, C, height, width) and a transformed weight to (N, O, *size), channels_last."""
        products = torch.bmm(self._pixels_of(x).transpose(0, 1), transformed.transpose(1, 2))
        y = _each(self.outputs, products.transpose(0, 1))
        return y.unflatten(1, self.size).permute(0, 3, 1, 2)

    def gradient_of_products(self, grad: Tensor) -> Tensor:
        """(products, N, O) of a loss, from its gradient with respect to the output."""
        return _each(self.outputs.T, grad.permute(0, 2, 3, 1).flatten(1, 2)).transpose(0, 1)

    def gradient_of_x(self, grad: Tensor, weight: Tensor, size: torch.Size) -> Tensor:
        """From that of the products; ``size`` is height and width."""
        products = torch.bmm(grad, self.transform(weight))
        return _each(self.pixels.T, products.transpose(0, 1)).unflatten(1, size).permute(0, 3, 1, 2)

    def gradient_of_weight(self, grad: Tensor, x: Tensor, kernel: torch.Size) -> Tensor:
        """The same with respect to the weight."""
        products = torch.bmm(grad.transpose(1, 2), self._pixels_of(x).transpose(0, 1)).transpose(0, 1)
        if len(self.taps) == 1:
            of_taps = products.new_zeros(len(products), self.taps.shape[1], products.shape[2])
            of_taps[:, int(self.taps.argmax())] = products[:, 0]
        else:
            of_taps = _each(self.taps.T, products)
        return of_taps.unflatten(1, kernel).permute(0, 3, 1, 2)

    def _pixels_of(self, x: Tensor) -> Tensor:
        return _each(self.pixels, x.permute(0, 2, 3, 1).flatten(1, 2))


def _each(matrix: Tensor, batch: Tensor) -> Tensor:
    """``matrix @ each`` of the batch; unlike matmul it copies nothing."""
    return torch.bmm(matrix.expand(len(batch), -1, -1), batch)


def small_map(x: Tensor, convolution: nn.Conv2d) -> SmallMap | None:
    """The :class:`SmallMap` for the convolution of ``x``; None where direct convolution is faster."""
    if (
        x.device.type != "cpu"
        or x.dim() != 4
        or max(x.shape[2:]) > MAX_SIDE.get(x.dtype, 0)
        or max(convolution.kernel_size) == 1
        or convolution.groups != 1
        or convolution.padding_mode != "zeros"
        or isinstance(convolution.padding, str)
    ):
        return None
    geometry = convolution.kernel_size, convolution.stride, convolution.padding, convolution.dilation
    return _build(tuple(x.shape[2:]), *geometry, x.dtype)


def output_size(size, kernel, stride, padding, dilation) -> tuple[int, ...]:
    """Height and width of what a convolution makes of a map of that size."""
    axes = zip(size, kernel, stride, padding, dilation, strict=True)
    return tuple((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in axes)


@functools.cache
@torch.inference_mode(False)  # the cached matrices may be used in training next
def _build(size, kernel, stride, padding, dilation, dtype: torch.dtype) -> SmallMap | None:
    geometry = size, kernel, stride, padding, dilation
    out = output_size(*geometry)
    if min(out) < 1:  # torch raises an error
        return None
    vertical, horizontal = (_line(*each) for each in zip(out, *geometry, strict=True))
    pixels, taps, outputs = (
        torch.from_numpy(np.kron(*matrices)).to(dtype) for matrices in zip(vertical, horizontal, strict=True)
    )
    return SmallMap(pixels, taps, outputs, out)


def _line(out: int, size: int, kernel: int, stride: int, padding: int, dilation: int):
    """The three matrices in one dimension."""
    if (kernel, stride, padding, dilation) == (3, 1, 1, 1):
        if size == 2:  # a Toeplitz matrix of 2x2: Karatsuba's three products
            pixels = [[1, 1], [0, 1], [1, 0]]
            taps = [[0, 1, 0], [0, -1, 1], [1, -1, 0]]
            return np.array(pixels, float), np.array(taps, float), np.array([[1.0, 1, 0], [1, 0, 1]])
        if size > 2:
            pixels, taps, outputs = _toom_cook(out, kernel)
            return pixels[:, padding:-padding], taps, outputs
    pairs = itertools.product(range(out), range(kernel))
    places = [(o, t, o * stride - padding + t * dilation) for o, t in pairs]
    o, t, i = np.array([place for place in places if 0 <= place[2] < size], int).reshape(-1, 3).T
    return np.eye(size)[i], np.eye(kernel)[t], np.eye(out)[:, o]


def _toom_cook(outputs: int, taps: int):
    """A filter of ``taps`` at ``outputs`` places (Lavin & Gray 2016, section 4.1).

    By evaluation at 0, 1, -1, 2, -2 and infinity.
    """
    points = np.array([0.0, 1, -1, 2, -2][: outputs + taps - 2])

    def evaluate(coefficients: int) -> np.ndarray:
        return np.vstack([np.vander(points, coefficients, increasing=True), np.eye(coefficients)[-1]])

    return np.linalg.inv(evaluate(outputs + taps - 1)).T, evaluate(taps), evaluate(outputs).T


class _Convolution(torch.autograd.Function):
    """Keeps the untransformed tensors for the backward pass, as a convolution does: they need less memory."""

    @staticmethod
    def forward(ctx, x, weight, small):
        ctx.save_for_backward(x, weight)
        ctx.small = small
        return small.convolve(x, small.transform(weight))

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, _ = ctx.needs_input_grad
        grad = ctx.small.gradient_of_products(grad)
        return (
            ctx.small.gradient_of_x(grad, weight, x.shape[2:]) if needs_x else None,
            ctx.small.gradient_of_weight(grad, x, weight.shape[2:]) if needs_weight else None,
            None,
        )


class SmallMapConv2d(nn.Conv2d):
    """A convolution that uses :class:`SmallMap` on small maps.

    Under autocast on maps of one pixel only, where it is exact. It is needed there: the gradient that oneDNN
    (of torch 2.14) gives the weights of a 3x3 convolution of stride 2 in bfloat16 is whatever was in memory.
    """

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight
        if torch.is_autocast_enabled("cpu") and x.device.type == "cpu":
            if max(x.shape[2:]) > 1 or x.dtype not in (torch.float32, torch.bfloat16):
                return super().forward(x)
            x, weight = (each.to(torch.get_autocast_dtype("cpu")) for each in (x, weight))
        small = small_map(x, self)
        if small is None:
            return super().forward(x)
        y = _Convolution.apply(x, weight, small)
        return y if self.bias is None else y + self.bias.to(y.dtype).view(-1, 1, 1)


def use_small_maps(network: nn.Module, device: str | torch.device) -> None:
    """Turn every plain convolution of ``network`` into a :class:`SmallMapConv2d`, in place.

    Only for training on CPUs: on another device nothing changes. State dicts stay the same. Tools that only
    know torch's own modules (torch.jit, leaf modules of torch.fx) do not recognise the new ones.

    Args:
        network: what is to be trained.
        device: where.
    """
    if torch.device(device).type != "cpu":
        return
    for module in network.modules():
        if type(module) is nn.Conv2d:
            module.__class__ = SmallMapConv2d
