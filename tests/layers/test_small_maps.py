"""A convolution on a map of few pixels is torch's convolution: same output, same gradients."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from rt_detectron.checkpoint.architectures import build_classifier
from rt_detectron.layers.small_maps import MAX_SIDE, SmallMapConv2d, small_map, use_small_maps


@pytest.mark.parametrize(
    ("size", "stride", "kernel", "padding", "dilation"),
    [
        ((1, 1), 1, 3, 1, 1),
        ((2, 2), 1, 3, 1, 1),
        ((3, 3), 1, 3, 1, 1),
        ((4, 4), 1, 3, 1, 1),
        ((2, 4), 1, 3, 1, 1),
        ((3, 1), 1, 3, 1, 1),
        ((4, 4), 2, 3, 1, 1),
        ((3, 4), 2, 3, 1, 1),
        ((2, 2), 1, 3, 2, 2),
        ((2, 2), 1, 2, 0, 1),
        ((4, 4), 1, 3, 0, 1),
        ((4, 4), 1, 3, 2, 1),
        ((4, 4), 1, (1, 3), (0, 1), 1),
        ((4, 3), 1, 5, 2, 1),
    ],
)
@pytest.mark.parametrize("bias", [False, True])
def test_same_output_and_gradients(size, stride, kernel, padding, dilation, bias):
    torch.manual_seed(0)
    plain = nn.Conv2d(16, 24, kernel, stride, padding, dilation, bias=bias)
    small = nn.Sequential(nn.Conv2d(16, 24, kernel, stride, padding, dilation, bias=bias))
    small[0].load_state_dict(plain.state_dict())
    use_small_maps(small, "cpu")
    x = torch.randn(3, 16, *size)
    assert small_map(x, small[0]) is not None
    results = []
    for convolution in (plain.double(), small):
        x = x.detach().to(next(convolution.parameters()).dtype).requires_grad_(True)
        output = convolution(x)
        output.square().sum().backward()
        results.append([output, x.grad, *(parameter.grad for parameter in convolution.parameters())])
    for found, expected in zip(results[1], results[0], strict=True):
        assert found.shape == expected.shape
        # oneDNN's own error is about 2e-6
        assert (found - expected).norm() / expected.norm() < 2e-5


def test_in_channels_last_as_a_network_has_it():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, bias=False)).to(memory_format=torch.channels_last)
    x = torch.randn(2, 8, 4, 4).to(memory_format=torch.channels_last)
    expected = network(x)
    use_small_maps(network, "cpu")
    found = network(x)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    found.sum().backward()
    for tensor in (found, network[0].weight.grad):
        assert tensor.is_contiguous(memory_format=torch.channels_last)


def test_only_what_needs_a_gradient_gets_one():
    network = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1)).requires_grad_(False)
    use_small_maps(network, "cpu")
    x = torch.randn(2, 4, 2, 3, requires_grad=True)
    network(x).sum().backward()
    assert x.grad is not None
    assert network[0].weight.grad is None
    network.requires_grad_(True)
    network(x.detach()).sum().backward()
    assert network[0].weight.grad is not None


def test_it_may_meet_inference_before_training():
    network = nn.Sequential(nn.Conv2d(2, 2, 3, padding=1, stride=2), nn.Conv2d(2, 2, 3, padding=1))
    use_small_maps(network, "cpu")
    with torch.inference_mode():
        network(torch.randn(1, 2, 4, 2))  # the first time that a map has this size
    network(torch.randn(1, 2, 4, 2, requires_grad=True)).sum().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())


def test_its_gradient_can_be_differentiated():
    convolution = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1, bias=False)).double()
    use_small_maps(convolution, "cpu")
    weight = convolution[0].weight
    x = torch.randn(2, 2, 3, 4, dtype=torch.double, requires_grad=True)

    def forward(x, weight):
        return torch.func.functional_call(convolution, {"0.weight": weight}, (x,))

    assert torch.autograd.gradcheck(forward, (x, weight))
    assert torch.autograd.gradgradcheck(forward, (x, weight))


def test_what_it_cannot_do_is_torchs_own():
    size = MAX_SIDE[torch.float32] + 1
    for convolution, x in (
        (nn.Conv2d(4, 4, 3, padding=1), torch.randn(2, 4, size, size)),
        (nn.Conv2d(4, 4, 1), torch.randn(2, 4, 2, 2)),
        (nn.Conv2d(4, 4, 3, padding=1, groups=4), torch.randn(2, 4, 2, 2)),
        (nn.Conv2d(4, 4, 3, padding="same"), torch.randn(2, 4, 2, 2)),
        (nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"), torch.randn(2, 4, 2, 2)),
        (nn.Conv2d(4, 4, 3, padding=1).bfloat16(), torch.randn(2, 4, 3, 3).bfloat16()),
        (nn.Conv2d(4, 4, 3, padding=1), torch.randn(4, 2, 2)),  # a single image
    ):
        expected = convolution(x)
        network = nn.Sequential(convolution)
        use_small_maps(network, "cpu")
        assert type(network[0]) is SmallMapConv2d
        assert torch.equal(network(x), expected)
    convolution, x = nn.Conv2d(4, 4, 3, padding=1), torch.randn(2, 4, 2, 2)
    with torch.autocast("cpu", torch.bfloat16):
        expected = convolution(x)
        use_small_maps(nn.Sequential(convolution), "cpu")
        assert torch.equal(convolution(x), expected)


@pytest.mark.parametrize(("size", "stride"), [(1, 1), (2, 1), (2, 2)])
def test_bfloat16_is_almost_as_exact_as_torchs(size, stride):
    torch.manual_seed(0)
    convolution = nn.Conv2d(64, 48, 3, stride, padding=1, bias=False)
    x = torch.randn(8, 64, size, size)
    exact = convolution(x)
    x, convolution = x.bfloat16(), convolution.bfloat16()
    small = small_map(x, convolution)
    found = small.convolve(x, small.prepare(convolution.weight.detach()))
    assert found.dtype == torch.bfloat16
    # Where two numbers are subtracted, rounding counts more than once.
    assert (found - exact).norm() < 3 * (convolution(x) - exact).norm()


def test_a_map_smaller_than_the_kernel_is_torchs_error():
    network = nn.Sequential(nn.Conv2d(4, 4, 3))
    use_small_maps(network, "cpu")
    with pytest.raises(RuntimeError, match="Kernel size can't be greater"):
        network(torch.randn(1, 4, 2, 2))


def test_a_network_trains_as_before():
    torch.manual_seed(0)
    # In double precision: rounding decides where a ReLU is 0, which moves float32's gradients by up to 1 %.
    network = build_classifier("resnet18", 3).double().to(memory_format=torch.channels_last)
    names = list(network.state_dict())
    images, labels = torch.rand(8, 3, 64, 64, dtype=torch.double), torch.arange(8) % 3
    grads = []
    for _ in range(2):
        network.zero_grad()
        F.cross_entropy(network(images), labels).backward()
        grads.append([parameter.grad.clone() for parameter in network.parameters()])
        use_small_maps(network, "cpu")
    assert list(network.state_dict()) == names
    for expected, found in zip(*grads, strict=True):
        assert (found - expected).norm() <= 1e-9 * expected.norm()


@pytest.mark.parametrize("device", ["cuda", "meta", torch.device("cuda", 1)])
def test_only_cpus_get_it(device):
    network = build_classifier("resnet18", 3)
    use_small_maps(network, device)
    assert not any(isinstance(module, SmallMapConv2d) for module in network.modules())


@pytest.mark.parametrize("bias", [True, False])
def test_one_pixel_in_mixed_precision_has_the_gradients_of_float32(bias):
    """oneDNN's gradient of the weights is what is in memory at that place, here huge numbers."""
    torch.manual_seed(0)
    plain = nn.Conv2d(64, 96, 3, stride=2, padding=1, bias=bias)
    ours = copy.deepcopy(plain)
    use_small_maps(ours, "cpu")
    x = torch.randn(32, 64, 1, 1)
    grads = []
    for convolution, mixed in ((plain, False), (ours, True)):
        image = x.clone().requires_grad_(True)
        for _ in range(5):
            convolution.zero_grad()
            junk = [torch.full((96 * 64 * 9,), 1e30, dtype=torch.bfloat16) for _ in range(3)]
            del junk
            with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
                y = convolution(image)
            assert y.dtype == (torch.bfloat16 if mixed else torch.float32)
            found = torch.autograd.grad(y.float().square().sum(), [image, *convolution.parameters()])
        grads.append(found)
    for expected, found in zip(*grads, strict=True):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, expected, rtol=0.05, atol=0.02 * expected.abs().max().item())
