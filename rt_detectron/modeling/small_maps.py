"""Convolutions on maps of few pixels, as a network's last stage has them on small images."""

import torch.nn.functional as F
from torch import Tensor, nn


class SmallMapConv2d(nn.Conv2d):
    """A convolution that is a matrix product where its output has at most :attr:`MAX_PIXELS` pixels.

    On a CPU, oneDNN's weight gradient of such a map takes several times as long as that product.
    """

    MAX_PIXELS = 4

    def forward(self, x: Tensor) -> Tensor:
        height, width = self._output_size(x)
        if x.device.type != "cpu" or height * width > self.MAX_PIXELS:
            return super().forward(x)
        patches = F.unfold(x, self.kernel_size, self.dilation, self.padding, self.stride)
        # (N, C*k*k, pixels) to one product over all images
        patches = patches.transpose(1, 2).reshape(-1, patches.shape[1])
        output = F.linear(patches, self.weight.flatten(1), self.bias)
        return output.view(len(x), height, width, -1).permute(0, 3, 1, 2)

    def _output_size(self, x: Tensor) -> list[int]:
        return [
            (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
            for size, padding, dilation, kernel, stride in zip(
                x.shape[2:], self.padding, self.dilation, self.kernel_size, self.stride, strict=True
            )
        ]


def use_small_maps(network: nn.Module) -> None:
    """Make the plain convolutions of ``network`` over 1x1 :class:`SmallMapConv2d`, in place."""
    for module in network.modules():
        if (
            type(module) is nn.Conv2d
            and module.groups == 1
            and module.padding_mode == "zeros"
            and not isinstance(module.padding, str)
            and max(module.kernel_size) > 1
        ):
            module.__class__ = SmallMapConv2d
