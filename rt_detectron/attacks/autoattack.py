"""AutoAttack, by its authors' own package."""

import logging
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rt_detectron.attacks.registry import register_attack
from rt_detectron.attacks.threat_model import ThreatModel
from rt_detectron.utils.errors import InputError, optional_import
from rt_detectron.utils.modes import eval_mode

NORMS = {"l1": "L1", "l2": "L2", "linf": "Linf"}  # the package's spelling
MIN_CLASSES = 4  # the loss of its targeted attack compares the four largest logits


@register_attack("autoattack", "autoattack")
@dataclass(frozen=True)
class AutoAttack:
    """The standard ensemble of APGD-CE, targeted APGD-DLR, targeted FAB and Square.

    It has no parameters to tune, and Square needs no gradients (Croce & Hein 2020,
    https://arxiv.org/abs/2003.01690).

    Attributes:
        threat_model: the ball the perturbation stays in.
        seed: for its random numbers.

    Raises:
        InputError: without the package, which the extra "autoattack" installs.
    """

    threat_model: ThreatModel
    seed: int = 0

    name = "autoattack"

    def __post_init__(self):
        _package()

    def __call__(self, model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        """As :meth:`Attack.__call__`; images that are misclassified already come back unchanged.

        Raises:
            InputError: for a model of fewer than 4 classes.
        """
        with eval_mode(model), torch.no_grad():
            classes = model(images[:1]).shape[1]
            if classes < MIN_CLASSES:
                raise InputError(f"AutoAttack needs at least {MIN_CLASSES} classes; this model has {classes}")
            attack = _package().AutoAttack(
                model,
                norm=NORMS[self.threat_model.norm],
                eps=self.threat_model.radius,
                device=images.device,
                seed=self.seed,
            )
            for part in (attack.apgd_targeted, attack.fab):  # each target is another class than the label
                part.n_target_classes = min(part.n_target_classes, classes - 1)
            adversarial, _ = attack.run_standard_evaluation(images, labels, batch_size=len(images))
        return adversarial


def _package():
    pyautoattack = optional_import("pyautoattack", "pyautoattack>=0.2", "AutoAttack")
    logging.getLogger("auto-attack").setLevel(logging.ERROR)  # it comments on every batch
    return pyautoattack
