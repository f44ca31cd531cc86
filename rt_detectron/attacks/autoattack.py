"""AutoAttack, by its authors' own package."""

import functools
import logging
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rt_detectron.attacks.registry import register_attack
from rt_detectron.attacks.threat_model import ThreatModel
from rt_detectron.utils.errors import InputError, optional_import
from rt_detectron.utils.modes import eval_mode
from rt_detectron.utils.ranges import check_images

logger = logging.getLogger(__name__)

NORMS = {"l1": "L1", "l2": "L2", "linf": "Linf"}  # the package's spelling
DLR_CLASSES = 4  # the loss of targeted APGD compares the four largest logits
WITHOUT_DLR = ("apgd-ce", "fab-t", "square")  # the rest of the ensemble


@register_attack("autoattack", "autoattack")
@dataclass(frozen=True)
class AutoAttack:
    """The standard ensemble of APGD-CE, targeted APGD-DLR, targeted FAB and Square.

    It has no parameters to tune, and Square needs no gradients (Croce & Hein 2020,
    https://arxiv.org/abs/2003.01690). The loss DLR is defined for 4 classes or more; for fewer it is the
    ensemble of the other three, which is logged.

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

    def caveat(self, classes: int) -> str:
        """What is left out for a model of so many classes, for reports; "" if nothing is."""
        if classes >= DLR_CLASSES:
            return ""
        return f"AutoAttack without targeted APGD-DLR, which needs {DLR_CLASSES} classes, not {classes}"

    def __call__(self, model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        """As :meth:`Attack.__call__`; images that are misclassified already come back unchanged.

        Raises:
            InputError: for images outside [0, 1], and a model of a single class.
        """
        check_images(images)
        if self.threat_model.radius == 0:
            return images.detach()
        with eval_mode(model), torch.no_grad():
            classes = model(images[:1]).shape[1]
            attack = _package().AutoAttack(
                model,
                norm=NORMS[self.threat_model.norm],
                eps=self.threat_model.radius,
                device=images.device,
                seed=self.seed,
                **self._ensemble(classes),
            )
            for part in (attack.apgd_targeted, attack.fab):  # each target is another class than the label
                part.n_target_classes = min(part.n_target_classes, classes - 1)
            adversarial, _ = attack.run_standard_evaluation(images, labels, batch_size=len(images))
        return adversarial

    def _ensemble(self, classes: int) -> dict:
        if classes < 2:
            raise InputError("AutoAttack: the model has a single class, so it cannot be wrong")
        if not self.caveat(classes):
            return {"version": "standard"}
        _warn_once(self.caveat(classes))
        return {"version": "custom", "attacks": list(WITHOUT_DLR)}


@functools.cache
def _warn_once(caveat: str) -> None:
    logger.warning(caveat)


def _package():
    pyautoattack = optional_import("pyautoattack", "pyautoattack>=0.2", "AutoAttack")
    logging.getLogger("auto-attack").setLevel(logging.ERROR)  # it comments on every batch
    return pyautoattack
