"""What one training step optimises."""

import torch
import torch.nn.functional as F
from torch import nn

from rt_detectron.attacks import PGD
from rt_detectron.modeling.classifier import Classifier


class Pretraining(nn.Module):
    """A classifier and how it is trained, as Detectron2's trainers want it: a batch to a dict of losses.

    Args:
        classifier: what is trained.
        attack: trains on adversarial images made by it (Madry et al. 2018); None is standard training.
    """

    def __init__(self, classifier: Classifier, attack: PGD | None = None):
        super().__init__()
        self.classifier = classifier
        self.attack = attack

    def forward(self, batch):
        """In training mode a dict of losses, in eval mode the logits (N, num_classes) of the clean images.

        Args:
            batch: images (N, 3, H, W), float in [0, 1] or uint8, and labels (N,).
        """
        images, labels = self.to_device(batch)
        if not self.training:
            return self.classifier(images)
        if self.attack is not None:
            images = self.attack(self.classifier, images, labels)
        return {"loss": F.cross_entropy(self.classifier(images), labels)}

    def to_device(self, batch) -> tuple[torch.Tensor, torch.Tensor]:
        """The batch on the model's device, images as float in [0, 1]."""
        images, labels = (part.to(self.classifier.mean.device, non_blocking=True) for part in batch)
        if images.dtype == torch.uint8:
            images = images.float() / 255
        return images, labels
