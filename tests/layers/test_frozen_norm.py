import copy

import pytest
import torch
import torch.nn.functional as F
from detectron2.layers import Conv2d, FrozenBatchNorm2d
from detectron2.modeling import Backbone

from rt_detectron.layers.frozen_norm import FrozenNormConv2d, fixed_weights, fold_frozen_norms


@pytest.fixture
def plain():
    """Detectron2's convolution with a frozen norm that does something, a bias and an activation."""
    torch.manual_seed(0)
    norm = FrozenBatchNorm2d(6)
    for name, low in (("weight", 0.5), ("bias", -1), ("running_mean", -1), ("running_var", 0.5)):
        getattr(norm, name).uniform_(low, 1.5)
    return Conv2d(4, 6, 3, stride=2, padding=1, groups=2, bias=True, norm=norm, activation=F.relu)


@pytest.mark.parametrize("size", [(9, 7), (4, 3)], ids=["more pixels", "more weights"])
def test_outputs_and_gradients_are_those_of_the_norm_behind(plain, size):
    folded = fold_frozen_norms(torch.nn.Sequential(copy.deepcopy(plain)))
    assert type(folded[0]) is FrozenNormConv2d
    found = []
    for module in (plain, folded):
        x = torch.randn(2, 4, *size, generator=torch.Generator().manual_seed(1)).requires_grad_(True)
        output = module(x)
        output.square().sum().backward()
        found.append([output, x.grad, *(parameter.grad for parameter in module.parameters())])
    for ours, reference in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-5, atol=1e-5)
    assert (found[0][0] > 0).any()


def test_state_dict_and_representation_stay(plain):
    folded = fold_frozen_norms(torch.nn.Sequential(copy.deepcopy(plain)))[0]
    assert folded.state_dict().keys() == plain.state_dict().keys()


def test_a_norm_that_is_replaced_later_is_heeded(plain):
    folded = fold_frozen_norms(torch.nn.Sequential(copy.deepcopy(plain)))[0]
    plain.norm = folded.norm = torch.nn.BatchNorm2d(6)
    x = torch.randn(2, 4, 9, 7)
    assert torch.equal(folded(x), plain(x))


def test_other_convolutions_stay():
    network = torch.nn.Sequential(
        Conv2d(3, 4, 1, norm=torch.nn.BatchNorm2d(4)), Conv2d(4, 4, 1), torch.nn.Conv2d(4, 4, 1)
    )
    types = [type(module) for module in network]
    assert [type(module) for module in fold_frozen_norms(network)] == types


@pytest.mark.parametrize("kind", [FrozenBatchNorm2d, torch.nn.BatchNorm2d])
def test_with_fixed_weights_it_is_the_same_function_and_after_the_block_itself(plain, kind):
    norm = kind(6)
    norm.load_state_dict(plain.norm.state_dict(), strict=False)
    plain.norm = norm
    network = fold_frozen_norms(torch.nn.Sequential(plain)).eval()
    x = torch.randn(2, 4, 9, 7, requires_grad=True)
    expected = network(x)
    (grad,) = torch.autograd.grad(expected.square().sum(), x)
    with fixed_weights(network):
        found = network(x)
        (found_grad,) = torch.autograd.grad(found.square().sum(), x)
        with torch.no_grad():
            norm.weight.mul_(2)
        assert torch.equal(network(x), found)  # the norm is not read again
        with fixed_weights(network):
            assert torch.equal(network(x), found)  # nor in a block within
        assert torch.equal(network(x), found)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found_grad, grad, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(network(x), found)


@pytest.mark.parametrize(
    "convolution",
    [
        torch.nn.Conv2d(4, 6, 3, padding=1),
        Conv2d(4, 6, 3, norm=torch.nn.GroupNorm(2, 6), activation=F.relu),
        Conv2d(4, 6, 3, norm=torch.nn.BatchNorm2d(6, track_running_stats=False), activation=torch.sigmoid),
        Conv2d(4, 6, 3, stride=2, bias=False),
        torch.nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"),
    ],
    ids=["torch's", "group norm", "no statistics", "no norm", "reflection"],
)
def test_fixed_weights_of_convolutions_that_absorb_nothing(convolution):
    x = torch.randn(2, 4, 9, 7)
    expected = convolution.eval()(x)
    with fixed_weights(convolution):
        found = convolution(x)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_weights_that_a_hook_sets_are_those_of_the_pass():
    """As torch.nn.utils.prune and the older spectral_norm set them."""
    convolution = torch.nn.Conv2d(4, 6, 3)
    convolution.register_forward_pre_hook(
        lambda module, _: setattr(module.weight, "data", torch.full_like(module.weight, 0.1))
    )
    x = torch.randn(2, 4, 9, 7)
    with fixed_weights(convolution):
        found = convolution(x)
    torch.testing.assert_close(found, convolution(x))


def test_a_backbone_computes_channels_last_and_its_heads_see_no_difference(plain):
    class Features(Backbone):
        def __init__(self):
            super().__init__()
            self.conv = plain

        def forward(self, x):
            self.maps = self.conv(x)
            return {"res2": self.maps}

    model = torch.nn.Sequential(Features()).eval()
    x = torch.randn(2, 4, 9, 7)
    expected = model(x)["res2"]
    with fixed_weights(model):
        found = model(x)["res2"]
    assert model[0].maps.is_contiguous(memory_format=torch.channels_last)
    assert found.is_contiguous()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert model(x)["res2"] is model[0].maps  # nothing is left of it


def test_fixed_weights_leave_modes_parameters_and_their_layout(plain):
    network = torch.nn.Sequential(plain, torch.nn.BatchNorm2d(6), torch.nn.Dropout()).train()
    before = [(parameter.clone(), parameter.stride()) for parameter in network.parameters()]
    with fixed_weights(network):
        assert not any(module.training for module in network.modules())
    assert all(module.training for module in network.modules())
    assert "forward" not in vars(plain)
    for parameter, (value, stride) in zip(network.parameters(), before, strict=True):
        assert torch.equal(parameter, value)
        assert parameter.stride() == stride


@pytest.mark.parametrize("size", [(9, 7), (4, 3)], ids=["more pixels", "more weights"])
def test_under_autocast_it_is_of_the_precision_of_detectron2s(plain, size):
    folded = fold_frozen_norms(torch.nn.Sequential(copy.deepcopy(plain)))
    x = torch.randn(2, 4, *size)
    with torch.autocast("cpu", torch.bfloat16):
        expected, found = plain(x), folded(x)
    assert expected.dtype == found.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.05)
