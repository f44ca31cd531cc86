"""The perturbations of "free" adversarial training (Shafahi et al. 2019, algorithm 1).

They move along the gradient that the training step before left on them, so the attack costs no pass of its
own.
"""

import torch
from torch import Tensor

from rt_detectron.attacks.threat_model import ThreatModel


def perturbed(images: Tensor, perturbation: Tensor, white: float = 1.0) -> Tensor:
    """``images + perturbation`` within 0 (black) and ``white``.

    The perturbation gets the gradient of the image, which clamping would cut off at black and white.
    """
    adversarial = images + perturbation
    return adversarial + (adversarial.clamp(0, white) - adversarial).detach()


@torch.no_grad()
def moved(perturbation: Tensor, grad: Tensor | None, threat_model: ThreatModel) -> Tensor:
    """The next perturbation: a step of eps along ``grad``, projected into the ball.

    Args:
        perturbation: (N, C, H, W), of images in [0, 1].
        grad: of the loss; None if there was none to follow.
    """
    if grad is not None:
        perturbation = perturbation + threat_model.step(grad, threat_model.radius)
    return threat_model.project(perturbation.detach())
