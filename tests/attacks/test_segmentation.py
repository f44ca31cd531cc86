"""Attacks on segmentation and keypoints, against plain loops over losses written from their definitions."""

import math

import pytest
import torch
import torch.nn.functional as F
from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone, build_model
from detectron2.projects.deeplab import add_deeplab_config
from detectron2.structures import Keypoints
from detectron2.utils.events import EventStorage
from small_detectors import ThreeConvolutions

from rt_detectron.attacks import APGD, PGD, ThreatModel, build_detector_attack
from rt_detectron.attacks.detection import image_seed
from rt_detectron.attacks.segmentation import jensen_shannon
from rt_detectron.utils.errors import InputError

BALL = ThreatModel("linf", 4.0)
PIXELS = (900, 300, 50)  # of the three classes in a data set


@BACKBONE_REGISTRY.register()
class TwoScales(Backbone):
    """What DeepLabV3+ needs: maps of strides 4 and 8."""

    def __init__(self, cfg, input_shape):
        super().__init__()
        self.fine = ThreeConvolutions(cfg, input_shape)
        self.coarse = torch.nn.Conv2d(32, 32, 3, 2, 1)

    def forward(self, x):
        fine = self.fine(x)["p2"]
        return {"res2": fine, "res5": self.coarse(fine)}

    def output_shape(self):
        return {"res2": ShapeSpec(channels=32, stride=4), "res5": ShapeSpec(channels=32, stride=8)}


@pytest.fixture(scope="module")
def models():
    """Untrained models in eval mode, by kind."""

    def build(kind):
        cfg = get_cfg()
        cfg.MODEL.DEVICE, cfg.MODEL.WEIGHTS = "cpu", ""
        cfg.MODEL.BACKBONE.NAME = "ThreeConvolutions"
        cfg.MODEL.PIXEL_STD = [60.0, 60.0, 60.0]
        cfg.MODEL.META_ARCHITECTURE = "SemanticSegmentor"
        cfg.MODEL.SEM_SEG_HEAD.update(NUM_CLASSES=3, IN_FEATURES=["p2"], CONVS_DIM=8, NORM="")
        if kind == "deeplab":
            add_deeplab_config(cfg)
            cfg.MODEL.BACKBONE.NAME = "TwoScales"
            head = {"IN_FEATURES": ["res2", "res5"], "PROJECT_CHANNELS": [8], "ASPP_CHANNELS": 8}
            cfg.MODEL.SEM_SEG_HEAD.update(
                head, NAME="DeepLabV3PlusHead", NUM_CLASSES=3, CONVS_DIM=8, NORM="", COMMON_STRIDE=4
            )
        elif kind != "semantic":
            cfg.MODEL.META_ARCHITECTURE = {"panoptic": "PanopticFPN"}.get(kind, "GeneralizedRCNN")
            cfg.MODEL.RPN.update(IN_FEATURES=["p2"], HEAD_NAME="StandardRPNHead", POST_NMS_TOPK_TRAIN=20)
            cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[16, 32]]
            cfg.MODEL.ROI_HEADS.update(NAME="StandardROIHeads", IN_FEATURES=["p2"], NUM_CLASSES=3)
            cfg.MODEL.ROI_BOX_HEAD.update(NAME="FastRCNNConvFCHead", NUM_FC=1, FC_DIM=16, POOLER_RESOLUTION=4)
            cfg.MODEL.ROI_KEYPOINT_HEAD.update(NUM_KEYPOINTS=2, CONV_DIMS=[8])
            cfg.MODEL.KEYPOINT_ON = kind == "keypoint"
        torch.manual_seed(0)
        model = build_model(cfg).eval()
        for name, parameter in model.named_parameters():  # logits that differ, so that some are right
            if "predictor" in name and parameter.dim() > 1:
                parameter.data.normal_(0, 0.3)
        return model

    return {kind: build(kind) for kind in ("semantic", "deeplab", "panoptic", "keypoint")}


@pytest.fixture
def given(photograph, annotated):
    """A picture whose sides are no multiples of a stride, and labels; the first rows have none."""
    picture = annotated(photograph[:, :62, :78], 7)
    points = torch.tensor([[[20.0, 30.0, 2.0], [12.0, 12.0, 2.0]], [[40.0, 30.0, 2.0], [50.0, 40.0, 2.0]]])
    picture["instances"].gt_keypoints = Keypoints(points)
    labels = torch.zeros(62, 78, dtype=torch.long)
    labels[8:56, 8:40], labels[16:48, 30:60], labels[:4] = 1, 2, 255
    return {**picture, "sem_seg": labels}


def masked_cross_entropy(logits, labels, weights=(1.0, 1.0, 1.0)):
    """From the definition."""
    labelled = labels != 255
    right = labelled & (logits.argmax(0) == labels)
    true = logits.softmax(0).gather(0, labels.where(labelled, 0)[None])[0]
    return -(torch.tensor(weights)[labels[right]] * true[right].log()).sum() / labelled.sum()


def divergence(logits, labels):
    probabilities = logits.softmax(0)[:, labels != 255]
    truth = F.one_hot(labels[labels != 255], 3).T.float()
    middle = (probabilities + truth) / 2
    to_truth = truth * (truth.clamp_min(1e-30) / middle).log()
    return ((probabilities * (probabilities / middle).log() + to_truth).sum(0) / 2).mean()


INVERSE = [sum(PIXELS) / count / 3 for count in PIXELS]
REFERENCES = {
    "JS": divergence,
    "MCE": masked_cross_entropy,
    "MCE_Bal": lambda logits, labels: masked_cross_entropy(logits, labels, INVERSE),
}


@pytest.mark.parametrize(
    ("kind", "loss"),
    [
        ("semantic", "JS"),
        ("semantic", "MCE"),
        ("semantic", "MCE_Bal"),
        ("deeplab", "JS"),
        ("panoptic", "MCE"),
    ],
)
def test_the_three_losses_equal_a_plain_loop(models, given, kind, loss):
    model = models[kind]
    original = given["image"].float()
    height, width = given["sem_seg"].shape
    x = original.clone()
    for _ in range(2):
        x.requires_grad_(True)
        batch = ((x - model.pixel_mean) / model.pixel_std)[None]
        logits = model.sem_seg_head(model.backbone(batch))[0][0, :, :height, :width]
        (g,) = torch.autograd.grad(REFERENCES[loss](logits, given["sem_seg"]), x)
        x = x.detach() + 255 * 2.5 * BALL.radius / 2 * g.sign()
        x = original + (x - original).clamp(-255 * BALL.radius, 255 * BALL.radius)
        x = x.clamp(0, 255)
    options = {"pixel_counts": PIXELS} if loss == "MCE_Bal" else {}
    (found,) = build_detector_attack(loss, PGD(BALL, steps=2), **options)(model, [given])
    # The sign of a gradient that is zero but for rounding is anyone's.
    assert ((found["image"] - x).abs() < 1e-2).float().mean() > 0.99
    assert found["objective"][0] < found["objective"][1]
    with torch.no_grad():
        batch = ((original - model.pixel_mean) / model.pixel_std)[None]
        logits = model.sem_seg_head(model.backbone(batch))[0][0, :, :height, :width]
    assert found["objective"][0] == pytest.approx(float(divergence(logits, given["sem_seg"])), rel=1e-4)


@pytest.mark.parametrize(
    ("kind", "loss", "term"),
    [("semantic", "all", "loss"), ("panoptic", "all", "loss"), ("keypoint", "keypoint", "loss_keypoint")],
)
def test_training_losses_equal_a_plain_loop(models, given, kind, loss, term):
    model = models[kind]
    given = {**given, "image": given["image"][:, :60, :76], "sem_seg": given["sem_seg"][:60, :76]}
    given["instances"]._image_size = (60, 76)
    given["instances"].remove("gt_masks")
    model.roi_heads = getattr(model, "roi_heads", None)
    if kind == "panoptic":
        model.roi_heads.mask_on = False
    x = given["image"].float().clone().requires_grad_(True)
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
    with EventStorage(), torch.random.fork_rng():
        torch.manual_seed(image_seed(0, given))
        losses = model([{**given, "image": x}])
    model.eval()
    chosen = [value for name, value in losses.items() if term in name]
    assert any("sem_seg" in name or "keypoint" in name for name in losses)
    (g,) = torch.autograd.grad(sum(chosen), x)
    expected = (x.detach() + 4 * g.sign()).clamp(0, 255)
    (found,) = build_detector_attack(loss, PGD(BALL, 1, relative_step_size=1.0))(model, [given])
    assert ((found["image"] - expected).abs() < 1e-2).float().mean() > 0.99
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_the_divergence_is_between_0_and_ln_2():
    logits = torch.tensor([[200.0, -200.0], [-200.0, 200.0], [0.0, 0.0]], requires_grad=True)
    found = jensen_shannon(logits, torch.tensor([0, 0, 0]))
    torch.testing.assert_close(found[:2], torch.tensor([0.0, math.log(2)]))
    found.sum().backward()
    assert torch.isfinite(logits.grad).all()


def test_the_strongest_iterate_is_kept(models, given):
    """Where the masked loss falls since the attack succeeds."""
    model = models["semantic"]
    ball = ThreatModel("linf", 16.0)
    (last,) = build_detector_attack("MCE", PGD(ball, 2))(model, [given])
    (best,) = build_detector_attack("MCE", APGD(ball, 5))(model, [given])
    assert best["objective"][1] > last["objective"][1]


def test_mistakes_are_one_line(models, given):
    pgd = PGD(BALL, 1)
    without = {key: value for key, value in given.items() if key not in ("sem_seg", "instances")}
    with pytest.raises(InputError, match="no semantic segmentation, which the model's loss needs"):
        build_detector_attack("JS", pgd)(models["semantic"], [without])
    with pytest.raises(InputError, match="JS is for semantic segmentation, and this model has none"):
        build_detector_attack("JS", pgd)(models["keypoint"], [given])
    with pytest.raises(InputError, match="got the pixels of 2 classes; the model has 3"):
        build_detector_attack("MCE_Bal", pgd, pixel_counts=(1, 1))(models["semantic"], [given])
    with pytest.raises(InputError, match="padding of a SemanticSegmentor stays as it is"):
        build_detector_attack("JS", pgd, padding=True)(models["semantic"], [given])
    with pytest.raises(InputError, match="no classes that could vanish"):
        build_detector_attack("vanishing", pgd)(models["semantic"], [given])
