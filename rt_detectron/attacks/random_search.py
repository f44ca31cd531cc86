"""An attack on detectors by queries alone, in the manner of the Square attack."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rt_detectron.attacks.detection import LossAttack, image_seed, unit_images, with_images
from rt_detectron.utils.seeds import seeded

# The share of the pixels that a square covers, and the parts of the queries after which it halves: those of
# Andriushchenko et al., for 10,000 queries.
_FIRST_SHARE = 0.8
_HALVES_AT = (0.001, 0.005, 0.02, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8)


@dataclass(frozen=True)
class RandomSearch:
    """Raises the objective of ``attack`` without its gradient: random squares, kept if the objective rises.

    After the Square attack (Andriushchenko et al. 2020, https://arxiv.org/abs/1912.00049), which begins with
    vertical stripes; for L2 the squares are projected into the ball. If it does more harm than ``attack``,
    the gradient is masked.

    Attributes:
        attack: whose objective, ball and seed count.
        queries: of the detector for each image, a forward pass each.
    """

    attack: LossAttack
    queries: int

    def __call__(self, model: nn.Module, inputs: Sequence[dict]) -> list[dict]:
        """As :meth:`~.detection.DetectorAttack.__call__`."""
        found = []
        for each, image in zip(inputs, unit_images(model, inputs), strict=True):
            with seeded(image_seed(self.attack.seed, each), model.device):
                found += with_images([each], [self._search(model, each, image)])
        return found

    def _search(self, model: nn.Module, given: dict, image: Tensor) -> Tensor:
        """(1, C, H, W), in [0, 1]."""
        ball = self.attack.pgd.threat_model

        def moved(perturbation: Tensor) -> Tensor:
            return (image + ball.project(perturbation)).clamp_(0, 1)

        def objective(candidate: Tensor) -> float:
            (value,) = self.attack.value(model, with_images([given], [candidate]))
            return value

        _, channels, height, width = image.shape
        stripes = torch.randint(0, 2, (1, channels, 1, width), device=image.device) * 2.0 - 1
        best = moved(ball.step(stripes.expand_as(image), ball.radius))
        value = objective(best)
        for query in range(1, self.queries):
            share = _FIRST_SHARE / 2 ** sum(query >= part * self.queries for part in _HALVES_AT)
            side = max(1, min(round(math.sqrt(share * height * width)), height, width))
            top, left = (int(torch.randint(0, size - side + 1, ())) for size in (height, width))
            square = torch.zeros_like(image)
            signs = torch.randint(0, 2, (1, channels, 1, 1), device=image.device) * 2.0 - 1
            square[:, :, top : top + side, left : left + side] = signs
            candidate = moved(best - image + ball.step(square, 2 * ball.radius))
            found = objective(candidate)
            if found > value:
                best, value = candidate, found
        return best
