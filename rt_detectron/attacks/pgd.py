"""Projected gradient descent."""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rt_detectron.attacks.registry import register_attack
from rt_detectron.attacks.threat_model import ThreatModel
from rt_detectron.utils.errors import InputError
from rt_detectron.utils.modes import eval_mode
from rt_detectron.utils.ranges import check_images

cross_entropy = functools.partial(F.cross_entropy, reduction="none")
HALF_PRECISION_SCALE = 1024.0  # of losses, whose gradients would underflow in half precision
# See PGD.maximize.
Objective = Callable[[list[Tensor]], list[tuple[Tensor, Tensor]]]


@dataclass(frozen=True)
class PGD:
    """Projected gradient descent on the input (Madry et al. 2018, https://arxiv.org/abs/1706.06083).

    Attributes:
        threat_model: the ball the perturbation stays in.
        steps: number of gradient steps.
        relative_step_size: a step's size as a multiple of ``eps / steps``. Salman et al. (2020) train
            with 2 (three steps of 2*eps/3) and evaluate with 2.5.
        random_start: begin at a random point of the ball instead of at the image.
        restarts: number of attacks, each from another random start. Each image keeps its strongest result:
            one that is misclassified first, then the one with the largest loss.
        best: keep the strongest of all iterates, the first included, instead of the last. It costs one more
            forward pass in total.
    """

    threat_model: ThreatModel
    steps: int
    relative_step_size: float = 2.5
    random_start: bool = False
    restarts: int = 1
    best: bool = False

    gradient_based = True

    def __post_init__(self):
        if not isinstance(self.threat_model, ThreatModel):
            raise InputError(f"PGD: threat_model is {self.threat_model!r}; it must be a ThreatModel")
        size = self.relative_step_size
        if type(size) not in (int, float) or not 0 < size < math.inf:
            raise InputError(f"PGD: relative_step_size is {size!r}; it must be a finite number > 0")
        for name in ("steps", "restarts"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise InputError(f"PGD: {name} is {value!r}; it must be a whole number >= 1")
        if self.restarts > 1 and not self.random_start:
            raise InputError("PGD: restarts differ by their random start only; set random_start=True")

    @property
    def name(self) -> str:
        return f"pgd{self.steps}" + (f"x{self.restarts}" if self.restarts > 1 else "")

    @property
    def step_size(self) -> float:
        """A step's length, for images in [0, 1]."""
        return self.relative_step_size * self.threat_model.radius / self.steps

    @property
    def passes(self) -> dict[str, int]:
        """What it costs, in "forward" and "backward" passes of the network."""
        compared = self.restarts > 1 or self.best
        return {"forward": self.restarts * (self.steps + compared), "backward": self.restarts * self.steps}

    def __call__(
        self,
        model: nn.Module,
        images: Tensor,
        labels: Tensor,
        loss: Callable[[Tensor, Tensor], Tensor] = cross_entropy,
    ) -> Tensor:
        """Images in the ball on which ``loss`` is large.

        The model is attacked in eval mode. Afterwards it is in the mode it was in, and its gradients and
        buffers are unchanged.

        Args:
            model: maps images in [0, 1] to logits; normalisation is part of it.
            images: (N, C, H, W), float, in [0, 1].
            labels: (N,), int64, or probabilities (N, number of classes).
            loss: of (logits, labels), (N,).

        Returns:
            (N, C, H, W) images in [0, 1], detached.

        Raises:
            InputError: for images outside [0, 1].
        """
        check_images(images)
        classes = labels if labels.dim() == 1 else labels.argmax(1)

        def objective(batches: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
            logits = model(batches[0])
            return [(loss(logits, labels), logits.argmax(1) != classes)]

        with eval_mode(model):
            return self.maximize(objective, [images])[0]

    def maximize(
        self,
        objective: Objective,
        batches: Sequence[Tensor],
        generators: Sequence[torch.Generator] = (),
    ) -> list[Tensor]:
        """The attack on anything that has a loss for each image.

        Args:
            objective: takes a list of tensors like ``batches``, within the ball around them. For each of
                them it gives the losses to maximise, (N,), and whether each image fools the model, (N,) bool;
                of several restarts, one that does counts as stronger.
            batches: (N, C, H, W) each, float, in [0, 1]; images of one size make a batch.
            generators: of the random starts, one for each of ``batches``; () takes torch's global one.

        Returns:
            Tensors like ``batches``, in [0, 1], detached.
        """
        batches = [images.detach() for images in batches]
        if self.threat_model.radius == 0:
            return batches
        with torch.enable_grad():
            if self.restarts == 1 and not self.best:
                return self._climb(objective, batches, generators)
            strongest = [_Strongest() for _ in batches]

            def offer(adversarial: list[Tensor], found: list[tuple[Tensor, Tensor]]) -> None:
                for best, images, (losses, fooled) in zip(strongest, adversarial, found, strict=True):
                    best.offer(images, losses.detach(), fooled)

            for _ in range(self.restarts):
                last = self._climb(objective, batches, generators, offer if self.best else None)
                with torch.no_grad():
                    offer(last, objective(last))
            return [best.images for best in strongest]

    def _climb(
        self,
        objective: Objective,
        batches: list[Tensor],
        generators: Sequence[torch.Generator],
        visit: Callable | None = None,
    ) -> list[Tensor]:
        """The last iterate; ``visit`` gets each iterate before it and what the objective gave for it."""
        adversarial = self._starts(batches, generators)
        for _ in range(self.steps):
            for images in adversarial:
                images.requires_grad_(True)
            found = objective(adversarial)
            grads = ascent(found, adversarial)
            adversarial = [images.detach() for images in adversarial]
            if visit is not None:
                visit(adversarial, found)
            adversarial = [self._move(*each) for each in zip(adversarial, grads, batches, strict=True)]
        return adversarial

    def _starts(self, batches: list[Tensor], generators: Sequence[torch.Generator]) -> list[Tensor]:
        if not self.random_start:
            return [images.detach() for images in batches]
        ball = self.threat_model
        return [
            (images + ball.random_start(images, generator)).clamp_(0, 1)
            for images, generator in zip(batches, generators or [None] * len(batches), strict=True)
        ]

    def _move(self, adversarial: Tensor, grad: Tensor, images: Tensor) -> Tensor:
        return self.threat_model.ascend(adversarial, grad, self.step_size, images)


def ascent(found: list[tuple[Tensor, Tensor]], points: list[Tensor]) -> tuple[Tensor, ...]:
    """The gradients of what an objective found at ``points``, up to a common factor.

    With respect to the points alone: no gradient of a weight is computed or overwritten. The factor keeps
    them from underflow in half precision, and no step depends on it; so does the sum, and not the mean.
    """
    total = sum(losses.sum() for losses, _ in found)
    kind = points[0].device.type
    if kind in ("cpu", "cuda") and torch.is_autocast_enabled(kind):
        total = HALF_PRECISION_SCALE * total
    return torch.autograd.grad(total, points)


@register_attack(r"pgd(\d+)(?:x(\d+))?", "pgd20 (20 steps), pgd100x5 (5 restarts)")
def _pgd_named(threat_model: ThreatModel, seed: int, steps: str, restarts: str | None) -> PGD:
    """The seed is ignored: random starts come from torch's global generator."""
    count = int(restarts or 1)
    return PGD(threat_model, int(steps), random_start=count > 1, restarts=count)


class _Strongest:
    """For each image the strongest of those offered: one that fools the model, then the largest loss."""

    images: Tensor | None = None

    def offer(self, images: Tensor, losses: Tensor, fooled: Tensor) -> None:
        """(N, C, H, W), (N,) and (N,) bool."""
        if self.images is None:
            self.images, self.losses, self.fooled = images, losses, fooled
            return
        better = (fooled & ~self.fooled) | ((fooled == self.fooled) & (losses > self.losses))
        self.images = torch.where(better.view(-1, 1, 1, 1), images, self.images)
        self.losses = torch.where(better, losses, self.losses)
        self.fooled = self.fooled | fooled
