import copy

import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling.roi_heads.mask_head import MaskRCNNConvUpsampleHead
from detectron2.structures import Instances
from torch import nn

from rt_detectron.layers.mask_head import OneClassMaskHead, use_one_class_masks

CLASSES = 5


def head(num_classes=CLASSES, **options):
    torch.manual_seed(0)
    built = MaskRCNNConvUpsampleHead(
        ShapeSpec(channels=8), num_classes=num_classes, conv_dims=[8, 8, 12], **options
    )
    for parameter in built.parameters():  # Detectron2's first masks are nearly the same for all classes
        nn.init.normal_(parameter, std=0.3)
    return built.double().eval()


def found(*counts):
    """Instances of that many objects in each image."""
    generator = torch.Generator().manual_seed(1)
    classes = [torch.randint(0, CLASSES, (count,), generator=generator) for count in counts]
    return [Instances((20, 30), pred_classes=each) for each in classes]


def masks(model, features, *counts):
    with torch.no_grad():
        return [each.pred_masks for each in model(features, found(*counts))]


@pytest.mark.parametrize(("num_classes", "options"), [(CLASSES, {}), (1, {}), (CLASSES, {"conv_norm": "BN"})])
@pytest.mark.parametrize("counts", [(3, 0, 4), (0, 0)])
def test_masks_are_detectron2s(num_classes, options, counts):
    plain = head(num_classes, **options)
    ours = use_one_class_masks(copy.deepcopy(plain))
    assert type(ours) is OneClassMaskHead
    features = torch.randn(sum(counts), 8, 7, 6, dtype=torch.float64)
    for mask, expected in zip(masks(ours, features, *counts), masks(plain, features, *counts), strict=True):
        assert mask.shape == expected.shape
        torch.testing.assert_close(mask, expected, rtol=1e-12, atol=1e-12)
    ours.load_state_dict(plain.state_dict())


def test_no_other_class_is_computed(monkeypatch):
    ours = use_one_class_masks(head())
    monkeypatch.setattr(ours.predictor, "forward", None)
    assert masks(ours, torch.randn(3, 8, 7, 6, dtype=torch.float64), 3)


def test_gradients_of_the_features_are_detectron2s():
    plain = head()
    features = torch.randn(4, 8, 7, 6, dtype=torch.float64)
    grads = []
    for model in (plain, use_one_class_masks(copy.deepcopy(plain))):
        x = features.clone().requires_grad_(True)
        (instances,) = model(x, found(4))
        (grad,) = torch.autograd.grad(instances.pred_masks.square().sum(), x)
        grads.append(grad)
    torch.testing.assert_close(*grads, rtol=1e-10, atol=1e-12)


def _hook(model):
    model.predictor.register_forward_hook(lambda module, args, output: output + 1)


def _tanh(model):
    model.predictor.activation = nn.Tanh()


def _other_kernel(model):
    model.deconv = nn.ConvTranspose2d(8, 12, 4, stride=2, padding=1).double()


def _without_bias(model):
    model.predictor.bias = None


@pytest.mark.parametrize("change", [_hook, _tanh, _other_kernel, _without_bias])
def test_a_changed_head_is_detectron2s(change):
    plain = head()
    change(plain)
    ours = use_one_class_masks(copy.deepcopy(plain))
    features = torch.randn(3, 8, 7, 6, dtype=torch.float64)
    (mask,), (expected,) = masks(ours, features, 3), masks(plain, features, 3)
    assert torch.equal(mask, expected)


def test_training_is_detectron2s(monkeypatch):
    called = []
    monkeypatch.setattr(MaskRCNNConvUpsampleHead, "forward", lambda *args: called.append(args))
    use_one_class_masks(head()).train()(None, None)
    assert called


def test_a_subclass_keeps_its_own_masks():
    class Own(MaskRCNNConvUpsampleHead):
        pass

    model = head()
    model.__class__ = Own
    assert type(use_one_class_masks(nn.Sequential(model))[0]) is Own
