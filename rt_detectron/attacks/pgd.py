"""Projected gradient descent."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from rt_detectron.errors import InputError

from .threat_model import ThreatModel


@dataclass(frozen=True)
class PGD:
    """Projected gradient descent on the input (Madry et al. 2018, https://arxiv.org/abs/1706.06083).

    Attributes:
        threat_model: the ball the perturbation stays in.
        steps: number of gradient steps.
        relative_step_size: a step's size as a multiple of ``eps / steps``. Salman et al. (2020) train
            with 2 (three steps of 2*eps/3) and evaluate with 2.5.
        random_start: begin at a random point of the ball instead of at the image.
        restarts: attack so many times, each from another random start, and keep each image's strongest: one
            that is misclassified before one that is not, then the one with the largest loss.
        best: keep the strongest of all iterates instead of the last; costs one more forward pass each.
    """

    threat_model: ThreatModel
    steps: int
    relative_step_size: float = 2.5
    random_start: bool = False
    restarts: int = 1
    best: bool = False

    def __post_init__(self):
        if not isinstance(self.steps, int) or self.steps < 1:
            raise InputError(f"PGD: steps is {self.steps!r}; it must be a whole number >= 1")
        if not self.relative_step_size > 0:
            raise InputError(f"PGD: relative_step_size is {self.relative_step_size!r}; it must be > 0")
        if not isinstance(self.restarts, int) or self.restarts < 1:
            raise InputError(f"PGD: restarts is {self.restarts!r}; it must be a whole number >= 1")
        if self.restarts > 1 and not self.random_start:
            raise InputError("PGD: restarts differ by their random start only; set random_start=True")

    @property
    def name(self) -> str:
        return f"pgd{self.steps}" + (f"x{self.restarts}" if self.restarts > 1 else "")

    @property
    def step_size(self) -> float:
        """A step's length, for images in [0, 1]."""
        return self.relative_step_size * self.threat_model.radius / self.steps

    def __call__(
        self,
        model: nn.Module,
        images: torch.Tensor,
        labels: torch.Tensor,
        loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = F.cross_entropy,
    ) -> torch.Tensor:
        """Images in the ball on which ``loss`` is large.

        The model is attacked in eval mode, returned to the mode it was in, and neither its gradients nor
        its buffers change.

        Args:
            model: maps images in [0, 1] to logits; normalisation is part of it.
            images: (N, C, H, W), float, in [0, 1].
            labels: (N,), int64.
            loss: of (logits, labels), averaged over the images.

        Returns:
            (N, C, H, W) images in [0, 1], detached.
        """
        with _eval_mode(model), torch.enable_grad():
            if self.restarts == 1 and not self.best:
                *_, last = self._iterates(model, images, labels, loss)
                return last
            return self._strongest(model, images, labels, loss)

    def _iterates(self, model, images, labels, loss) -> Iterator[torch.Tensor]:
        adversarial = images.detach()
        if self.random_start:
            adversarial = (images + self.threat_model.random_start(images)).clamp_(0, 1)
        for _ in range(self.steps):
            adversarial.requires_grad_(True)
            # autograd.grad of the input alone: no weight gradient is computed, none is overwritten.
            (grad,) = torch.autograd.grad(loss(model(adversarial), labels), adversarial)
            adversarial = adversarial.detach() + self.threat_model.step(grad, self.step_size)
            adversarial = self.threat_model.project(adversarial.sub_(images)).add_(images).clamp_(0, 1)
            yield adversarial

    @torch.no_grad()
    def _strongest(self, model, images, labels, loss) -> torch.Tensor:
        strongest, highest = images.clone(), None
        for _ in range(self.restarts):
            with torch.enable_grad():
                iterates = list(self._iterates(model, images, labels, loss))
            for adversarial in iterates if self.best else iterates[-1:]:
                score = _strength(model(adversarial), labels)
                if highest is None:
                    strongest, highest = adversarial.clone(), score
                    continue
                better = score > highest
                strongest[better], highest[better] = adversarial[better], score[better]
        return strongest


def _strength(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """(N,): the loss of each image, in [0, 1), plus 1 where it is misclassified."""
    loss = F.cross_entropy(logits, labels, reduction="none")
    return loss / (1 + loss) + (logits.argmax(1) != labels)


@contextmanager
def _eval_mode(model: nn.Module):
    """Put ``model`` in eval mode; afterwards every submodule has its own mode back."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
