"""Attacks on semantic segmentation: the three losses of the Segmentation Ensemble Attack (SEA).

Croce, Singh & Hein (ECCV 2024), "Towards Reliable Evaluation and Fast Training of Robust Semantic
Segmentation Models", https://arxiv.org/abs/2306.12941, section 3. The number to report is the worst case over
the three.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rt_detectron.attacks.detection import LossAttack, register_detector_attack
from rt_detectron.attacks.losses import LossesFunction, segmentor_losses
from rt_detectron.utils.errors import InputError


class SegmentationAttack(LossAttack):
    """Raises a loss of the segmentation's pixels, their mean over all that have a label.

    The objective's value is the Jensen-Shannon divergence for each of the three, since the masked losses fall
    where an attack succeeds: the value says which iterate or restart is the strongest, the loss only gives
    the gradient.
    """

    terms, task = ("loss_sem_seg",), "sem_seg"

    def losses_function(self, model: nn.Module) -> LossesFunction:
        if not hasattr(model, "sem_seg_head"):
            raise InputError(f"attack: {self.name} is for semantic segmentation, and this model has none")
        return segmentor_losses

    def replaced_losses(self, model: nn.Module) -> dict[nn.Module, Callable]:
        return {model.sem_seg_head: self._losses}

    def _losses(self, head: nn.Module, predictions: Tensor, targets: Tensor) -> dict[str, Tensor]:
        logits = F.interpolate(
            predictions.float(), scale_factor=head.common_stride, mode="bilinear", align_corners=False
        )
        labelled = targets != head.ignore_value
        logits, labels = logits.permute(0, 2, 3, 1)[labelled], targets[labelled]  # (P, K) and (P,)
        count = max(len(labels), 1)
        loss = self.pixel_losses(logits, labels).sum() / count
        value = jensen_shannon(logits.detach(), labels).sum() / count
        return {"loss_sem_seg": loss + (value - loss).detach()}

    def pixel_losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        """(P,) from (P, K) and (P,), of the P pixels that have a label."""
        raise NotImplementedError


@register_detector_attack
class JensenShannon(SegmentationAttack):
    """Raises the Jensen-Shannon divergence, whose gradient vanishes for pixels that are wrong already."""

    name = "JS"

    def pixel_losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        return jensen_shannon(logits, labels)


@register_detector_attack
class MaskedCrossEntropy(SegmentationAttack):
    """Raises the cross entropy of the pixels that are right."""

    name = "MCE"

    def pixel_losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits, labels, reduction="none") * (logits.argmax(1) == labels)


@register_detector_attack
class BalancedCrossEntropy(MaskedCrossEntropy):
    """The same, where a pixel counts as the inverse of its class's number of pixels in the data set."""

    name, needs_pixel_counts = "MCE_Bal", True

    def pixel_losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        if len(self.pixel_counts) != logits.shape[1]:
            raise InputError(
                f"attack: {self.name} got the pixels of {len(self.pixel_counts)} classes; the model has "
                f"{logits.shape[1]}"
            )
        counts = torch.tensor(self.pixel_counts, dtype=torch.float64, device=logits.device)
        weights = counts.sum() / counts.clamp_min(1) / len(counts)
        return super().pixel_losses(logits, labels) * weights.to(logits)[labels]


def jensen_shannon(logits: Tensor, labels: Tensor) -> Tensor:
    """(P,) divergence between the softmax of (P, K) logits and the one-hot labels (P,), 0 to ln 2.

    With p the probability of the true class and m = (1 + p) / 2, it is the mean of KL(onehot, mixture), which
    is -ln m, and KL(softmax, mixture), which is p ln(p / m) + (1 - p) ln 2.
    """
    log_p = F.log_softmax(logits, 1).gather(1, labels[:, None])[:, 0]
    p = log_p.exp()
    log_m = torch.log1p(p) - math.log(2)
    return (-log_m + p * (log_p - log_m) + (1 - p) * math.log(2)) / 2
