import pytest
import torch
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from torch import nn

from rt_detectron.attacks import ThreatModel
from rt_detectron.detection.adversarial import FreeReplays, replayed
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


def test_without_replays_the_loader_is_itself():
    loader = batches(1)
    assert replayed(loader, "cpu", 0, "l2", 0.5) is loader
    assert isinstance(replayed(loader, "cpu", 2, "l2", 0.5), FreeReplays)


@pytest.mark.parametrize(
    ("norm", "replays", "words"), [("l1", 2, "norm 'l1' is not l2 or linf"), ("l2", -1, "-1 replays")]
)
def test_bad_options_are_refused(norm, replays, words):
    with pytest.raises(InputError, match=words):
        replayed([], "cpu", replays, norm, 0.5)
