"""Auto-PGD: projected gradient descent that finds its step sizes itself."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rt_detectron.attacks.pgd import PGD, Objective, ascent
from rt_detectron.attacks.threat_model import ThreatModel
from rt_detectron.utils.errors import InputError


@dataclass(frozen=True)
class APGD(PGD):
    """Auto-PGD (Croce & Hein 2020, https://arxiv.org/abs/2003.01690, algorithm 1), for any loss.

    The step begins at twice the ball's radius, and halves for an image whose loss has risen in fewer than
    three of four steps since the last look, or whose best loss has not risen although the step is the same.
    It then goes on from its best point. The best iterate is kept: ``relative_step_size`` and ``best`` are
    ignored.

    Attributes:
        reduce_radius: "red-eps" of Croce, Singh & Hein (2024, https://arxiv.org/abs/2306.12941, section 3):
            climb in a ball of twice the radius first, for 3 of 10 steps, then of 1.5 times, for 3, then in
            the ball itself, each time from the best point of the one before, projected.
    """

    reduce_radius: bool = False

    def __post_init__(self):
        super().__post_init__()
        if self.reduce_radius and self.steps < 4:
            raise InputError(f"APGD: steps is {self.steps}; to reduce the radius takes 4 or more")

    @property
    def name(self) -> str:
        return f"a{super().name}"

    @property
    def _balls(self) -> list[tuple[ThreatModel, int]]:
        """The balls that it climbs in, and the steps in each."""
        if not self.reduce_radius:
            return [(self.threat_model, self.steps)]
        part = int(0.3 * self.steps)
        sizes = ((2.0, part), (1.5, part), (1.0, self.steps - 2 * part))
        ball = self.threat_model
        return [(replace(ball, scale=factor * ball.scale), steps) for factor, steps in sizes]

    @property
    def passes(self) -> dict[str, int]:
        compared = self.restarts > 1 or self.best
        return {
            "forward": self.restarts * (self.steps + len(self._balls) + compared),
            "backward": self.restarts * self.steps,
        }

    def _climb(
        self,
        objective: Objective,
        batches: list[Tensor],
        generators: Sequence[torch.Generator],
        visit: Callable | None = None,
    ) -> list[Tensor]:
        """The best iterates."""
        (first, steps), *smaller = self._balls
        starts = replace(self, threat_model=first)._starts(batches, generators)
        points = _climbed(objective, batches, starts, first, steps)
        for ball, steps in smaller:
            starts = [ball.nearest(*each) for each in zip(points, batches, strict=True)]
            points = _climbed(objective, batches, starts, ball, steps)
        return points


def _climbed(
    objective: Objective, batches: list[Tensor], starts: list[Tensor], ball: ThreatModel, steps: int
) -> list[Tensor]:
    """The best of ``steps`` steps in ``ball`` around ``batches``."""
    climbs = [_Climb(ball, *both) for both in zip(batches, starts, strict=True)]
    looks = _looks(steps)
    for step in range(steps):
        points = [climb.point.requires_grad_(True) for climb in climbs]
        found = objective(points)
        grads = ascent(found, points)
        for climb, (losses, _), grad in zip(climbs, found, grads, strict=True):
            climb.note(losses.detach(), grad)
            if step in looks:
                climb.look(step - looks[step])
            climb.move(momentum=step > 0)
    with torch.no_grad():
        for climb, (losses, _) in zip(climbs, objective([climb.point for climb in climbs]), strict=True):
            climb.note(losses, climb.grad)
    return [climb.best for climb in climbs]


def _looks(steps: int) -> dict[int, int]:
    """The steps at which the step size may halve, each with the one before it: 0, 22 %, 41 %, 57 % ..."""
    found, last, length = {}, 0, max(int(0.22 * steps), 1)
    while last + length < steps:
        found[last + length] = last
        last += length
        length = max(length - max(int(0.03 * steps), 1), int(0.06 * steps), 1)
    return found


class _Climb:
    """Where a batch of N images is, and where it has been best.

    Attributes:
        point: (N, C, H, W), in [0, 1].
        best: the same, with the largest loss so far.
    """

    def __init__(self, ball: ThreatModel, images: Tensor, start: Tensor):
        self.ball, self.images = ball, images
        self.point = self.before = self.best = self.grad = self.best_grad = start
        count = len(images)
        self.size = images.new_full((count, 1, 1, 1), 2 * ball.radius)
        self.value = self.value_at_look = images.new_full((count,), -torch.inf)
        self.last = images.new_full((count,), torch.inf)  # the first loss is no rise
        self.risen = images.new_zeros(count)
        self.halved = torch.ones(count, dtype=torch.bool, device=images.device)

    def note(self, losses: Tensor, grad: Tensor) -> None:
        """The losses (N,) at the point, and their gradient."""
        self.point = self.point.detach()
        self.risen = self.risen + (losses > self.last)
        self.last, self.grad = losses, grad
        better = losses > self.value
        self.value = torch.where(better, losses, self.value)
        self.best = _where(better, self.point, self.best)
        self.best_grad = _where(better, grad, self.best_grad)

    def look(self, steps: int) -> None:
        """Halve the steps of the images that do not get on, ``steps`` after the last look."""
        stuck = ~self.halved & (self.value <= self.value_at_look)
        self.halved = stuck | (self.risen <= 0.75 * steps)
        self.size = torch.where(self.halved.view(-1, 1, 1, 1), self.size / 2, self.size)
        self.point = _where(self.halved, self.best, self.point)
        self.grad = _where(self.halved, self.best_grad, self.grad)
        self.value_at_look, self.risen = self.value, torch.zeros_like(self.risen)

    def move(self, momentum: bool) -> None:
        """A step, and a quarter of the way that the last one went."""
        point = self.ball.ascend(self.point, self.grad, self.size, self.images)
        if momentum:
            ahead = self.point + 0.75 * (point - self.point) + 0.25 * (self.point - self.before)
            point = self.ball.nearest(ahead, self.images)
        self.before, self.point = self.point, point


def _where(chosen: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """(N, C, H, W): ``first`` for the images that ``chosen`` (N,) names."""
    return torch.where(chosen.view(-1, 1, 1, 1), first, second)
