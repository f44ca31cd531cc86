"""What an adversary may do: move an image within a ball around it."""

import math
from dataclasses import dataclass

import torch

from rt_detectron.errors import InputError


@dataclass(frozen=True)
class ThreatModel:
    """A norm ball of perturbations, in the unit the published checkpoints are named by.

    Attributes:
        norm: "l2" or "linf".
        eps: the ball's size. For "l2" in units of images in [0, 1] (``3.0``); for "linf" in 1/255
            (``4.0`` moves every pixel by at most 4/255).
    """

    norm: str
    eps: float

    def __post_init__(self):
        if self.norm not in ("l2", "linf"):
            raise InputError(f"threat model: norm {self.norm!r} is unknown; use 'l2' or 'linf'")
        if not (isinstance(self.eps, int | float) and math.isfinite(self.eps) and self.eps >= 0):
            raise InputError(f"threat model: eps is {self.eps!r}; it must be a finite number >= 0")
        if self.norm == "linf" and 0 < self.eps < 0.1:
            raise InputError(
                f"threat model: a linf eps is written in units of 1/255, and {self.eps} would be next to "
                f"nothing; did you mean eps={self.eps * 255:g}?"
            )

    @property
    def radius(self) -> float:
        """eps for images in [0, 1]."""
        return self.eps / 255 if self.norm == "linf" else self.eps

    def random_start(self, images: torch.Tensor) -> torch.Tensor:
        """Perturbations uniform in the ball, of the shape (N, C, H, W) of ``images``."""
        if self.norm == "linf":
            return torch.empty_like(images).uniform_(-self.radius, self.radius)
        direction = torch.randn_like(images)
        dimensions = images[0].numel()
        # A uniform point of a d-dimensional ball lies at the distance radius * u^(1/d), u uniform.
        distance = self.radius * torch.rand_like(_norms(direction)).pow(1 / dimensions)
        return direction * (distance / _norms(direction))

    def step(self, grad: torch.Tensor, size: float) -> torch.Tensor:
        """The perturbation of norm ``size`` along which a linear function with ``grad`` grows fastest."""
        if self.norm == "linf":
            return size * grad.sign()
        return grad * (size / _norms(grad))

    def project(self, perturbation: torch.Tensor) -> torch.Tensor:
        """The nearest point of the ball, image by image."""
        if self.norm == "linf":
            return perturbation.clamp(-self.radius, self.radius)
        return perturbation * (self.radius / _norms(perturbation)).clamp(max=1.0)


def _norms(x: torch.Tensor) -> torch.Tensor:
    """L2 norm of each image of (N, C, H, W), as (N, 1, 1, 1); never zero, so that it can divide."""
    return torch.linalg.vector_norm(x, dim=(1, 2, 3), keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)
