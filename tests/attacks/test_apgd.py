"""Auto-PGD against the published algorithm, image by image in plain numbers."""

import pytest
import torch

from rt_detectron.attacks import APGD, PGD, ThreatModel

STEPS = 20


def hills(images):
    """(N,) a loss with a peak inside the ball and ripples around it; its gradient is steep everywhere."""
    distance = (images - 0.55).abs().flatten(1)
    return -(distance + 0.05 * (40 * distance).sin()).sum(1)


def objective(batches):
    return [(hills(images), images.new_zeros(len(images), dtype=torch.bool)) for images in batches]


def published(image, ball, steps, start=None):
    """Algorithm 1 of Croce & Hein (2020) on one image (C, H, W), after their code's checkpoints.

    It begins at ``start``, (1, C, H, W), or at the image.
    """
    x0 = image[None]

    def inside(x):
        delta = x - x0
        if ball.norm == "l2":
            delta = delta * min(1.0, ball.radius / float(delta.norm()))
        else:
            delta = delta.clamp(-ball.radius, ball.radius)
        return (x0 + delta).clamp(0, 1)

    def value_and_grad(x):
        x = x.clone().requires_grad_(True)
        value = hills(x)
        (grad,) = torch.autograd.grad(value.sum(), x)
        return value.item(), grad

    def step(grad, size):
        return size * (grad / grad.norm() if ball.norm == "l2" else grad.sign())

    start = x0 if start is None else start
    size, x, before = 2 * ball.radius, start, start
    length, since, risen, reduced, best_at_look = max(int(0.22 * steps), 1), 0, 0, True, None
    best = best_x = best_grad = last = None
    for k in range(steps):
        value, grad = value_and_grad(x)
        if k:
            risen += value > last
            since += 1
        last = value
        if best is None or value > best:
            best, best_x, best_grad = value, x, grad
        if k and since == length:
            no_better = not reduced and best_at_look is not None and best <= best_at_look
            reduced = no_better or risen <= 0.75 * length
            if reduced:
                size, x, grad = size / 2, best_x, best_grad
            best_at_look, risen, since = best, 0, 0
            length = max(length - max(int(0.03 * steps), 1), int(0.06 * steps), 1)
        moved = inside(x + step(grad, size))
        if k:
            moved = inside(x + 0.75 * (moved - x) + 0.25 * (x - before))
        before, x = x, moved
    value, _ = value_and_grad(x)
    return x if value > best else best_x


@pytest.mark.parametrize(
    "ball", [ThreatModel("linf", 30), ThreatModel("l2", 1.5)], ids=lambda ball: ball.norm
)
def test_as_published(ball):
    torch.manual_seed(0)
    images = torch.rand(4, 3, 8, 8, dtype=torch.float64)
    (found,) = APGD(ball, STEPS).maximize(objective, [images])
    for image, attacked in zip(images, found, strict=True):
        assert torch.allclose(published(image, ball, STEPS)[0], attacked, atol=1e-9)


@pytest.mark.parametrize(
    "ball", [ThreatModel("linf", 30), ThreatModel("l2", 1.5)], ids=lambda ball: ball.norm
)
def test_it_climbs_higher_than_steps_of_one_size(ball):
    torch.manual_seed(0)
    images = torch.rand(8, 3, 8, 8)
    passes = [0]

    def counted(batches):
        passes[0] += 1
        return objective(batches)

    (fixed,) = PGD(ball, STEPS).maximize(objective, [images])
    attack = APGD(ball, STEPS)
    (adaptive,) = attack.maximize(counted, [images])
    assert passes == [attack.passes["forward"]] == [STEPS + 1]
    assert (hills(adaptive) > hills(fixed)).float().mean() > 0.8
    delta = (adaptive - images).flatten(1)
    assert (delta.norm(dim=1) if ball.norm == "l2" else delta.abs().amax(1)).max() <= ball.radius * (1 + 1e-5)
    assert 0 <= adaptive.min() <= adaptive.max() <= 1


def test_restarts_keep_the_best():
    torch.manual_seed(0)
    images, ball = torch.rand(6, 3, 8, 8), ThreatModel("linf", 30)
    (once,) = APGD(ball, 5, random_start=True).maximize(objective, [images])
    attack = APGD(ball, 5, random_start=True, restarts=4)
    (often,) = attack.maximize(objective, [images])
    assert hills(often).mean() > hills(once).mean()
    assert attack.passes == {"forward": 4 * 7, "backward": 20}
    assert attack.name == "apgd5x4"


@pytest.mark.parametrize(
    "ball", [ThreatModel("linf", 16), ThreatModel("l2", 0.8)], ids=lambda ball: ball.norm
)
def test_reduced_radii_are_climbs_one_after_another(ball):
    """Red-eps against the published algorithm in balls of 2, 1.5 and 1 eps, each from the last one's best."""
    torch.manual_seed(0)
    images = torch.rand(3, 3, 8, 8, dtype=torch.float64)
    farthest = []

    def noted(batches):
        moved = (batches[0].detach() - images).flatten(1)
        norms = moved.norm(dim=1) if ball.norm == "l2" else moved.abs().amax(1)
        farthest.append(float(norms.max()) / ball.radius)
        return objective(batches)

    attack = APGD(ball, STEPS, reduce_radius=True)
    (found,) = attack.maximize(noted, [images])
    for image, attacked in zip(images, found, strict=True):
        point = image[None]
        for factor, steps in ((2, 6), (1.5, 6), (1, 8)):
            wider = ThreatModel(ball.norm, factor * ball.eps)
            point = published(image, wider, steps, wider.nearest(point, image[None]))
        assert torch.allclose(point[0], attacked, atol=1e-9)
    assert len(farthest) == attack.passes["forward"] == STEPS + 3
    parts = [max(farthest[:7]), max(farthest[7:14]), max(farthest[14:])]
    assert parts == pytest.approx([2, 1.5, 1], abs=0.3)
    assert parts[2] <= 1 + 1e-6
