"""Attacks on detectors, against a plain loop over Detectron2's own training losses."""

import zlib

import pytest
import torch
from detectron2.data import DatasetCatalog
from detectron2.modeling.roi_heads.fast_rcnn import FastRCNNOutputLayers
from detectron2.utils.events import EventStorage

from rt_detectron.attacks import APGD, PGD, RandomNoise, ThreatModel, build_detector_attack
from rt_detectron.attacks.detection import DETECTOR_ATTACKS
from rt_detectron.detection.steps import fast
from rt_detectron.evaluation.robustness.test_set import annotated_test_mapper
from rt_detectron.utils.errors import InputError

BALLS = [ThreatModel("l2", 1.0), ThreatModel("linf", 4.0)]


def training_losses(model, image, given, seed=0):
    """Detectron2's own losses of one image (C, H, W) in 0..255, with the sampling that the attack has."""
    vars(model).pop("loss_normalizer", None)
    model.train()
    with EventStorage(), torch.random.fork_rng():
        torch.manual_seed(zlib.crc32(f"{seed}/{given['image_id']}".encode()))
        losses = model([{**given, "image": image}])
    vars(model).pop("loss_normalizer", None)
    model.eval()
    return losses


def plain_loop(model, given, ball, steps, chosen):
    """PGD on one image in 0..255, written from the definition: the reference."""
    original = given["image"].float()
    radius, step_size = 255 * ball.radius, 255 * 2.5 * ball.radius / steps
    x = original.clone()
    for _ in range(steps):
        x.requires_grad_(True)
        losses = training_losses(model, x, given)
        (g,) = torch.autograd.grad(sum(v for k, v in losses.items() if chosen(k)), x)
        with torch.no_grad():
            x = x + (step_size * g / g.norm() if ball.norm == "l2" else step_size * g.sign())
            delta = x - original
            if ball.norm == "l2":
                delta = delta * (radius / delta.norm()).clamp(max=1)
            else:
                delta = delta.clamp(-radius, radius)
            x = (original + delta).clamp(0, 255)
    return x


@pytest.mark.parametrize(
    ("kind", "loss", "chosen"),
    [
        ("fpn", "all", lambda name: True),
        ("fpn", "classification", lambda name: "cls" in name),
        ("cascade", "localization", lambda name: "box_reg" in name or "rpn_loc" in name),
        ("c4", "all", lambda name: True),
        ("retinanet", "all", lambda name: True),
        ("retinanet", "localization", lambda name: "box_reg" in name),
    ],
)
def test_equals_the_plain_loop(make_detector, picture, kind, loss, chosen):
    model = make_detector(kind)
    ball = BALLS[0]
    expected = plain_loop(model, picture, ball, 2, chosen)
    (found,) = build_detector_attack(loss, PGD(ball, steps=2))(model, [picture])
    assert (expected - picture["image"]).norm() == pytest.approx(255, rel=0.01)
    # A ReLU or a maximum that is a tie but for rounding sends its gradient elsewhere.
    assert (found["image"] - expected).norm() < 0.03 * 255


def test_the_mask_loss_and_linf_equal_the_plain_loop(make_detector, picture):
    model = make_detector("fpn")
    expected = plain_loop(model, picture, BALLS[1], 2, lambda name: name == "loss_mask")
    (found,) = build_detector_attack("mask", PGD(BALLS[1], steps=2))(model, [picture])
    # The sign of a gradient that is zero but for rounding is anyone's.
    assert ((found["image"] - expected).abs() < 1e-2).float().mean() > 0.99
    assert (found["image"] - picture["image"]).abs().max() == pytest.approx(4, abs=1e-3)


@pytest.mark.parametrize("kind", ["fpn", "retinanet"])
def test_vanishing_is_training_towards_no_object_on_all_proposals(make_detector, picture, kind):
    model = make_detector(kind)
    nothing = {**picture, "instances": picture["instances"][:0]}
    if kind == "fpn":
        model.roi_heads.batch_size_per_image = 1000
    ball = ThreatModel("l2", 0.5)
    x = picture["image"].float().requires_grad_(True)
    losses = training_losses(model, x, nothing)
    (g,) = torch.autograd.grad(losses["loss_cls"], x)
    expected = (x - 0.5 * 255 * g / g.norm()).clamp(0, 255).detach()
    if kind == "fpn":
        model.roi_heads.batch_size_per_image = 8
    attack = build_detector_attack("vanishing", PGD(ball, steps=1, relative_step_size=1.0))
    (found,) = attack(model, [picture])
    assert (found["image"] - expected).norm() < 1e-2 * 128
    if kind == "fpn":
        assert model.roi_heads.batch_size_per_image == 8
    assert found["instances"] is picture["instances"]


@pytest.mark.parametrize("kind", ["fpn", "retinanet"])
def test_a_batch_is_as_one_by_one(make_detector, photograph, annotated, kind):
    model = make_detector(kind)
    inputs = [annotated(photograph[:, :64, :96], 1), annotated(photograph[:, 32:, 32:], 2, objects=1)]
    attack = build_detector_attack("all", PGD(BALLS[0], steps=2))
    together = attack(model, inputs)
    for given, found in zip(inputs, together, strict=True):
        (alone,) = attack(model, [given])
        assert (found["image"] - alone["image"]).norm() < 0.02 * 255


@pytest.mark.parametrize(("kind", "stages"), [("fpn", 1), ("cascade", 3), ("c4", 1)])
def test_the_heads_see_a_batch_once_and_give_the_losses_of_each_image(
    make_detector, photograph, annotated, monkeypatch, kind, stages
):
    model = fast(make_detector(kind))  # as the tools have it
    inputs = [annotated(photograph[:, :64, :64], 1), annotated(photograph[:, 32:, 64:], 2, objects=1)]
    attack, calls = build_detector_attack("all", PGD(BALLS[0], steps=1)), []
    for module in model.roi_heads.modules():
        if isinstance(module, FastRCNNOutputLayers):
            module.register_forward_hook(lambda *_: calls.append(1))
    together = attack.value(model, inputs)
    assert len(calls) == stages
    alone = [attack.value(model, [each])[0] for each in inputs]
    assert together == pytest.approx(alone, rel=1e-4)
    monkeypatch.setattr("rt_detectron.attacks.losses.takes_batches", lambda model: False)
    calls.clear()
    assert attack.value(model, inputs) == pytest.approx(together, rel=1e-4)
    assert len(calls) == 2 * stages
    assert abs(together[0] - together[1]) > 1e-3 * together[0]


def test_mixed_precision_raises_the_loss_too(make_detector, picture):
    model = make_detector("fpn")
    attack = build_detector_attack("A_cls", PGD(BALLS[1], steps=1), amp=True)
    (found,) = attack(model, [picture])
    before, after = found["objective"]
    assert after > before
    assert found["image"].dtype == torch.float32
    assert attack.settings["amp"] is True


@pytest.mark.parametrize("kind", [PGD, APGD])
def test_the_steps_of_an_attack_do_not_wait_for_the_device(kind):
    """A tensor of the meta device has no values to wait for: .item(), if and boolean indices would raise."""
    images = torch.empty(2, 3, 8, 8, device="meta")
    pgd = kind(BALLS[1], steps=5, random_start=True, restarts=2, best=True)

    def objective(batches):
        return [(x.square().sum((1, 2, 3)), x.sum((1, 2, 3)) > 0) for x in batches]

    (found,) = pgd.maximize(objective, [images])
    assert found.shape == images.shape


@pytest.mark.parametrize("ball", BALLS, ids=lambda ball: ball.norm)
@pytest.mark.parametrize("kind", ["fpn", "retinanet"])
def test_each_image_has_its_own_ball_and_padding_stays_zero(make_detector, photograph, annotated, ball, kind):
    model = make_detector(kind)
    inputs = [annotated(photograph, 1), annotated(photograph[:, :60, :70].flip(2), 2)]
    seen = []
    model.backbone.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().clone()))
    attack = build_detector_attack("all", PGD(ball, steps=2, random_start=True, restarts=2))
    found = attack(model, inputs)
    # No pass more than the steps, one to compare the restarts, and the objective before and after.
    assert len(seen) == 2 * (2 + 1) + 2 == attack.passes["forward"]
    assert attack.passes["backward"] == 4
    assert all(torch.equal(batch[1, :, 60:], torch.zeros_like(batch[1, :, 60:])) for batch in seen)
    assert all(torch.equal(batch[1, :, :, 70:], torch.zeros_like(batch[1, :, :, 70:])) for batch in seen)
    for given, result in zip(inputs, found, strict=True):
        image, original = result["image"], given["image"].float()
        assert image.shape == original.shape
        assert image.min() >= 0
        assert image.max() <= 255
        delta = (image - original) / 255
        size = delta.norm() if ball.norm == "l2" else delta.abs().max()
        assert 0.5 * ball.radius < size <= ball.radius * (1 + 1e-4)
        assert not image.requires_grad


def test_restarts_keep_the_largest_loss(make_detector, picture):
    model = make_detector("fpn")
    once, thrice = (
        build_detector_attack("all", PGD(ThreatModel("l2", 0.3), 1, random_start=True, restarts=restarts))
        for restarts in (1, 3)
    )
    better = []
    for image_id in range(3):
        given = {**picture, "image_id": image_id}
        losses = [
            sum(training_losses(model, attack(model, [given])[0]["image"], given).values()).item()
            for attack in (once, thrice)
        ]
        assert losses[1] >= losses[0] - 1e-4
        better.append(losses[1] > losses[0] + 1e-4)
    assert any(better)


def state_of(model):
    return {
        "tensors": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "modes": [module.training for module in model.modules()],
        "trainable": [parameter.requires_grad for parameter in model.parameters()],
        "grads": [parameter.grad for parameter in model.parameters()],
        "normalizer": vars(model).get("loss_normalizer"),
        "random": torch.get_rng_state(),
    }


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("kind", ["fpn", "retinanet"])
def test_leaves_no_trace(make_detector, picture, monkeypatch, kind, fails):
    model = make_detector(kind, NORM="BN").train()
    model.backbone.bottom_up.stem.eval()
    model.backbone.bottom_up.stem.conv1.weight.requires_grad_(False)
    model.loss_normalizer = 42.0
    before = state_of(model)
    attack = build_detector_attack("all", PGD(BALLS[0], steps=2, random_start=True))
    if fails:
        monkeypatch.setattr(ThreatModel, "step", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            attack(model, [picture])
    else:
        attack(model, [picture])
    after = state_of(model)
    assert all(torch.equal(tensor, after["tensors"][name]) for name, tensor in before["tensors"].items())
    assert torch.equal(before["random"], after["random"])
    for key in ("modes", "trainable", "grads", "normalizer"):
        assert before[key] == after[key]


def test_it_is_the_detector_of_eval_mode_that_is_attacked(make_detector, picture):
    model = make_detector("fpn", NORM="BN")
    attack = build_detector_attack("all", PGD(BALLS[0], steps=1))
    (expected,) = attack(model, [picture])
    (found,) = attack(model.train(), [picture])
    assert torch.equal(found["image"], expected["image"])


def test_works_where_gradients_are_switched_off_and_again(make_detector, picture):
    model = make_detector("fpn")
    attack = build_detector_attack("all", PGD(BALLS[0], steps=1, random_start=True), seed=3)
    (first,) = attack(model, [picture])
    with torch.no_grad():
        (again,) = attack(model, [{**picture, "image": picture["image"].float()}])
    assert torch.equal(first["image"], again["image"])
    (other,) = build_detector_attack("all", attack.pgd, seed=4)(model, [picture])
    assert not torch.equal(first["image"], other["image"])


@pytest.mark.parametrize("loss", DETECTOR_ATTACKS)
@pytest.mark.parametrize("kind", ["fpn", "cascade", "retinanet"])
def test_an_image_without_objects(make_detector, photograph, annotated, kind, loss):
    needed = DETECTOR_ATTACKS[loss].task
    if needed in ("sem_seg", "keypoints") or (kind == "retinanet" and loss in ("mask", "A_cwa", "DAG")):
        pytest.skip("it has no such head")
    model = make_detector(kind)
    given = annotated(photograph[:, :64, :64], 1, objects=0)
    options = {"object_counts": (1, 1, 1)} if DETECTOR_ATTACKS[loss].needs_object_counts else {}
    attack = build_detector_attack(loss, PGD(BALLS[0], steps=1, relative_step_size=1.0), **options)
    (found,) = attack(model, [given])
    moved = (found["image"] - given["image"]).norm()
    assert torch.isfinite(found["image"]).all()
    if loss in ("mask", "localization", "A_reg", "DAG"):  # which such an image does not have
        assert moved < 1e-2
    else:
        assert moved > 100


@pytest.mark.parametrize("ball", BALLS, ids=lambda ball: ball.norm)
def test_noise_is_as_large_as_the_ball(make_detector, ball):
    model = make_detector("fpn")
    given = {"image": torch.full((3, 40, 50), 128, dtype=torch.uint8), "image_id": 1}
    before = torch.get_rng_state()
    first, second = RandomNoise(ball)(model, [given, {**given, "image_id": 2}])
    assert torch.equal(torch.get_rng_state(), before)
    delta = (first["image"] - 128) / 255
    size = delta.norm() if ball.norm == "l2" else delta.abs().max()
    assert size == pytest.approx(ball.radius, rel=1e-4)
    assert not torch.equal(first["image"], second["image"])
    assert torch.equal(RandomNoise(ball)(model, [given])[0]["image"], first["image"])
    assert abs(delta.mean()) < 0.1 * delta.std()


def detections(model, inputs):
    with torch.no_grad():
        return sum(int((each["instances"].scores > 0.05).sum()) for each in model(inputs))


def test_vanishing_leaves_fewest_detections(learned, tiny_pictures):
    _, model = learned
    ball = ThreatModel("l2", 8.0)
    vanished, misled, noisy = (
        detections(model, change(model, tiny_pictures))
        for change in (
            build_detector_attack("vanishing", PGD(ball, steps=30)),
            build_detector_attack("all", PGD(ball, steps=10)),
            RandomNoise(ball),
        )
    )
    assert vanished < 0.2 * min(misled, noisy)


@pytest.fixture
def tiny_pictures(learned):
    cfg, _ = learned
    mapper = annotated_test_mapper(cfg)
    return [mapper(image) for image in DatasetCatalog.get(cfg.DATASETS.TEST[0])[:3]]


class TestMistakes:
    def test_an_unknown_loss(self):
        with pytest.raises(InputError, match="loss 'boxes' is unknown; use one of classification, "):
            build_detector_attack("boxes", PGD(BALLS[0], steps=1))

    def test_a_loss_that_the_detector_has_not(self, make_detector, picture):
        with pytest.raises(InputError, match="no mask loss; it has loss_cls, loss_box_reg"):
            build_detector_attack("mask", PGD(BALLS[0], steps=1))(make_detector("retinanet"), [picture])

    def test_no_ground_truth(self, make_detector, picture):
        del picture["instances"]
        with pytest.raises(InputError, match="has no annotations"):
            build_detector_attack("all", PGD(BALLS[0], steps=1))(make_detector("fpn"), [picture])

    @pytest.mark.parametrize(
        "change", [lambda x: x / 255, lambda x: (x - 120) / 58, lambda x: x * 2, lambda x: x * float("nan")]
    )
    def test_images_that_are_not_in_0_to_255(self, make_detector, picture, change):
        model, given = make_detector("fpn"), {**picture, "image": change(picture["image"].float())}
        for attack in (build_detector_attack("all", PGD(BALLS[0], steps=1)), RandomNoise(BALLS[0])):
            with pytest.raises(InputError, match=r"image 7 has values from .* is in 0..255, before"):
                attack(model, [given])

    def test_a_black_image_is_fine(self, make_detector):
        black = {"image": torch.zeros(3, 32, 32), "image_id": 1}
        assert RandomNoise(BALLS[0])(make_detector("fpn"), [black])[0]["image"].max() > 0

    @pytest.mark.parametrize("ball", [ThreatModel("l2", 0.02), ThreatModel("linf", 1.0)])
    def test_a_black_image_that_was_attacked_is_not_taken_for_one_in_0_to_1(
        self, make_detector, picture, ball
    ):
        black = {**picture, "image": torch.zeros_like(picture["image"])}
        for name in ("A_cls", "MTD"):
            (found,) = build_detector_attack(name, PGD(ball, steps=2))(make_detector("fpn"), [black])
            assert 0 < found["image"].max() <= 1

    def test_a_network_of_another_kind(self, picture):
        with pytest.raises(InputError, match="Identity is no GeneralizedRCNN"):
            build_detector_attack("all", PGD(BALLS[0], steps=1))(torch.nn.Identity(), [picture])
