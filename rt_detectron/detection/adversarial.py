"""Adversarial fine-tuning of a detector at no cost beyond its training steps."""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from rt_detectron.attacks import ThreatModel
from rt_detectron.utils.errors import InputError


class FreeReplays:
    """A training loader whose batches are replayed on images that move against the detector
    (Shafahi et al. 2019, algorithm 1: "free" adversarial training).

    Each batch comes ``replays`` times in a row: first as it is, then moved by a step of eps along the
    gradient that the training step before left on its images, and so on, within the ball of
    ``threat_model`` and within black and white. So the attack costs no pass of its own; the number of
    iterations stays what it is, and covers so many fewer batches. Unlike the classifiers' images, those of
    detectors differ in size, so each batch starts without a perturbation.

    The perturbed images are float (3, H, W) in 0..255, as they are after resizing and before padding, which
    therefore stays as it is. They need a consumer that runs backward before it asks for the next batch, as
    Detectron2's trainers do.

    Args:
        loader: gives lists of dicts with an "image", uint8 (3, H, W).
        threat_model: "l2" or "linf", of one image in [0, 1] after resizing.
        replays: training steps for each batch.
        device: where perturbations are kept; the model's saves copying them.

    Raises:
        InputError: for another norm, or less than one replay.
    """

    def __init__(self, loader: Iterable, threat_model: ThreatModel, replays: int, device: str = "cpu"):
        if threat_model.norm not in ("l2", "linf"):
            raise InputError(f"adversarial training: norm {threat_model.norm!r} is not l2 or linf")
        if type(replays) is not int or replays < 1:
            raise InputError(f"adversarial training: {replays!r} replays; it must be a whole number >= 1")
        self.loader = loader
        self.threat_model = threat_model
        self.replays = replays
        self.device = device

    def __iter__(self) -> Iterator[list[dict]]:
        for batch in self.loader:
            images = [inputs["image"].to(self.device, torch.float32) for inputs in batch]
            moved = [torch.zeros_like(image) for image in images]
            for _ in range(self.replays):
                for perturbation in moved:
                    perturbation.requires_grad_(True)
                yield [
                    {**inputs, "image": _perturbed(image, perturbation)}
                    for inputs, image, perturbation in zip(batch, images, moved, strict=True)
                ]
                moved = [self._moved(perturbation) for perturbation in moved]

    @torch.no_grad()
    def _moved(self, perturbation: Tensor) -> Tensor:
        if perturbation.grad is None:  # a model that had nothing to learn from this image
            return perturbation.detach()
        step = self.threat_model.step(perturbation.grad[None], self.threat_model.radius)
        return self.threat_model.project(perturbation.detach()[None] + step)[0]


def replayed(loader: Iterable, device: str, replays: int, norm: str, eps: float) -> Iterable:
    """``loader`` under :class:`FreeReplays`; itself for 0 replays."""
    return FreeReplays(loader, ThreatModel(norm, eps), replays, device) if replays else loader


def _perturbed(image: Tensor, perturbation: Tensor) -> Tensor:
    """Within 0..255; its gradient is the image's own, which clamping would cut off at black and white."""
    perturbed = image + 255 * perturbation
    return perturbed + (perturbed.clamp(0, 255) - perturbed).detach()
