"""Projected gradient descent."""

import functools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rt_detectron.errors import InputError

from .threat_model import ThreatModel

cross_entropy = functools.partial(F.cross_entropy, reduction="none")


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
        best: keep the strongest of all iterates, the first included, instead of the last; costs one more
            forward pass in all.
    """

    threat_model: ThreatModel
    steps: int
    relative_step_size: float = 2.5
    random_start: bool = False
    restarts: int = 1
    best: bool = False

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

    def __call__(
        self,
        model: nn.Module,
        images: Tensor,
        labels: Tensor,
        loss: Callable[[Tensor, Tensor], Tensor] = cross_entropy,
    ) -> Tensor:
        """Images in the ball on which ``loss`` is large.

        The model is attacked in eval mode, returned to the mode it was in, and neither its gradients nor
        its buffers change.

        Args:
            model: maps images in [0, 1] to logits; normalisation is part of it.
            images: (N, C, H, W), float, in [0, 1].
            labels: (N,), int64, or probabilities (N, number of classes).
            loss: of (logits, labels), (N,).

        Returns:
            (N, C, H, W) images in [0, 1], detached.
        """
        with eval_mode(model), torch.enable_grad():
            if self.restarts == 1 and not self.best:
                return self._climb(model, images, labels, loss)
            strongest = _Strongest(labels)
            for _ in range(self.restarts):
                last = self._climb(model, images, labels, loss, strongest.offer if self.best else None)
                with torch.no_grad():
                    logits = model(last)
                    strongest.offer(last, logits, loss(logits, labels))
            return strongest.images

    def _climb(self, model, images, labels, loss, visit: Callable | None = None) -> Tensor:
        """The last iterate; ``visit`` gets each one before it, with its logits and losses."""
        adversarial = images.detach()
        if self.random_start:
            adversarial = (images + self.threat_model.random_start(images)).clamp_(0, 1)
        for _ in range(self.steps):
            adversarial.requires_grad_(True)
            logits = model(adversarial)
            losses = loss(logits, labels)
            # autograd.grad of the input alone: no weight gradient is computed, none is overwritten. The sum
            # and not the mean, whose gradients are so much smaller that half precision would lose them.
            (grad,) = torch.autograd.grad(losses.sum(), adversarial)
            adversarial = adversarial.detach()
            if visit is not None:
                visit(adversarial, logits.detach(), losses.detach())
            moved = adversarial + self.threat_model.step(grad, self.step_size)
            adversarial = self.threat_model.project(moved.sub_(images)).add_(images).clamp_(0, 1)
        return adversarial


class _Strongest:
    """Of what was offered, each image's strongest: a misclassified one before others, then by the loss."""

    def __init__(self, labels: Tensor):
        self.classes = labels if labels.dim() == 1 else labels.argmax(1)
        self.images: Tensor | None = None

    def offer(self, images: Tensor, logits: Tensor, losses: Tensor) -> None:
        """(N, C, H, W), (N, number of classes) and (N,)."""
        wrong = logits.argmax(1) != self.classes
        if self.images is None:
            self.images, self.wrong, self.losses = images, wrong, losses
            return
        better = (wrong & ~self.wrong) | ((wrong == self.wrong) & (losses > self.losses))
        self.images = torch.where(better.view(-1, 1, 1, 1), images, self.images)
        self.wrong = self.wrong | wrong
        self.losses = torch.where(better, losses, self.losses)


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Put ``model`` in eval mode; afterwards every submodule has its own mode back."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
