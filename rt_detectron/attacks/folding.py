"""A classifier as the inner attack sees it, computed with fewer passes over memory.

An attack differentiates a network in eval mode with respect to its input alone. There batch norm is an affine
map, which a convolution in front of it absorbs exactly (Jacob et al. 2018, section 3.2), so that a
convolution, its norm, a residual sum and the ReLU behind them are one operation forwards and one backwards.
"""

import copy
import itertools
import operator

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm

from .pgd import eval_mode


class FoldedConvolution(nn.Module):
    """``relu(norm(convolution(x)) + residual)``, where norm, residual and ReLU may be missing.

    Its weights are a copy, which :meth:`refresh` takes anew from the modules that it stands for. Two shapes
    that CPUs are slow at are computed as others that they are fast at:

    - few channels and stride 2, as the first convolution has them: as stride 1 on blocks of 2x2 pixels;
    - a map of few pixels, most of whose neighbours are padding: as the matrix that it is.
    """

    FEW_CHANNELS = 4
    FEW_PIXELS = 4

    def __init__(self, convolution: nn.Conv2d, norm: nn.BatchNorm2d | None, relu: bool):
        super().__init__()
        self.source = (convolution, norm)  # a tuple, so that they are no submodules
        self.relu = relu
        self.geometry = (
            convolution.padding,
            convolution.stride,
            convolution.dilation,
            convolution.groups,
        )
        self.register_buffer("weight", torch.empty_like(convolution.weight), persistent=False)
        self.register_buffer("bias", convolution.weight.new_zeros(len(convolution.weight)), persistent=False)
        kernel, padding = convolution.kernel_size, convolution.padding
        self.in_blocks = (
            convolution.in_channels <= self.FEW_CHANNELS
            and convolution.stride == (2, 2)
            and convolution.dilation == (1, 1)
            and kernel in ((3, 3), (7, 7))
            and padding == (kernel[0] // 2, kernel[1] // 2)
        )
        self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """Follow the parameters and statistics that an optimiser step has changed."""
        self._of_blocks = self._matrix = None
        convolution, norm = self.source
        if norm is None:
            self.weight.copy_(convolution.weight)
            if convolution.bias is not None:
                self.bias.copy_(convolution.bias)
            return
        scale = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
        torch.mul(convolution.weight, scale.view(-1, 1, 1, 1), out=self.weight)
        shift = -norm.running_mean if convolution.bias is None else convolution.bias - norm.running_mean
        torch.addcmul(norm.bias, shift, scale, out=self.bias)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        if not _has_fused_kernels(x):
            padding, stride, dilation, groups = self.geometry
            x = F.conv2d(x, self.weight, self.bias, stride, padding, dilation, groups)
        elif self.in_blocks and x.shape[2] % 2 == x.shape[3] % 2 == 0:
            return self._convolve_blocks(x, residual)
        elif self._is_small(x):
            x = self._multiply(x)
        else:
            return _FusedConvolution.apply(x, residual, self.weight, self.bias, self.geometry, self.relu)
        if residual is not None:
            x = x + residual
        return F.relu(x) if self.relu else x

    def _is_small(self, x: Tensor) -> bool:
        groups = self.geometry[-1]
        return x.shape[2] * x.shape[3] <= self.FEW_PIXELS and self.weight.shape[2:] != (1, 1) and groups == 1

    def _convolve_blocks(self, x: Tensor, residual: Tensor | None) -> Tensor:
        if self._of_blocks is None:
            # Pixel 2*o + k - p of the kernel's k-th tap (p odd) is in block o + (k + 1)//2 - (p + 1)//2.
            channels, taps = self.weight.shape[1], (self.weight.shape[2] + 1) // 2
            weight = F.pad(self.weight, (1, 0, 1, 0)).view(-1, channels, taps, 2, taps, 2)
            weight = weight.permute(0, 1, 3, 5, 2, 4).reshape(-1, 4 * channels, taps, taps)
            self._of_blocks = weight.contiguous(memory_format=torch.channels_last)
        taps = self._of_blocks.shape[2]
        before, after = taps // 2, taps - 1 - taps // 2
        x = F.pad(F.pixel_unshuffle(x, 2), (before, after, before, after))
        geometry = ((0, 0), (1, 1), (1, 1), 1)
        return _FusedConvolution.apply(x, residual, self._of_blocks, self.bias, geometry, self.relu)

    def _multiply(self, x: Tensor) -> Tensor:
        if self._matrix is None or self._matrix.shape[3:5] != x.shape[2:]:
            self._matrix = self._build_matrix(*x.shape[2:])
        out_height, out_width, channels = self._matrix.shape[:3]
        x = x.permute(0, 2, 3, 1).reshape(len(x), -1)  # no copy in channels_last
        x = F.linear(x, self._matrix.view(-1, x.shape[1])).view(-1, out_height, out_width, channels)
        return (x + self.bias).permute(0, 3, 1, 2)

    def _build_matrix(self, height: int, width: int) -> Tensor:
        """(output height, output width, output channels, height, width, input channels)."""
        padding, stride, dilation, _ = self.geometry
        channels, in_channels, *kernel = self.weight.shape
        out_height, out_width = (
            (size + 2 * p - d * (k - 1) - 1) // s + 1
            for size, p, s, d, k in zip((height, width), padding, stride, dilation, kernel, strict=True)
        )
        matrix = self.weight.new_zeros(out_height, out_width, channels, height, width, in_channels)
        places = itertools.product(range(out_height), range(out_width), range(kernel[0]), range(kernel[1]))
        for oy, ox, ky, kx in places:
            y = oy * stride[0] - padding[0] + ky * dilation[0]
            x = ox * stride[1] - padding[1] + kx * dilation[1]
            if 0 <= y < height and 0 <= x < width:
                matrix[oy, ox, :, y, x] = self.weight[:, :, ky, kx]
        return matrix


def _has_fused_kernels(x: Tensor) -> bool:
    """oneDNN's, for float32 on CPUs; torch has them for its own compiler."""
    return (
        x.device.type == "cpu"
        and x.dtype == torch.float32
        and hasattr(torch.ops.mkldnn, "_convolution_pointwise")
        and not torch.is_autocast_enabled("cpu")
    )


class _FusedConvolution(torch.autograd.Function):
    """One kernel forwards; backwards the gradients of ``x`` and ``residual`` only."""

    @staticmethod
    def forward(ctx, x, residual, weight, bias, geometry, relu):
        activation = "relu" if relu else "none"
        convolve = torch.ops.mkldnn._convolution_pointwise
        if residual is None:
            output = convolve(x, weight, bias, *geometry, activation, [], "")
        else:
            activation = activation if relu else None
            output = convolve.binary(x, residual, weight, bias, *geometry, "add", 1.0, activation, [], "")
        # For the ReLU's derivative the output serves as well as its input, and is kept anyway.
        ctx.save_for_backward(x, weight, output if relu else None)
        ctx.geometry = geometry
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight, output = ctx.saved_tensors
        if output is not None:
            grad = torch.ops.aten.threshold_backward(grad, output, 0)
        padding, stride, dilation, groups = ctx.geometry
        (grad_x, _, _) = torch.ops.aten.convolution_backward(
            grad, x, weight, None, stride, padding, dilation, False, [0, 0], groups, [True, False, False]
        )
        return grad_x, grad if ctx.needs_input_grad[1] else None, None, None, None, None


class _Tracer(fx.Tracer):
    def is_leaf_module(self, module: nn.Module, qualified_name: str) -> bool:
        return isinstance(module, (nn.Conv2d, _BatchNorm)) or super().is_leaf_module(module, qualified_name)


class FoldedNetwork(nn.Module):
    """The same function as ``network`` in eval mode, for attacks.

    It is in eval mode whatever mode ``network`` is in. Convolutions with what follows them are
    :class:`FoldedConvolution`; all else has the network's own tensors. Call :meth:`refresh` after every
    change of the network's parameters or statistics.

    Raises:
        Exception: of torch.fx, for a network whose forward cannot be traced.
    """

    def __init__(self, network: nn.Module):
        super().__init__()
        with eval_mode(network):  # a trace keeps what ``self.training`` decides
            traced = fx.GraphModule(network, _Tracer().trace(network))
        for node in list(traced.graph.nodes):
            if node.op == "call_module" and isinstance(traced.get_submodule(node.target), nn.Conv2d):
                _fold(traced, node)
        traced.graph.eliminate_dead_code()
        traced.delete_all_unused_submodules()
        for node in traced.graph.find_nodes(op="call_module"):
            module = traced.get_submodule(node.target)
            if not isinstance(module, FoldedConvolution):  # a shallow copy has the tensors, but its own mode
                traced.set_submodule(node.target, copy.copy(module))
        traced.recompile()
        self.network = traced
        self._folded = [module for module in traced.modules() if isinstance(module, FoldedConvolution)]
        self.eval()

    def refresh(self) -> None:
        """Follow the parameters and statistics that an optimiser step has changed."""
        for module in self._folded:
            module.refresh()

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)


def _fold(traced: fx.GraphModule, node: fx.Node) -> None:
    """Replace the convolution ``node`` and the norm, sum and ReLU that only it leads to by one node."""
    convolution = traced.get_submodule(node.target)
    if convolution.padding_mode != "zeros" or isinstance(convolution.padding, str):
        return
    last, norm, residual = node, None, None
    follower = _only_user(last)
    if follower is not None and isinstance(_module(traced, follower), _BatchNorm):
        last, norm = follower, _module(traced, follower)
        if norm.running_mean is None or norm.weight is None:
            return
    if norm is None and convolution.bias is None and _only_user(last) is None:
        return
    follower = _only_user(last)
    if follower is not None and follower.target in (operator.add, operator.iadd, torch.add):
        others = [arg for arg in follower.args if arg is not last]
        # The kernel sums before its ReLU, so a sum without one gains nothing.
        if len(others) == 1 and isinstance(others[0], fx.Node) and _is_relu(traced, _only_user(follower)):
            last, residual = follower, others[0]
    relu = _is_relu(traced, _only_user(last))
    if relu:
        last = _only_user(last)
    traced.set_submodule(node.target, FoldedConvolution(convolution, norm, relu))
    with traced.graph.inserting_after(last):
        args = node.args if residual is None else (*node.args, residual)
        folded = traced.graph.call_module(node.target, args)
    last.replace_all_uses_with(folded)
    while last is not node:
        previous = next(arg for arg in last.all_input_nodes if arg is not residual)
        traced.graph.erase_node(last)
        last = previous
    traced.graph.erase_node(node)


def _only_user(node: fx.Node | None) -> fx.Node | None:
    return next(iter(node.users)) if node is not None and len(node.users) == 1 else None


def _module(traced: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    return traced.get_submodule(node.target) if node.op == "call_module" else None


def _is_relu(traced: fx.GraphModule, node: fx.Node | None) -> bool:
    return node is not None and (
        isinstance(_module(traced, node), nn.ReLU) or node.target in (F.relu, torch.relu)
    )
