from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from rt_detectron.attacks import APGD, PGD, ThreatModel
from rt_detectron.utils.errors import InputError


def small_network():
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 4)
    )
    network[1].running_var.uniform_(0.5, 2)
    network[4].weight.data *= 20  # logits worth attacking
    return network


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(3)
    return torch.rand(6, 3, 8, 8, generator=generator), torch.arange(6) % 4


def plain_loop(model, images, labels, norm, radius, steps, step_size):
    """PGD one image at a time, written from the definition: the reference."""
    results = []
    for image, label in zip(images, labels, strict=True):
        x = image.clone()
        for _ in range(steps):
            x.requires_grad_(True)
            F.cross_entropy(model(x[None]), label[None]).backward()
            g = x.grad
            with torch.no_grad():
                x = x + (step_size * g / g.norm() if norm == "l2" else step_size * g.sign())
                delta = x - image
                if norm == "l2":
                    delta = delta if delta.norm() <= radius else delta / delta.norm() * radius
                else:
                    delta = delta.clamp(-radius, radius)
                x = (image + delta).clamp(0, 1)
        results.append(x)
    return torch.stack(results)


@pytest.mark.parametrize(("norm", "eps"), [("l2", 0.5), ("linf", 8.0)])
def test_equals_the_plain_loop(batch, norm, eps):
    images, labels = batch
    model = small_network().eval()
    threat_model = ThreatModel(norm, eps)
    attack = PGD(threat_model, steps=5)
    expected = plain_loop(model, images, labels, norm, threat_model.radius, 5, 2.5 * threat_model.radius / 5)
    assert (expected - images).abs().max() > 0.01
    assert torch.allclose(attack(model, images, labels), expected, atol=1e-5)


def test_one_step_on_a_linear_model_is_the_optimum():
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 2))
    images, labels = torch.full((1, 3, 2, 2), 0.5), torch.tensor([0])
    weight = model[1].weight
    direction = (weight[1] - weight[0]).view(1, 3, 2, 2)  # raises the wrong logit over the right one
    adversarial = PGD(ThreatModel("l2", 0.1), steps=1, relative_step_size=1.0)(model, images, labels)
    assert torch.allclose(adversarial - images, 0.1 * direction / direction.norm(), atol=1e-6)


@pytest.mark.parametrize("random_start", [False, True])
@pytest.mark.parametrize(("norm", "eps"), [("l2", 0.5), ("linf", 8.0), ("l1", 8.0)])
def test_stays_in_the_ball_and_in_0_1_and_raises_the_loss(batch, norm, eps, random_start):
    images, labels = batch
    images = images.round()  # at the border of [0, 1], where clamping matters
    model = small_network()
    attack = PGD(ThreatModel(norm, eps), steps=10, random_start=random_start)
    adversarial = attack(model, images, labels)
    delta = (adversarial - images).flatten(1)
    size = {"l1": delta.abs().sum(1), "l2": delta.norm(dim=1), "linf": delta.abs().amax(1)}[norm]
    assert (size <= attack.threat_model.radius * (1 + 1e-5)).all()
    assert adversarial.min() >= 0
    assert adversarial.max() <= 1
    model.eval()
    assert F.cross_entropy(model(adversarial), labels) > F.cross_entropy(model(images), labels) + 0.1


def test_l1_uses_all_of_eps_and_no_step_on_pixels_that_cannot_move(batch, monkeypatch):
    """Croce & Hein 2021: projected first and clamped then, much of the ball stays out of reach."""
    images, labels = batch[0].round(), batch[1]
    model = small_network().eval()

    def outcome() -> tuple[float, float]:
        adversarial = PGD(ThreatModel("l1", 12.0), steps=20)(model, images, labels)
        used = (adversarial - images).abs().sum((1, 2, 3)).min().item()
        return used, F.cross_entropy(model(adversarial), labels).item()

    used, loss = outcome()
    assert used > 11.9
    monkeypatch.setattr(
        ThreatModel, "nearest", lambda self, x, images: (images + self.project(x - images)).clamp(0, 1)
    )
    clamped_last = outcome()
    ascend = lambda self, x, grad, size, images: self.nearest(x + self.step(grad, size), images)  # noqa: E731
    monkeypatch.setattr(ThreatModel, "ascend", ascend)
    any_pixel = outcome()
    assert used > 1.02 * clamped_last[0] > 10 * any_pixel[0]
    assert loss > clamped_last[1] > 2 * any_pixel[1]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda images: 255 * images, "images range from .* which must be 0 to 1: divide"),
        (lambda images: (images - 0.45) / 0.225, "leave normalisation to the model"),
        (lambda images: images * float("nan"), "images range from nan to nan"),
        (lambda images: (255 * images).byte(), "images are uint8; give them as float"),
    ],
)
def test_images_in_another_range_are_one_line(batch, change, words):
    images, labels = batch
    with pytest.raises(InputError, match=words):
        PGD(ThreatModel("linf", 4.0), steps=1)(small_network(), change(images), labels)


def test_no_images_are_no_mistake():
    images, labels = torch.rand(0, 3, 8, 8), torch.zeros(0, dtype=torch.int64)
    assert PGD(ThreatModel("linf", 4.0), steps=1)(small_network(), images, labels).shape == images.shape


def test_leaves_no_trace_in_the_model(batch):
    model = small_network().train()
    model[2].eval()  # a mode of its own, as a frozen layer has
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model[0].weight.grad = torch.ones_like(model[0].weight)
    adversarial = PGD(ThreatModel("l2", 0.5), steps=2)(model, *batch)
    assert [module.training for module in model] == [True, True, False, True, True]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(model[0].weight.grad, torch.ones_like(model[0].weight))
    assert model[4].weight.grad is None
    assert not adversarial.requires_grad


def test_works_where_gradients_are_switched_off(batch):
    model = small_network().eval()
    attack = PGD(ThreatModel("l2", 0.5), steps=2)
    with torch.no_grad():
        inside = attack(model, *batch)
    assert torch.equal(inside, attack(model, *batch))


def test_the_model_gets_its_modes_back_when_the_attack_fails(batch):
    model = small_network().train()
    images, _ = batch
    with pytest.raises(IndexError):
        PGD(ThreatModel("l2", 0.5), steps=1)(model, images, torch.full((6,), 99))
    assert model.training


def test_eps_0_changes_nothing(batch):
    images, labels = batch
    assert torch.equal(PGD(ThreatModel("l2", 0.0), steps=3)(small_network(), images, labels), images)
    no_network = nn.Identity()  # whose logits would be of a wrong shape: eps 0 costs no pass
    assert torch.equal(PGD(ThreatModel("linf", 8.0, scale=0.0), steps=3)(no_network, images, labels), images)


def misclassified_and_loss(model, images, labels):
    logits = model.eval()(images)
    return logits.argmax(1) != labels, F.cross_entropy(logits, labels, reduction="none")


@pytest.mark.parametrize("best", [False, True])
def test_restarts_keep_each_images_strongest(batch, best):
    images, labels = batch
    model = small_network()
    once = PGD(ThreatModel("linf", 2.0), steps=3, random_start=True)
    torch.manual_seed(0)
    strongest = replace(once, restarts=4, best=best)(model, images, labels)
    torch.manual_seed(0)
    singles = [once(model, images, labels) for _ in range(4)]
    wrong, loss = misclassified_and_loss(model, strongest, labels)
    for single in singles:
        single_wrong, single_loss = misclassified_and_loss(model, single, labels)
        assert (wrong | ~single_wrong).all()
        assert (wrong & ~single_wrong | (loss >= single_loss - 1e-6)).all()
    if not best:  # each image is that of one of the single runs
        found = torch.stack([(strongest == single).flatten(1).all(1) for single in singles])
        assert found.any(0).all()


def test_best_is_the_strongest_iterate(batch):
    """With steps so long that the last is not the best."""
    images, labels = batch
    model = small_network()
    last = PGD(ThreatModel("l2", 0.3), steps=8, relative_step_size=16.0)
    best = replace(last, best=True)
    wrong, loss = misclassified_and_loss(model, last(model, images, labels), labels)
    best_wrong, best_loss = misclassified_and_loss(model, best(model, images, labels), labels)
    assert (best_wrong >= wrong).all()
    assert (best_loss >= loss - 1e-6)[best_wrong == wrong].all()


def test_best_knows_the_start_and_costs_one_pass(batch):
    images, labels = batch
    network = small_network().eval()
    start = network(images).detach()
    calls = []
    network.register_forward_hook(lambda *_: calls.append(1))

    def best_at_the_start(logits, labels):
        return -(logits - start).pow(2).sum(1)

    attack = PGD(ThreatModel("l2", 0.3), steps=4, best=True)
    labels = start.argmin(1)  # all are misclassified, so that the loss decides
    assert torch.equal(attack(network, images, labels, loss=best_at_the_start), images)
    assert len(calls) == 5
    assert not torch.equal(attack(network, images, labels), images)


def test_memory_format_is_kept(batch):
    images, labels = batch
    images = images.contiguous(memory_format=torch.channels_last)
    adversarial = PGD(ThreatModel("l2", 0.5), steps=2)(small_network(), images, labels)
    assert adversarial.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    "bad",
    [
        {"steps": 0},
        {"steps": 2.5},
        {"steps": True},
        {"steps": 3, "relative_step_size": 0},
        {"steps": 3, "relative_step_size": float("inf")},
        {"steps": 3, "relative_step_size": "2"},
        {"steps": 3, "restarts": 0},
    ],
)
def test_bad_input_is_one_line(bad):
    with pytest.raises(InputError, match=r"must be .*>"):
        PGD(ThreatModel("l2", 1.0), **bad)


def test_a_name_is_no_threat_model():
    with pytest.raises(InputError, match="threat_model is 'l2'; it must be a ThreatModel"):
        PGD("l2", steps=2)


def test_restarts_without_a_random_start_are_refused():
    with pytest.raises(InputError, match="set random_start=True"):
        PGD(ThreatModel("l2", 1.0), steps=2, restarts=3)


@pytest.mark.parametrize(("kind", "norm", "eps"), [(PGD, "linf", 8.0), (APGD, "l2", 1.0)])
def test_small_gradients_survive_half_precision(kind, norm, eps):
    """Of a network that is so sure that its gradients underflow in float16."""
    attack = kind(ThreatModel(norm, eps), steps=1)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 8), nn.Linear(8, 2))
    with torch.no_grad():
        model[2].bias.copy_(torch.tensor([12.0, 0.0]))
    images, labels = torch.rand(4, 3, 4, 4), torch.zeros(4, dtype=torch.int64)
    points = images.clone().requires_grad_(True)
    with torch.autocast("cpu", torch.float16):
        loss = F.cross_entropy(model(points), labels, reduction="sum")
        assert not torch.autograd.grad(loss, points)[0].abs().min()  # what it is about
        found = attack(model, images, labels)
    expected = attack(model.double(), images.double(), labels)
    moved, reference = found - images, expected - images
    assert F.cosine_similarity(moved.flatten(1), reference.flatten(1).float()).min() > 0.95
