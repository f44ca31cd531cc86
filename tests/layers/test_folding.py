"""The folded network is the network in eval mode: same logits, input gradients, adversarial examples."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from rt_detectron.attacks import PGD, ThreatModel
from rt_detectron.checkpoint.architectures import build_classifier
from rt_detectron.layers import folding
from rt_detectron.layers.folding import FoldedConvolution, FoldedNetwork
from rt_detectron.layers.sync_bn import use_sync_bn

ARCHS = [
    "resnet18",
    "resnet50",
    "resnext50_32x4d",
    "densenet",
    "mobilenet",
    "mnasnet",
    "shufflenet",
    "vgg16_bn",
]


def batch(size=64):
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(4, 3, size, size, generator=generator).contiguous(memory_format=torch.channels_last)
    return images, torch.arange(4)


def logits_and_gradient(model, images, labels):
    images = images.clone().requires_grad_(True)
    logits = model(images)
    (grad,) = torch.autograd.grad(F.cross_entropy(logits, labels), images)
    return logits.detach(), grad


def relative(found, expected):
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize(
    "arch", [pytest.param(arch, marks=pytest.mark.slow) if arch == "vgg16_bn" else arch for arch in ARCHS]
)
def test_same_function_and_gradient(arch, random_classifier):
    network = random_classifier(arch).to(memory_format=torch.channels_last)
    images, labels = batch()
    expected = logits_and_gradient(network, images, labels)
    folded = FoldedNetwork(network).eval()
    assert any(isinstance(module, FoldedConvolution) for module in folded.modules())
    found = logits_and_gradient(folded, images, labels)
    assert relative(found[0], expected[0]) < 1e-4
    # A ReLU or a maximum that is a tie but for rounding sends its gradient elsewhere; the next test is exact.
    assert relative(found[1], expected[1]) < 5e-2


# Norms with an activation, and weights that are standardised.
@pytest.mark.parametrize(
    "arch", ["timm/regnety_002", "timm/mobilenetv3_small_100", "timm/resnetv2_50x1_bit", "timm/ghostnet_100"]
)
def test_layers_of_timm_that_do_more_than_torchs(arch):
    torch.manual_seed(0)
    network = build_classifier(arch, 5).eval()
    for module in network.modules():
        if isinstance(module, _BatchNorm):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    images, labels = batch()
    expected = logits_and_gradient(network, images, labels)
    found = logits_and_gradient(FoldedNetwork(network), images, labels)
    assert relative(found[0], expected[0]) < 1e-4
    assert relative(found[1], expected[1]) < 5e-2


class Twice(nn.Module):
    """Its convolution is called twice."""

    def __init__(self):
        super().__init__()
        self.convolution = nn.Conv2d(3, 3, 3, padding=1)
        self.norm, self.other = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
        nn.init.constant_(self.norm.running_mean, -0.5)

    def forward(self, x):
        x = F.relu(self.norm(self.convolution(x)))
        return F.relu(self.norm(self.convolution(x))) - self.other(self.convolution(x))


class Sums(Twice):
    """With a factor, and with another shape on either side."""

    def forward(self, x):
        scaled = F.relu(torch.add(x, self.convolution(x), alpha=0.1))
        small = x.mean((2, 3), keepdim=True)
        return scaled + F.relu(self.norm(self.convolution(x)) + small) + F.relu(self.convolution(small) + x)


class Standardised(nn.Conv2d):
    def forward(self, x):
        return F.conv2d(x, self.weight - self.weight.mean(), self.bias, padding=1)


def hooked():
    convolution = nn.Conv2d(3, 4, 3, padding=1)
    convolution.register_forward_hook(lambda _, inputs, output: 2 * output)
    return convolution


@pytest.mark.parametrize(
    "build",
    [
        *(Twice, Sums, lambda: nn.Sequential(hooked(), nn.BatchNorm2d(4), nn.ReLU())),
        lambda: nn.Sequential(Standardised(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()),
    ],
    ids=["called twice", "sums", "hook", "subclass"],
)
def test_what_is_no_plain_convolution_and_norm_stays(build):
    torch.manual_seed(0)
    network, x = build().eval(), torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(FoldedNetwork(network)(x), network(x), rtol=1e-5, atol=1e-5)


def test_modules_within_modules_keep_their_mode():
    network = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 8)).train()
    FoldedNetwork(network)
    assert network[0].dropout.training


def test_without_the_private_operator_the_numbers_are_the_same(random_classifier, monkeypatch):
    network = random_classifier("resnet18").to(memory_format=torch.channels_last)
    folded = FoldedNetwork(network)
    images, labels = batch()
    expected = logits_and_gradient(folded, images, labels)
    asked = []
    monkeypatch.setattr(folding, "_fused_kernel", lambda: asked.append(1))
    found = logits_and_gradient(folded, images, labels)
    assert len(asked) > 10
    for a, b in zip(found, expected, strict=True):
        assert relative(a, b) < 1e-5


@pytest.mark.parametrize("arch", ["resnet18", "mobilenet", "densenet"])
def test_half_precision_is_as_near_as_the_networks_own(arch, random_classifier, monkeypatch):
    network = random_classifier(arch).to(memory_format=torch.channels_last)
    images, labels = batch()
    exact = logits_and_gradient(network, images, labels)
    asked, fused = [], folding._fused_kernel
    monkeypatch.setattr(folding, "_fused_kernel", lambda: asked.append(1) or fused())
    folded = FoldedNetwork(network)
    with torch.autocast("cpu", torch.bfloat16):
        own = logits_and_gradient(network, images, labels)
        found = logits_and_gradient(folded, images, labels)
    assert found[0].dtype == torch.bfloat16
    assert found[1].dtype == torch.float32
    for ours, theirs, expected in zip(found, own, exact, strict=True):
        assert relative(ours, expected) < 1.5 * relative(theirs, expected)
    if torch.ops.mkldnn._is_mkldnn_bf16_supported():
        assert len(asked) > 10
    again = logits_and_gradient(folded, images, labels)  # in float32, with weights that are not rounded
    assert relative(again[0], exact[0]) < 1e-4


def test_autocast_leaves_double_precision_alone(random_classifier):
    network = random_classifier("resnet18").double()
    images, labels = batch()
    expected = logits_and_gradient(network, images.double(), labels)
    with torch.autocast("cpu", torch.bfloat16):
        found = FoldedNetwork(network).network.conv1(images.double())
    assert found.dtype == torch.float64
    found = logits_and_gradient(FoldedNetwork(network), images.double(), labels)
    assert relative(found[0], expected[0]) < 1e-9


def test_half_precision_without_the_kernels_instructions(random_classifier, monkeypatch):
    monkeypatch.setattr(folding, "_fused_dtype", lambda x: None)
    network = random_classifier("resnet18")
    images, labels = batch()
    exact = logits_and_gradient(network, images, labels)
    with torch.autocast("cpu", torch.bfloat16):
        found = logits_and_gradient(FoldedNetwork(network), images, labels)
    assert relative(found[0], exact[0]) < 0.05


# VGG's 138 million weights take 10 s.
@pytest.mark.parametrize("arch", [arch for arch in ARCHS if arch != "vgg16_bn"])
def test_without_cpu_kernels_in_double_precision(arch, random_classifier):
    """As on a GPU, and without rounding to speak of."""
    network = random_classifier(arch).double()
    images, labels = batch()
    expected = logits_and_gradient(network, images.double(), labels)
    found = logits_and_gradient(FoldedNetwork(network).eval(), images.double(), labels)
    assert relative(found[0], expected[0]) < 1e-10
    assert relative(found[1], expected[1]) < 1e-8


@pytest.mark.parametrize(
    ("stride", "size", "kernel", "padding", "channels"),
    [
        (2, 32, 7, 3, 3),  # in blocks of 2x2 pixels
        (2, 32, 3, 1, 3),
        (2, 33, 7, 3, 3),  # not divisible, so not in blocks
        (2, 32, 5, 2, 3),
        (1, 2, 3, 1, 16),  # as a matrix
        (2, 2, 3, 1, 16),
        (1, 1, 3, 1, 16),
        (1, 2, 1, 0, 16),
        (1, 8, 3, 1, 16),
    ],
)
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("kernel_of", ["oneDNN", "public functions"])
def test_each_shape_equals_the_modules(
    stride, size, kernel, padding, channels, with_residual, relu, kernel_of, monkeypatch
):
    if kernel_of == "oneDNN":
        assert folding._fused_kernel() is not None
    else:  # as in a version of torch that has dropped its private operator
        monkeypatch.setattr(folding, "_fused_kernel", lambda: None)
    torch.manual_seed(0)
    convolution = nn.Conv2d(channels, 8, kernel, stride, padding, bias=False)
    norm = nn.BatchNorm2d(8).eval()
    with torch.no_grad():
        norm.weight.uniform_(0.5, 1.5)
        norm.bias.normal_()
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 1.5)
    x = (
        torch.randn(3, channels, size, size)
        .contiguous(memory_format=torch.channels_last)
        .requires_grad_(True)
    )
    expected = norm(convolution(x))
    residual = torch.randn_like(expected).requires_grad_(True) if with_residual else None
    expected = expected if residual is None else expected + residual
    expected = F.relu(expected) if relu else expected
    found = FoldedConvolution(convolution, norm, relu)(x, residual)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    inputs = [x] if residual is None else [x, residual]
    weight = torch.randn_like(expected)
    for a, b in zip(
        torch.autograd.grad((found * weight).sum(), inputs),
        torch.autograd.grad((expected * weight).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_adversarial_examples_are_those_of_the_plain_loop(norm, random_classifier):
    network = random_classifier("resnet18").to(memory_format=torch.channels_last)
    images, labels = batch()
    threat_model = ThreatModel(norm, 1.0 if norm == "l2" else 4.0)
    plain = images.clone()
    for _ in range(3):
        plain.requires_grad_(True)
        (grad,) = torch.autograd.grad(F.cross_entropy(network(plain), labels), plain)
        size = 2 * threat_model.radius / 3
        step = grad / grad.flatten(1).norm(dim=1).view(-1, 1, 1, 1) if norm == "l2" else grad.sign()
        delta = plain.detach() + size * step - images
        if norm == "l2":
            delta *= (threat_model.radius / delta.flatten(1).norm(dim=1).view(-1, 1, 1, 1)).clamp(max=1)
        else:
            delta = delta.clamp(-threat_model.radius, threat_model.radius)
        plain = (images + delta).clamp(0, 1)
    found = PGD(threat_model, steps=3, relative_step_size=2.0)(FoldedNetwork(network), images, labels)
    moved = relative(found - images, plain - images)
    # The sign of a gradient that is all but zero may be another.
    assert moved < (1e-3 if norm == "l2" else 2e-2)


def test_once_it_forgets_it_follows_the_optimiser(random_classifier):
    network = random_classifier("resnet18").train()
    folded = FoldedNetwork(network).eval()
    images, labels = batch(32)
    folded(images)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        F.cross_entropy(network(images), labels).backward()  # moves the statistics, too
        optimizer.step()
    with torch.no_grad():
        expected = network.eval()(images)
        assert relative(folded(images), expected) > 1e-2
        folded.forget()
        assert relative(folded(images), expected) < 1e-5


def test_inference_before_an_attack(random_classifier):
    folded = FoldedNetwork(random_classifier("resnet18"))
    images, labels = batch(32)
    with torch.inference_mode():
        folded(images)
    _, grad = logits_and_gradient(folded, images, labels)
    assert grad.abs().sum() > 0


def test_the_network_is_left_alone(random_classifier):
    network = random_classifier("resnet18").train()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    images, labels = batch(32)
    PGD(ThreatModel("l2", 1.0), steps=2)(FoldedNetwork(network), images, labels)
    assert all(parameter.grad is None for parameter in network.parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())
    assert network.training
    assert all(module.training for module in network.modules())


def test_it_is_in_eval_mode_and_the_network_in_its_own(random_classifier):
    """densenet's norms come before its convolutions, so that they are not folded but shared."""
    network = random_classifier("densenet").train()
    folded = FoldedNetwork(network)
    assert all(module.training for module in network.modules())
    assert not any(module.training for module in folded.modules())
    images, _ = batch(32)
    network(images)  # moves the statistics
    folded.forget()
    with torch.no_grad():
        assert relative(folded(images), network.eval()(images)) < 1e-4


def test_what_training_decides_is_decided_for_eval():
    class Noisy(nn.Module):
        def forward(self, x):
            return F.dropout(x, 0.5, self.training) + (1 if self.training else 0)

    assert torch.equal(FoldedNetwork(Noisy().train())(torch.ones(9)), torch.ones(9))


@pytest.mark.parametrize(
    "synchronise", [nn.SyncBatchNorm.convert_sync_batchnorm, partial(use_sync_bn, device="cpu")]
)
def test_synchronised_norms_are_folded_too(synchronise, random_classifier):
    network = random_classifier("resnet18")
    images, _ = batch(32)
    with torch.no_grad():
        expected = network(images)
        folded = FoldedNetwork(synchronise(network))
        assert relative(folded(images), expected) < 1e-5
    assert not any(isinstance(module, _BatchNorm) for module in folded.modules())


def test_copies_cost_no_state(random_classifier):
    folded = FoldedNetwork(random_classifier("resnet18"))
    assert set(folded.state_dict()) == {"network.fc.weight", "network.fc.bias"}


def test_networks_that_cannot_be_traced_say_so():
    class Branching(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    with pytest.raises(torch.fx.proxy.TraceError):
        FoldedNetwork(Branching())
