"""Adversarial fine-tuning of a detector by "free" adversarial training."""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from rt_detectron.attacks import ThreatModel, free
from rt_detectron.detection.loader import batches_from
from rt_detectron.utils.errors import InputError


class FreeReplays:
    """A training loader that repeats each batch on perturbed images ("free" adversarial training).

    Each batch comes ``replays`` times in a row: first clean, then moved by a step of eps along the gradient
    that the previous training step left on its images, and so on (Shafahi et al. 2019, algorithm 1). The
    images stay within the ball of ``threat_model`` and within 0..255. So the attack costs no pass of its
    own; the same number of iterations covers ``replays`` times fewer batches. Unlike in pretraining, images
    differ in size, so each batch starts without a perturbation.

    The perturbed images are float (3, H, W) in 0..255, after resizing and before padding, so the padding is
    not perturbed. The consumer must run backward before it asks for the next batch, as Detectron2's trainers
    do.

    Args:
        loader: gives lists of dicts with an "image", uint8 (3, H, W).
        threat_model: "l2" or "linf", for one image in [0, 1] after resizing.
        replays: training steps on each batch.
        device: where perturbations are kept; on the model's own device they need no copy.

    Raises:
        InputError: for another norm, or fewer than one replay.
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
        self._current: list[Tensor] = []  # the perturbations of the batch in use
        self._left = 0  # how often that batch still comes
        self._restored: list[Tensor] | None = None

    def __iter__(self) -> Iterator[list[dict]]:
        return self.batches()

    def batches(self, start: int = 0) -> Iterator[list[dict]]:
        """Batches from iteration ``start`` on, if ``loader`` has ``batches``, too."""
        number, skipped = divmod(start, self.replays)
        if not hasattr(self.loader, "batches"):
            skipped, self._restored = 0, None
        for batch in batches_from(self.loader, number):
            images = [inputs["image"].to(self.device, torch.float32) for inputs in batch]
            moved = [torch.zeros_like(image) for image in images]
            if self._restored is not None:
                moved, self._restored = [image.to(self.device) for image in self._restored], None
            for left in reversed(range(self.replays - skipped)):
                for perturbation in moved:
                    perturbation.requires_grad_(True)
                self._current, self._left = moved, left
                yield [
                    {**inputs, "image": free.perturbed(image, 255 * perturbation, white=255)}
                    for inputs, image, perturbation in zip(batch, images, moved, strict=True)
                ]
                moved = [self._moved(perturbation) for perturbation in moved]
            skipped = 0

    def moved_images(self) -> list[Tensor]:
        """The perturbations that this batch comes with next, after a step on it; [] if it is done with."""
        return [self._moved(perturbation).detach().cpu() for perturbation in self._current if self._left]

    def go_on_with(self, moved_images: list[Tensor]) -> None:
        """Begin in the middle of a batch, with these perturbations of its images."""
        self._restored = moved_images or None

    def state_dict(self) -> dict:
        return self.loader.state_dict() if hasattr(self.loader, "state_dict") else {}

    def load_state_dict(self, state: dict) -> None:
        if hasattr(self.loader, "load_state_dict") and state:
            self.loader.load_state_dict(state)

    def _moved(self, perturbation: Tensor) -> Tensor:
        grad = perturbation.grad  # None if the model had nothing to learn from this image
        return free.moved(perturbation[None], None if grad is None else grad[None], self.threat_model)[0]


def replayed(loader: Iterable, device: str, replays: int, norm: str, eps: float) -> Iterable:
    """:class:`FreeReplays` of ``loader``, or ``loader`` itself for 0 replays."""
    return FreeReplays(loader, ThreatModel(norm, eps), replays, device) if replays else loader
