"""Attacks on classifiers, and the names that stand for them, such as "pgd20"."""

import re
from collections.abc import Callable
from typing import Protocol

from torch import Tensor, nn

from rt_detectron.attacks.threat_model import ThreatModel
from rt_detectron.utils.errors import InputError


class Attack(Protocol):
    """What training, evaluation and reports need of an attack on a classifier.

    Three more attributes are optional. ``threat_model`` is the ball that the attack stays in; with it, a
    dataclass can be trained against under a schedule of eps. ``gradient_based`` says that the attack follows
    the gradient of the model's loss and nothing else, so that masked gradients mislead it.
    ``caveat(classes)`` says what a reader of its accuracies must know, for so many classes; "" for nothing.
    """

    @property
    def name(self) -> str:
        """In tables and reports, such as "pgd20"."""

    def __call__(self, model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        """Adversarial images.

        Args:
            model: maps images in [0, 1] to logits; normalisation is part of it. Its mode, parameters,
                gradients and buffers are afterwards as they were.
            images: (N, C, H, W), float, in [0, 1].
            labels: (N,), int64.

        Returns:
            (N, C, H, W) images in [0, 1], detached.

        Raises:
            InputError: for images outside [0, 1], see :func:`rt_detectron.utils.ranges.check_images`.
        """


_ATTACKS: dict[str, tuple[str, Callable[..., Attack]]] = {}  # by the pattern of their names


def register_attack(pattern: str, usage: str) -> Callable:
    """Decorate what makes an attack: from then on :func:`attack_named` knows its names.

    Every module of :mod:`rt_detectron.attacks` is imported with it, so a new file there is all that a new
    attack takes.

    Args:
        pattern: a regular expression that its names match as a whole.
        usage: an example of a name, for messages.

    Returns:
        A decorator of a class or function that takes a :class:`ThreatModel`, a seed, and the groups of
        ``pattern`` as text, None for one that is not there.
    """

    def register(constructor: Callable[..., Attack]):
        _ATTACKS[pattern] = usage, constructor
        return constructor

    return register


def attack_named(name: str, threat_model: ThreatModel, seed: int = 0) -> Attack:
    """The attack that a name stands for, such as "pgd20", "pgd100x5" or "autoattack".

    Raises:
        InputError: for an unknown name.
    """
    for pattern, (_, constructor) in _ATTACKS.items():
        if match := re.fullmatch(pattern, name):
            return constructor(threat_model, seed, *match.groups())
    usages = ", ".join(sorted(usage for usage, _ in _ATTACKS.values()))
    raise InputError(f"attack {name!r} is unknown; use e.g. {usages}")
