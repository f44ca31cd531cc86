"""What an adversary may do: move an image within a ball around it."""

import math
from dataclasses import dataclass

import torch

from rt_detectron.utils.errors import InputError


@dataclass(frozen=True)
class ThreatModel:
    """A norm ball of perturbations, in the unit the published checkpoints are named by.

    Attributes:
        norm: "l1", "l2" or "linf".
        eps: the ball's size. For "l1" and "l2" in units of images in [0, 1] (``3.0``); for "linf" in 1/255
            (``4.0`` moves every pixel by at most 4/255).
        scale: multiplies eps, in [0, 1]. Schedules change it; the nominal eps stays.
    """

    norm: str
    eps: float
    scale: float = 1.0

    def __post_init__(self):
        if self.norm not in ("l1", "l2", "linf"):
            raise InputError(f"threat model: norm {self.norm!r} is unknown; use 'l1', 'l2' or 'linf'")
        is_number = isinstance(self.eps, int | float) and not isinstance(self.eps, bool)
        if not (is_number and math.isfinite(self.eps) and self.eps >= 0):
            raise InputError(f"threat model: eps is {self.eps!r}; it must be a finite number >= 0")
        if self.norm == "linf" and 0 < self.eps < 0.1:
            raise InputError(
                f"threat model: a linf eps is written in units of 1/255, and {self.eps} would be next to "
                f"nothing; did you mean eps={self.eps * 255:g}?"
            )
        if self.norm == "linf" and self.eps > 255:
            raise InputError(
                f"threat model: a linf eps is written in units of 1/255; {self.eps} is more than all of 255"
            )

    @property
    def radius(self) -> float:
        """The ball's current radius, for images in [0, 1]."""
        return self.scale * (self.eps / 255 if self.norm == "linf" else self.eps)

    def random_start(self, images: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
        """Perturbations uniform in the ball, of the shape (N, C, H, W) of ``images``."""
        if self.norm == "linf":
            return torch.empty_like(images).uniform_(-self.radius, self.radius, generator=generator)
        dimensions = images[0].numel()
        direction = torch.empty_like(images).normal_(generator=generator)
        if self.norm == "l1":  # a Laplace vector has a uniform direction on the L1 sphere
            direction = direction.sign() * torch.empty_like(images).exponential_(generator=generator)
        # A uniform point of a d-dimensional ball lies at the distance radius * u^(1/d), u uniform.
        share = torch.empty_like(direction[:, :1, :1, :1]).uniform_(generator=generator)
        distance = self.radius * share.pow(1 / dimensions)
        return direction * (distance / _norms(direction, self.norm))

    def step(self, grad: torch.Tensor, size: float) -> torch.Tensor:
        """The perturbation of norm ``size`` along which a linear function with ``grad`` grows fastest.

        For "l1" that is a single pixel; as in sparse L1 descent (Tramer & Boneh 2019, section 3.1), the
        one percent of largest gradients share the step instead. Where ``grad`` is zero or not a number, the
        step is zero; infinity, which half precision overflows to, counts as large.
        """
        grad = torch.nan_to_num(grad)
        if self.norm == "linf":
            return size * grad.sign()
        if self.norm == "l1":
            flat = grad.flatten(1)
            places = flat.abs().topk(max(flat.shape[1] // 100, 1), dim=1).indices
            grad = torch.zeros_like(flat).scatter_(1, places, flat.gather(1, places).sign()).view_as(grad)
        # The squares of a confident network's gradients would all be zero.
        grad = grad / grad.abs().amax((1, 2, 3), keepdim=True).clamp_min(torch.finfo(grad.dtype).tiny)
        return grad * (size / _norms(grad, self.norm))

    def ascend(
        self, points: torch.Tensor, grad: torch.Tensor, size: float, images: torch.Tensor
    ) -> torch.Tensor:
        """``points`` after a step of norm ``size`` along ``grad``, within the ball and [0, 1].

        For "l1" the step goes to pixels that can still move; else black and white ones would take it all.
        """
        if self.norm == "l1":
            grad = grad.masked_fill(((points <= 0) & (grad < 0)) | ((points >= 1) & (grad > 0)), 0)
        return self.nearest(points + self.step(grad, size), images)

    def project(self, perturbation: torch.Tensor) -> torch.Tensor:
        """The nearest point of the ball, image by image."""
        if self.norm == "linf":
            return perturbation.clamp(-self.radius, self.radius)
        if self.norm == "l1":
            return _project_l1(perturbation, self.radius, torch.full_like(perturbation, math.inf))
        return perturbation * (self.radius / _norms(perturbation, "l2")).clamp(max=1.0)

    def nearest(self, points: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
        """Points in the ball around ``images`` and in [0, 1], near ``points``; all are (N, C, H, W).

        For "linf" and "l1" they are the nearest ones. To project onto an L1 ball and then clamp would leave
        much of eps unused, and overstate the robustness (Croce & Hein 2021, section 2,
        https://arxiv.org/abs/2103.01208). For "l2" that is accurate enough.
        """
        perturbation = points - images
        if self.norm != "l1":
            return self.project(perturbation).add_(images).clamp_(0, 1)
        room = torch.where(perturbation > 0, 1 - images, images)
        return _project_l1(perturbation, self.radius, room).add_(images).clamp_(0, 1)


def _norms(x: torch.Tensor, norm: str) -> torch.Tensor:
    """Norm of each image of (N, C, H, W), as (N, 1, 1, 1); never zero, so that it can divide."""
    order = 1 if norm == "l1" else 2
    return torch.linalg.vector_norm(x, order, dim=(1, 2, 3), keepdim=True).clamp_min(1e-12)


def _project_l1(x: torch.Tensor, radius: float, room: torch.Tensor) -> torch.Tensor:
    """The nearest point to ``x`` of L1 norm ``radius`` at most, with no entry larger than ``room``.

    That is soft thresholding, capped at ``room`` (Croce & Hein 2021, proposition 2.2). The norm is a
    piecewise linear function of the threshold: an entry begins to count where the threshold falls below its
    magnitude, and is capped from magnitude - room on.

    Args:
        x, room: (N, C, H, W); ``room`` is >= 0.
    """
    if radius == 0:
        return torch.zeros_like(x)
    magnitude, room = x.flatten(1).abs(), room.flatten(1)
    begins, ends = magnitude, (magnitude - room).clamp_min(0)
    thresholds, order = torch.cat([begins, ends], 1).sort(dim=1, descending=True)
    counted = torch.cat([torch.ones_like(begins), -torch.ones_like(ends)], 1).gather(1, order).cumsum(1)
    norms = (counted[:, :-1] * -thresholds.diff(dim=1)).cumsum(1)  # at each threshold but the first
    last = (norms <= radius).sum(1, keepdim=True)  # the lowest threshold that leaves a norm in the ball
    reached = torch.where(last > 0, norms.gather(1, (last - 1).clamp_min(0)), 0)
    below = (radius - reached) / counted.gather(1, last).clamp_min(1)
    threshold = (thresholds.gather(1, last) - below).clamp_min(0)
    return (x.flatten(1).sign() * (magnitude - threshold).clamp_min(0).minimum(room)).view_as(x)
