"""Input gradients and feature inversion, against the same computed from the detector's parts."""

import numpy as np
import pytest
import torch
from detectron2.modeling import build_model

from rt_detectron.detection import Predictor
from rt_detectron.detection.explain import find_feature, input_gradient, invert_features, matching_image
from rt_detectron.utils.errors import InputError


@pytest.fixture
def predict(make_cfg, tmp_path, monkeypatch):
    """``predict(detector, INPUT.FORMAT, arch, builder)``: a predictor with random weights."""

    def make(detector="fpn", input_format="RGB", arch="resnet18", builder=""):
        cfg = make_cfg(arch, detector)
        cfg.MODEL.BACKBONE.NAME = builder or cfg.MODEL.BACKBONE.NAME
        cfg.INPUT.MIN_SIZE_TEST = 48
        cfg.INPUT.FORMAT = input_format
        cfg.MODEL.MASK_ON = False
        cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = cfg.MODEL.RETINANET.SCORE_THRESH_TEST = 0.0
        cfg.TEST.DETECTIONS_PER_IMAGE = 4
        cfg.MODEL.WEIGHTS = str(tmp_path / "detector.pth")
        torch.manual_seed(0)
        model = build_model(cfg)
        if detector == "retinanet":
            model.head.cls_score.weight.data.normal_()  # else all scores are about the same
        torch.save({"model": model.state_dict()}, cfg.MODEL.WEIGHTS)
        return Predictor(cfg)

    return make


@pytest.fixture
def bgr(photograph):
    return np.ascontiguousarray(photograph.numpy().transpose(1, 2, 0)[:, :, ::-1])


def scores_at(model, image):
    """All scores (boxes, classes) that the detector's parts give for an image in [0, 1]."""
    images = model.preprocess_image([{"image": 255 * image}])
    features = model.backbone(images.tensor)
    if hasattr(model, "roi_heads"):
        with torch.no_grad():
            (proposals,), _ = model.proposal_generator(images, features)
        heads = model.roi_heads
        pooled = heads.box_pooler(
            [features[name] for name in heads.box_in_features], [proposals.proposal_boxes]
        )
        return heads.box_predictor(heads.box_head(pooled))[0].softmax(dim=1)[:, :-1]
    logits, _ = model.head([features[name] for name in model.head_in_features])
    classes = model.num_classes
    return torch.cat([t.permute(0, 2, 3, 1).reshape(-1, classes) for t in logits]).sigmoid()


@pytest.mark.parametrize(("detector", "input_format"), [("fpn", "RGB"), ("fpn", "BGR"), ("retinanet", "RGB")])
def test_the_gradient_is_that_of_the_scores(predict, bgr, detector, input_format):
    predictor = predict(detector, input_format)
    found, gradient = input_gradient(predictor, bgr, threshold=0.0)
    expected = predictor(bgr)
    assert len(found) == 4
    assert torch.equal(found.scores, expected.scores)
    assert torch.equal(found.pred_boxes.tensor, expected.pred_boxes.tensor)
    assert not any(p.grad is not None for p in predictor.model.parameters())

    image = (predictor.inputs(bgr)["image"] / 255).requires_grad_()
    scores = scores_at(predictor.model, image)[:, found.pred_classes]
    nearest = (scores - found.scores).abs().min(dim=0)
    assert nearest.values.max() < 1e-6  # each detection is one of them
    (independent,) = torch.autograd.grad(scores[nearest.indices, range(4)].log().sum(), image)
    if input_format == "BGR":
        independent = independent.flip(0)
    assert independent.abs().max() > 0
    torch.testing.assert_close(gradient, independent, rtol=1e-4, atol=1e-5 * independent.abs().max().item())
    if detector == "retinanet":  # without proposals, so nothing moves with the image: a difference quotient
        model, image = predictor.model.double(), image.detach().double()
        step = 1e-4 * gradient / gradient.norm()
        with torch.no_grad():
            up, down = (
                scores_at(model, image + move)[nearest.indices, found.pred_classes].log().sum()
                for move in (step, -step)
            )
        assert float(up - down) / 2e-4 == pytest.approx(float(gradient.norm()), rel=1e-2)


def test_only_what_scores_enough_counts(predict, bgr):
    predictor = predict()
    scores = predictor(bgr).scores
    whole, best, none = (
        input_gradient(predictor, bgr, threshold)[1] for threshold in (0.0, float(scores[0]), 1.0)
    )
    assert best.abs().max() > 0
    assert not torch.allclose(whole, best)
    assert not none.any()


# Of each kind of backbone: with an FPN, with ViTDet's pyramid, and alone.
KINDS = {
    "FPN": ("fpn", "resnet18", "", "res5"),
    "SFP": ("fpn", "timm/vit_tiny_patch16_224", "build_robust_timm_sfp_backbone", "res4"),
    "C4": ("c4", "resnet50", "", "res4"),
}


@pytest.mark.parametrize("kind", ["FPN", "SFP", pytest.param("C4", marks=pytest.mark.slow)])
def test_inversion_brings_the_features_nearer(predict, bgr, kind):
    detector, arch, builder, feature = KINDS[kind]
    if arch.startswith("timm/"):
        pytest.importorskip("timm")
    predictor = predict(detector, "BGR", arch, builder)
    found = invert_features(predictor, bgr, steps=5)
    assert found.feature == feature
    assert found.end < 0.9 * found.start
    # Both distances once more, from the detector's own call of its backbone.
    model, inputs = predictor.model, predictor.inputs(bgr)
    features = []
    trunk = getattr(model.backbone, "bottom_up", getattr(model.backbone, "net", model.backbone))
    trunk.register_forward_hook(lambda *args: features.append(args[-1][found.feature]))
    with torch.no_grad():
        for image in (inputs["image"], 255 * found.image.flip(0)):
            model([{**inputs, "image": image}])
    distance = (features[1] - features[0]).norm() / features[0].norm()
    assert found.end == pytest.approx(float(distance), rel=1e-3)
    assert found.image.min() >= 0
    assert found.image.max() <= 1


def test_a_linear_feature_is_matched_and_its_kernel_left_as_it_began():
    """What features do not see stays noise, and what they see is found."""
    original = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(1))

    def red(image):
        return image[:, :1]

    image, start, end = matching_image(red, original, steps=200, seed=3)
    assert start > 0.3
    assert end < 0.02
    torch.testing.assert_close(image[:, :1], original[:, :1], atol=0.05, rtol=0)
    noise = torch.rand(original.shape, generator=torch.Generator().manual_seed(3))
    assert torch.equal(image[:, 1:], noise[:, 1:])
    assert torch.equal(image, matching_image(red, original, steps=200, seed=3)[0])


def test_the_best_image_is_kept():
    """Steps that lead away from the features do not count."""
    calls = []

    def farther_each_time(image):
        calls.append(0)
        return image * len(calls) if len(calls) > 1 else image

    original = torch.full((1, 3, 4, 4), 0.5)
    _, start, end = matching_image(farther_each_time, original, steps=5)
    assert end <= start


def test_features_by_name(predict, bgr):
    predictor = predict()
    assert find_feature(predictor, None)[0] == "res5"
    assert invert_features(predictor, bgr, "p3", steps=1).feature == "p3"
    with pytest.raises(InputError, match=r"no feature 'p33'; it has res2, .*, p6; did you mean p3"):
        invert_features(predictor, bgr, "p33")
    with pytest.raises(InputError, match="at least one step, not 0"):
        invert_features(predictor, bgr, steps=0)
