"""A convolution on a map of few pixels is the same convolution."""

import pytest
import torch
from torch import nn

from rt_detectron.checkpoint.architectures import build_classifier
from rt_detectron.modeling.small_maps import SmallMapConv2d, use_small_maps


@pytest.mark.parametrize(
    ("size", "stride", "kernel", "padding", "dilation"),
    [(2, 1, 3, 1, 1), (4, 2, 3, 1, 1), (3, 2, 3, 1, 1), (1, 1, 3, 1, 1), (2, 1, 3, 2, 2), (2, 1, 2, 0, 1)],
)
@pytest.mark.parametrize("bias", [False, True])
def test_same_output_and_gradients(size, stride, kernel, padding, dilation, bias):
    torch.manual_seed(0)
    plain = nn.Conv2d(5, 7, kernel, stride, padding, dilation, bias=bias)
    small = nn.Sequential(nn.Conv2d(5, 7, kernel, stride, padding, dilation, bias=bias))
    small[0].load_state_dict(plain.state_dict())
    use_small_maps(small)
    assert type(small[0]) is SmallMapConv2d
    results = []
    for convolution in (plain, small):
        x = torch.randn(3, 5, size, size, generator=torch.Generator().manual_seed(1)).requires_grad_(True)
        output = convolution(x)
        assert output[0, 0].numel() <= SmallMapConv2d.MAX_PIXELS
        output.square().sum().backward()
        results.append([output, x.grad, *(parameter.grad for parameter in convolution.parameters())])
    for found, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_larger_maps_and_other_convolutions_stay_torchs_own():
    network = nn.Sequential(
        nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(4, 4, 3, padding="same")
    )
    use_small_maps(network)
    assert all(type(module) is nn.Conv2d for module in network)
    wide = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1))
    x = torch.randn(2, 3, 8, 8)
    expected = wide(x)
    use_small_maps(wide)
    assert torch.equal(wide(x), expected)


def test_the_state_dict_is_torchvisions():
    network = build_classifier("resnet18", 3)
    names = list(network.state_dict())
    use_small_maps(network)
    assert list(network.state_dict()) == names
