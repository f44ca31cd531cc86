import pytest
import torch
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from small_detectors import SMALL
from torch import nn

from rt_detectron.attacks import ThreatModel
from rt_detectron.detection.adversarial import AdversarialTraining, AttackedBatches, FreeReplays
from rt_detectron.utils.errors import InputError

MODELS = [ThreatModel("l2", 0.5), ThreatModel("linf", 8)]


class Squares(nn.Module):
    """Preprocesses and pads as a detector; its loss has a known gradient."""

    def __init__(self):
        super().__init__()
        self.target = nn.Parameter(torch.tensor(0.3))
        self.seen = []

    def forward(self, batch):
        self.seen.append([inputs["image"].detach().clone() for inputs in batch])
        return sum(((inputs["image"] / 255 - self.target) ** 2).sum() for inputs in batch)


def batches(count):
    generator = torch.Generator().manual_seed(0)
    sizes = [(5, 7), (6, 4)]
    return [
        [
            {
                "image": torch.randint(0, 256, (3, *size), generator=generator, dtype=torch.uint8),
                "image_id": (i, size),
            }
            for size in sizes
        ]
        for i in range(count)
    ]


def step(model, batch, rate=0.01):
    model.zero_grad()
    loss = model(batch)
    loss.backward()
    with torch.no_grad():
        model.target -= rate * model.target.grad


@pytest.mark.parametrize("threat_model", MODELS, ids=lambda model: model.norm)
def test_it_is_algorithm_1_written_out(threat_model):
    data = batches(2)
    ours, plain = Squares(), Squares()
    for batch in FreeReplays(data, threat_model, replays=3):
        step(ours, batch)
    radius = threat_model.radius
    for batch in data:
        deltas = [torch.zeros(inputs["image"].shape) for inputs in batch]
        for _ in range(3):
            images = [
                (inputs["image"] / 255 + delta).clamp(0, 1).requires_grad_(True)
                for inputs, delta in zip(batch, deltas, strict=True)
            ]
            step(plain, [{"image": 255 * image} for image in images])
            for i, image in enumerate(images):
                grad = image.grad
                if threat_model.norm == "linf":
                    deltas[i] = (deltas[i] + radius * grad.sign()).clamp(-radius, radius)
                else:
                    moved = deltas[i] + radius * grad / grad.norm()
                    deltas[i] = moved * (radius / moved.norm()).clamp(max=1)
    assert len(ours.seen) == len(plain.seen) == 6
    for found, expected in zip(ours.seen, plain.seen, strict=True):
        for image, reference in zip(found, expected, strict=True):
            torch.testing.assert_close(image, reference, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(ours.target, plain.target)


@pytest.mark.parametrize("threat_model", MODELS, ids=lambda model: model.norm)
def test_images_stay_in_the_ball_and_in_range_and_the_first_is_clean(threat_model):
    model, data = Squares(), batches(1)
    for batch in FreeReplays(data, threat_model, replays=4):
        assert [inputs["image_id"] for inputs in batch] == [inputs["image_id"] for inputs in data[0]]
        step(model, batch)
    for replay, images in enumerate(model.seen):
        for image, inputs in zip(images, data[0], strict=True):
            moved = (image - inputs["image"]) / 255
            norm = moved.norm() if threat_model.norm == "l2" else moved.abs().max()
            assert (norm == 0) if replay == 0 else (0 < norm <= threat_model.radius * 1.0001)
            assert image.min() >= 0
            assert image.max() <= 255
            assert inputs["image"].dtype == torch.uint8


def test_a_detector_gives_gradients_and_its_loss_rises(make_cfg, photograph):
    torch.manual_seed(0)
    cfg = make_cfg("resnet18", "retinanet")
    model = build_model(cfg)
    instances = Instances((96, 128))
    instances.gt_boxes = Boxes(torch.tensor([[10.0, 10.0, 60.0, 80.0]]))
    instances.gt_classes = torch.tensor([1])
    losses = []
    loader = FreeReplays([[{"image": photograph, "instances": instances}]], ThreatModel("linf", 8), 2)
    for batch in loader:
        with EventStorage():
            loss = sum(model(batch).values())
        loss.backward()
        losses.append(loss.item())
    assert losses[1] > losses[0]


class TwoLosses(Squares):
    """A second loss pulls the other way, and is larger."""

    def forward(self, batch):
        return {"loss_cls": super().forward(batch), "loss_rpn": -3 * super().forward(batch)}


def test_the_perturbation_follows_the_chosen_losses_and_the_weights_all():
    model, (batch,) = TwoLosses(), batches(1)
    settings = AdversarialTraining(replays=2, norm="linf", eps=8.0, loss="A_cls")
    (_, both), (_, chosen) = (
        (each.loss, list(_moves(TwoLosses(), batch, each)))
        for each in (AdversarialTraining(replays=2, norm="linf", eps=8.0), settings)
    )
    for one, other, inputs in zip(both, chosen, batch, strict=True):
        inside = ((inputs["image"] > 8) & (inputs["image"] < 247)).float()
        torch.testing.assert_close(one * inside, -other * inside, atol=1e-3, rtol=0)
        assert (one * inside).abs().max() > 7
    for moved in settings.batches([batch], model, max_iter=2):
        sum(model(moved).values()).backward()
        expected = -2 * sum((x["image"].detach() / 255 - 0.3).sum() for x in moved) * (1 - 3)
        torch.testing.assert_close(model.target.grad, expected)
        model.zero_grad()


def _moves(model, batch, settings):
    """By how much each image has moved in the second step on it."""
    for moved in settings.batches([batch], model, max_iter=2):
        sum(model(moved).values()).backward()
    return [found["image"].detach() - inputs["image"] for found, inputs in zip(moved, batch, strict=True)]


@pytest.mark.parametrize("threat_model", MODELS, ids=lambda model: model.norm)
def test_the_next_batch_begins_where_the_last_one_ended(threat_model):
    model, data = Squares(), batches(2)
    data[1].reverse()  # so that the images in a place differ in size
    loader = FreeReplays(data, threat_model, replays=2, carry_over=True)
    for number, batch in enumerate(loader):
        step(model, batch)
        if number == 1:
            left = loader.state_of_process()["moved_images"]
    for first, inputs, moved in zip(model.seen[2], data[1], left, strict=True):
        resized = nn.functional.interpolate(moved[None], first.shape[1:], mode="nearest")[0]
        norm = resized.norm() if threat_model.norm == "l2" else resized.abs().max()
        resized = resized * (threat_model.radius / norm).clamp(max=1)
        torch.testing.assert_close(first, (inputs["image"] + 255 * resized).clamp(0, 255))
        assert (first != inputs["image"]).any()


def test_the_attack_comes_late_and_grows():
    settings = AdversarialTraining(replays=2, norm="linf", eps=8.0, clean=0.25, warmup=0.5, carry_over=True)
    model, data = Squares(), batches(4)
    for batch in settings.batches(data, model, max_iter=8):
        step(model, batch, rate=0)
    largest = [
        max((image - inputs["image"]).abs().max() for image, inputs in zip(seen, data[i // 2], strict=True))
        for i, seen in enumerate(model.seen)
    ]
    assert [float(x) for x in largest] == pytest.approx([0, 0, 0, 2, 4, 6, 8, 8], abs=1e-3)


@pytest.fixture(scope="module")
def two_images(photograph):
    instances = Instances((32, 48))
    instances.gt_boxes = Boxes(torch.tensor([[5.0, 5.0, 30.0, 30.0]]))
    instances.gt_classes = torch.tensor([1])
    images = [photograph[:, :32, :48], photograph[:, 40:72, 50:98]]
    return [{"image": x, "instances": instances, "image_id": i} for i, x in enumerate(images)]


@pytest.fixture
def small_detector(make_cfg):
    torch.manual_seed(0)
    cfg = make_cfg("resnet18")
    cfg.merge_from_list([part for pair in SMALL.items() for part in pair])
    cfg.MODEL.MASK_ON = False
    cfg.MODEL.RPN.POST_NMS_TOPK_TRAIN = 20
    return build_model(cfg).train()


@pytest.mark.parametrize("loss", ["A_box", "MTD"])
def test_pgd_raises_the_loss_and_does_not_depend_on_the_batch(small_detector, two_images, loss):
    settings = AdversarialTraining(steps=2, norm="linf", eps=8.0, loss=loss)
    data = [two_images, two_images[1:], two_images]
    whole, _, again = settings.batches(data, small_detector, max_iter=10**6)
    assert all(module.training for module in small_detector.modules() if list(module.children()))
    assert all(parameter.grad is None for parameter in small_detector.parameters())
    box = AdversarialTraining(steps=1, loss="A_box").attack
    before, after = box.value(small_detector, two_images), box.value(small_detector, whole)
    assert all(last > first for first, last in zip(before, after, strict=True))
    assert not torch.equal(whole[0]["image"], again[0]["image"])  # each iteration begins elsewhere
    loader = AttackedBatches([two_images[1:]], small_detector, settings.attack)
    (alone,) = loader
    torch.testing.assert_close(alone[0]["image"], whole[1]["image"], atol=1e-3, rtol=0)
    for moved, inputs in zip(whole, two_images, strict=True):
        assert 7 < (moved["image"] - inputs["image"]).abs().max() <= 8.001


def test_pgd_on_clean_batches_is_none(small_detector, two_images):
    settings = AdversarialTraining(steps=2, norm="linf", eps=8.0, clean=0.5)
    first, second = settings.batches([two_images, two_images], small_detector, max_iter=2)
    assert first is two_images
    assert second[0]["image"].dtype == torch.float32


def test_without_either_the_loader_is_itself():
    loader = batches(1)
    assert AdversarialTraining().batches(loader, Squares(), 1) is loader


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"norm": "l1"}, "NORM is 'l1'; it must be l2 or linf"),
        ({"REPLAYS": -1}, "REPLAYS is -1; it must be a whole number >= 0"),
        ({"replays": 2, "steps": 1}, "two methods: set one of them to 0"),
        ({"replays": 2, "loss": "MTD"}, "LOSS MTD is for STEPS; with REPLAYS take one of all"),
        ({"replays": 2, "step_size": 1.0}, "leave STEP_SIZE at 0"),
        ({"steps": 2, "loss": "A_cwa"}, "A_cwa is for evaluation"),
        ({"steps": 2, "loss": "A_clf"}, "'A_clf' is unknown"),
        ({"steps": 2, "carry_over": True}, "are for REPLAYS"),
        ({"steps": 2, "start": "noise"}, "START is 'noise'"),
        ({"steps": 2, "loss": "MCE_Bal"}, "MCE_Bal is for evaluation; take all"),
        ({"loss": "MTD"}, "LOSS is for an attack: set STEPS or REPLAYS"),
        ({"WARMUP": 0.5}, "WARMUP is for an attack"),
        ({"replays": 2, "start": "image"}, "START is for STEPS"),
        ({"steps": 2, "clean": 0.8, "warmup": 0.8}, "would never have its full strength"),
        ({"clip": -1.0}, "CLIP is -1.0"),
        ({"clean": 2.0}, "clean is 2.0"),
        ({"replay": 2}, "no key replay; did you mean replays"),
        ({"steps": 2, "norm": "linf", "eps": 0.03}, "did you mean"),
    ],
)
def test_bad_options_are_one_line(keys, words):
    with pytest.raises(InputError, match=words) as error:
        AdversarialTraining.from_keys(keys)
    assert "\n" not in str(error.value)
