"""Folding of batch norms into convolutions, for networks in eval mode.

An attack differentiates a network in eval mode with respect to its input alone. Batch norm is then an affine
map, which the convolution in front of it absorbs exactly (Jacob et al. 2018, section 3.2). So a convolution,
its norm, a residual sum and a ReLU become one operation in the forward pass and one in the backward pass.
"""

import copy
import logging
import operator
from collections.abc import Callable

import torch
import torch.nn.functional as F
from detectron2.layers import FrozenBatchNorm2d, NaiveSyncBatchNorm
from torch import Tensor, fx, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm

from rt_detectron.layers.eval_norm import EvalBatchNorm2d
from rt_detectron.layers.small_maps import SmallMapConv2d, output_size, small_map
from rt_detectron.layers.sync_bn import CpuSyncBatchNorm
from rt_detectron.utils.modes import eval_mode

logger = logging.getLogger(__name__)

# Subclasses may compute something else: timm has norms with an activation, and convolutions that standardise
# their weights.
_CONVOLUTIONS = (nn.Conv2d, SmallMapConv2d)
_NORMS = (
    nn.BatchNorm2d,
    nn.SyncBatchNorm,
    NaiveSyncBatchNorm,
    CpuSyncBatchNorm,
    EvalBatchNorm2d,
    FrozenBatchNorm2d,
)


def is_plain(module: nn.Module | None, types: tuple[type, ...] = _CONVOLUTIONS) -> bool:
    """Whether ``module`` is of one of these very types, and no hook changes what it does."""
    if module is None or type(module) not in types:
        return False
    return not module._forward_pre_hooks and not module._forward_hooks


def can_be_absorbed(norm: nn.Module | None) -> bool:
    """Whether :func:`absorb_norm` takes it, in eval mode."""
    if norm is None or not is_plain(norm, _NORMS):
        return False
    return norm.running_mean is not None and norm.weight is not None


def absorb_norm(norm: nn.Module, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Factor and bias by which a convolution absorbs the ``norm`` after it, in eval mode.

    Args:
        norm: a batch norm with statistics and affine parameters of C channels, frozen or not.
        bias: of the convolution, (C,) or None.

    Returns:
        The factor of each output channel's weights, (C,), and the new bias, (C,).
    """
    scale = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
    shift = -norm.running_mean if bias is None else bias - norm.running_mean
    return scale, torch.addcmul(norm.bias, shift, scale)


class FoldedConvolution(nn.Module):
    """``relu(norm(convolution(x)) + residual)``; norm, residual and ReLU are optional.

    The folded weights are computed on first use and kept until :meth:`forget`. Two cases that are slow on
    CPUs are computed differently:

    - few channels and stride 2, as in the first convolution: with stride 1 on blocks of 2x2 pixels;
    - a map of few pixels, most of whose neighbours are padding: as a :class:`SmallMap`.
    """

    FEW_CHANNELS = 4

    def __init__(self, convolution: nn.Conv2d, norm: nn.BatchNorm2d | None, relu: bool):
        super().__init__()
        self.source = (convolution, norm)  # a tuple, so that they are no submodules
        self.relu = relu
        kernel = convolution.kernel_size
        self.in_blocks = (
            convolution.in_channels <= self.FEW_CHANNELS
            and convolution.stride == (2, 2)
            and convolution.dilation == (1, 1)
            and kernel in ((3, 3), (7, 7))
            and convolution.padding == (kernel[0] // 2, kernel[1] // 2)
        )
        self.forget()

    def forget(self) -> None:
        """Drop the folded weights; the next pass computes them from the present parameters and statistics."""
        self._folded: tuple[tuple, Tensor, Tensor] | None = None

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        if residual is None or residual.shape == self._shape_of_output(x):
            return self._convolved(x, residual, self.relu)
        return F.relu(self._convolved(x, None, False) + residual)  # kernels do not broadcast

    def _shape_of_output(self, x: Tensor) -> tuple[int, ...]:
        of, _ = self.source
        size = output_size(x.shape[2:], of.kernel_size, of.stride, of.padding, of.dilation)
        return len(x), of.out_channels, *size

    def _convolved(self, x: Tensor, residual: Tensor | None, relu: bool) -> Tensor:
        convolution, _ = self.source
        dtype = _fused_dtype(x)
        if dtype is not None:
            x, residual = x.to(dtype), None if residual is None else residual.to(dtype)
            if (small := small_map(x, convolution)) is not None:
                weight, bias = self.folded(small.prepare, dtype)
                return _finish(small.convolve(x, weight).add_(bias.view(-1, 1, 1)), residual, relu)
        if dtype is not None and self.in_blocks and x.shape[2] % 2 == x.shape[3] % 2 == 0:
            weight, bias = self.folded(_weight_of_blocks, dtype)
            x, geometry = _blocks(x, weight.shape[2]), ((0, 0), (1, 1), (1, 1), 1)
        else:
            weight, bias = self.folded(dtype=dtype)
            geometry = convolution.padding, convolution.stride, convolution.dilation, convolution.groups
        convolve = _convolve if dtype is None else _FusedConvolution.apply
        return convolve(x, residual, weight, bias, geometry, relu)

    def folded(
        self, transform: Callable[[Tensor], Tensor] | None = None, dtype: torch.dtype | None = None
    ) -> tuple[Tensor, Tensor]:
        """Weight, in the form that ``transform`` gives it, and bias; ``dtype`` None: of the convolution."""
        dtype = dtype or self.source[0].weight.dtype
        if self._folded is None or self._folded[0] != (transform, dtype):
            self._folded = (transform, dtype), *(each.to(dtype) for each in self._fold(transform))
        return self._folded[1:]

    @torch.inference_mode(False)  # an attack may use them next
    @torch.no_grad()
    def _fold(self, transform: Callable[[Tensor], Tensor] | None) -> tuple[Tensor, Tensor]:
        convolution, norm = self.source
        weight, bias = convolution.weight.detach(), convolution.bias
        if norm is not None:
            scale, bias = absorb_norm(norm, bias)
            weight = weight * scale.view(-1, 1, 1, 1)
        bias = weight.new_zeros(len(weight)) if bias is None else bias
        return weight if transform is None else transform(weight), bias


def _weight_of_blocks(weight: Tensor) -> Tensor:
    """(O, C, k, k) of stride 2 and padding k // 2 as the equal (O, 4*C, taps, taps) on blocks."""
    # Pixel 2*o + k - p of the kernel's k-th tap (p odd) is in block o + (k + 1)//2 - (p + 1)//2.
    channels, taps = weight.shape[1], (weight.shape[2] + 1) // 2
    weight = F.pad(weight, (1, 0, 1, 0)).view(-1, channels, taps, 2, taps, 2)
    weight = weight.permute(0, 1, 3, 5, 2, 4).reshape(-1, 4 * channels, taps, taps)
    return weight.contiguous(memory_format=torch.channels_last)


def _blocks(x: Tensor, taps: int) -> Tensor:
    """(N, C, H, W) to (N, 4*C, H/2, W/2) and the padding that ``taps`` need."""
    before, after = taps // 2, taps - 1 - taps // 2
    return F.pad(F.pixel_unshuffle(x, 2), (before, after, before, after))


def runs_on_cpu(x: Tensor) -> bool:
    """Whether ``x`` can go through the kernels for CPUs: float32, outside autocast."""
    return x.device.type == "cpu" and x.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")


def _fused_dtype(x: Tensor) -> torch.dtype | None:
    """What the fused kernel for CPUs computes ``x`` in; None where it does not."""
    if runs_on_cpu(x):
        return torch.float32
    if x.device.type != "cpu" or not torch.is_autocast_enabled("cpu"):
        return None
    # As autocast itself, which leaves float64 alone. Without AVX-512 the kernel refuses bfloat16.
    casts = x.dtype in (torch.float32, torch.bfloat16) and torch.get_autocast_dtype("cpu") == torch.bfloat16
    supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)  # private, too
    return torch.bfloat16 if casts and supported() else None


def _fused_kernel():
    """oneDNN's convolution with sum and ReLU in one kernel; None if this build of torch has none.

    It is private to torch's compiler, so any version may lack it.
    """
    return getattr(torch.ops.mkldnn, "_convolution_pointwise", None)


def _convolve(x, residual, weight, bias, geometry, relu):
    """The same with torch's public functions, on any device."""
    padding, stride, dilation, groups = geometry
    return _finish(F.conv2d(x, weight, bias, stride, padding, dilation, groups), residual, relu)


def _finish(x: Tensor, residual: Tensor | None, relu: bool) -> Tensor:
    if residual is not None:
        x += residual
    return F.relu(x, inplace=True) if relu else x


class _FusedConvolution(torch.autograd.Function):
    """For CPUs: one kernel forward; the backward pass gives the gradients of ``x`` and ``residual`` only."""

    @staticmethod
    def forward(ctx, x, residual, weight, bias, geometry, relu):
        fused = _fused_kernel()
        if fused is None:
            output = _convolve(x, residual, weight, bias, geometry, relu)
        elif residual is None:
            output = fused(x, weight, bias, *geometry, "relu" if relu else "none", [], "")
        else:
            activation = "relu" if relu else None
            output = fused.binary(x, residual, weight, bias, *geometry, "add", 1.0, activation, [], "")
        # The ReLU's derivative can be taken from its output, which is kept anyway.
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
    """Computes the same as ``network`` in eval mode, faster, for attacks.

    It is in eval mode, whatever the mode of ``network``. Each convolution and what follows it is a
    :class:`FoldedConvolution`; all other modules share the network's tensors. Call :meth:`forget` after
    every change of the network's parameters or statistics.

    Raises:
        Exception: of torch.fx, for a network whose forward cannot be traced.
    """

    def __init__(self, network: nn.Module):
        super().__init__()
        with eval_mode(network):  # a trace fixes the branches on ``self.training``
            traced = fx.GraphModule(network, _Tracer().trace(network))
        for node in list(traced.graph.nodes):
            if node.op == "call_module" and is_plain(traced.get_submodule(node.target)):
                _fold_convolution(traced, node)
        traced.graph.eliminate_dead_code()
        traced.delete_all_unused_submodules()
        for node in traced.graph.find_nodes(op="call_module"):
            module = traced.get_submodule(node.target)
            if not isinstance(module, FoldedConvolution):
                traced.set_submodule(node.target, _with_own_mode(module))
        traced.recompile()
        self.network = traced
        self._folded = [module for module in traced.modules() if isinstance(module, FoldedConvolution)]
        self.eval()

    def forget(self) -> None:
        """Drop the folded weights; the next pass computes them again."""
        for module in self._folded:
            module.forget()

    def prepare(self) -> None:
        """Fold all weights ahead of the next pass, so that torch.compile finds them there."""
        for module in self._folded:
            module.folded()

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)


def fold(network: nn.Module) -> nn.Module:
    """:class:`FoldedNetwork` of ``network``; ``network`` itself, with a warning, if it cannot be traced."""
    try:
        return FoldedNetwork(network)
    except (fx.proxy.TraceError, TypeError, RuntimeError) as error:  # its forward depends on its input
        name = getattr(network, "arch", type(network).__name__)
        logger.warning("%s is used without folding its batch norms, which is slower: %s", name, error)
        return network


def _fold_convolution(traced: fx.GraphModule, node: fx.Node) -> None:
    """Replace the convolution ``node`` and the norm, sum and ReLU that only it leads to by one node."""
    convolution = traced.get_submodule(node.target)
    if convolution.padding_mode != "zeros" or isinstance(convolution.padding, str) or node.kwargs:
        return
    if len(traced.graph.find_nodes(op="call_module", target=node.target)) > 1:
        return  # what follows may differ
    last, norm, residual = node, None, None
    follower = _only_user(last)
    follower_module = None if follower is None else _module(traced, follower)
    if can_be_absorbed(follower_module):
        last, norm = follower, follower_module
    if norm is None and convolution.bias is None and _only_user(last) is None:
        return
    follower = _only_user(last)
    if follower is not None and _is_sum(follower):
        others = [arg for arg in follower.args if arg is not last]
        # The kernel adds before its ReLU, so a sum without a ReLU gains nothing.
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


def _with_own_mode(module: nn.Module) -> nn.Module:
    """A copy that shares the tensors."""
    shallow = copy.copy(module)
    shallow._modules = {
        name: None if child is None else _with_own_mode(child)  # an empty Sequential is falsy
        for name, child in module._modules.items()
    }
    return shallow


def _only_user(node: fx.Node | None) -> fx.Node | None:
    return next(iter(node.users)) if node is not None and len(node.users) == 1 else None


def _module(traced: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    return traced.get_submodule(node.target) if node.op == "call_module" else None


def _is_sum(node: fx.Node) -> bool:
    return node.target in (operator.add, operator.iadd, torch.add) and not node.kwargs  # which may scale


def _is_relu(traced: fx.GraphModule, node: fx.Node | None) -> bool:
    return node is not None and (
        is_plain(_module(traced, node), (nn.ReLU,)) or node.target in (F.relu, torch.relu)
    )
