"""Clean and robust accuracy of a classifier, through Detectron2's evaluator interface."""

import torch
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm

from rt_detectron.attacks import PGD
from rt_detectron.pretrain.strategies import Pretraining


class AccuracyEvaluator(DatasetEvaluator):
    """Top-1 accuracy on clean images and on images made by an attack, in percent.

    Args:
        model: what is evaluated.
        attack: what the robust accuracy is measured under.
        max_attacked: attack only that many images, the first ones (each process its share); None is all.
    """

    def __init__(self, model: Pretraining, attack: PGD, max_attacked: int | None = None):
        self.model = model
        self.attack = attack
        self.max_attacked = max_attacked
        self.reset()

    def reset(self):
        self.seen = self.correct = self.attacked = self.withstood = 0

    def process(self, inputs, outputs: torch.Tensor):
        """``inputs``: the batch; ``outputs``: the clean logits (N, num_classes)."""
        images, labels = self.model.to_device(inputs)
        self.seen += len(labels)
        self.correct += (outputs.argmax(1) == labels).sum().item()
        if self.max_attacked is not None:
            left = self.max_attacked // comm.get_world_size() - self.attacked
            images, labels = images[: max(left, 0)], labels[: max(left, 0)]
        if len(labels):
            adversarial = self.attack(self.model.target(), images, labels)
            self.attacked += len(labels)
            self.withstood += (self.model.classifier(adversarial).argmax(1) == labels).sum().item()

    def evaluate(self):
        counts = comm.gather((self.seen, self.correct, self.attacked, self.withstood))
        if not comm.is_main_process():
            return {}
        seen, correct, attacked, withstood = (sum(column) for column in zip(*counts, strict=True))
        return {
            "accuracy": {
                "clean": 100 * correct / max(seen, 1),
                self.attack.name: 100 * withstood / max(attacked, 1),
                "images": seen,
                "attacked_images": attacked,
            }
        }
