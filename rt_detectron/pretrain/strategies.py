"""Training strategies: which images a step trains on, and which losses it minimises."""

import logging
import math
from dataclasses import is_dataclass, replace

import torch
import torch.nn.functional as F
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage
from torch import Tensor, nn

from rt_detectron.attacks import PGD, ThreatModel, free
from rt_detectron.attacks.registry import Attack
from rt_detectron.pretrain.schedules import FULL_STRENGTH, EpsSchedule
from rt_detectron.utils.errors import InputError
from rt_detectron.utils.modes import eval_mode

logger = logging.getLogger(__name__)
POOL = 200  # images: fewer than 100 or so give false alarms, as when a growing part of a batch is attacked


class Standard:
    """Cross-entropy on the clean images, and what every strategy derives from.

    A strategy is stated in a recipe, ``L(Strategy)(...)``. It may have ``state_dict`` and
    ``load_state_dict``, which then become part of the checkpoints: that of the first process.

    Attributes:
        attack: what the classifier is trained against; None if nothing or no attack of its own.
        threat_model: that of the training; it goes into the metadata of the weights.
        replays: steps in a row on each batch.
        needs_weights: whether it only makes sense for a network that is pretrained already.
        has_head: whether the last linear layer is trained; else it is neither evaluated nor exported.
        compilable: whether it asks for nothing but the logits, as ``train.compile`` needs it.
    """

    attack: Attack | None = None
    threat_model: ThreatModel | None = None
    replays = 1
    needs_weights = False
    has_head = True
    compilable = True

    def begin(self, classifier: nn.Module, has_head: bool) -> None:
        """Called before the optimiser is built; a resumed training restores the strategy's state after it.

        Args:
            classifier: with the weights that the training starts from, unless it is resumed.
            has_head: whether the last linear layer is among them, if they are pretrained.
        """

    def state_of_process(self) -> dict:
        """What each process needs for itself to go on, as torch saves it."""
        return {}

    def load_state_of_process(self, states: list[dict]) -> None:
        """Take over what :meth:`state_of_process` gave in each process, however many there were."""

    def begin_step(self, images: Tensor) -> None:
        """Called with (N, 3, H, W) in [0, 1] before they are perturbed, in the precision of the training."""

    def perturb(self, model: nn.Module, images: Tensor, labels: Tensor, progress: float) -> Tensor:
        """The images to train on.

        Args:
            model: what is attacked: the same function as the classifier in eval mode, but faster.
            images: (N, 3, H, W) in [0, 1].
            labels: (N,).
            progress: share of the training that is done, in [0, 1).

        Returns:
            (N, 3, H, W) in [0, 1].
        """
        return images

    def losses(
        self, classifier: nn.Module, images: Tensor, adversarial: Tensor, labels: Tensor
    ) -> dict[str, Tensor]:
        """The scalars whose sum a step minimises, by name.

        Args:
            classifier: what is trained, in train mode.
            images: (N, 3, H, W) in [0, 1].
            adversarial: what :meth:`perturb` made of them.
            labels: (N,).
        """
        return {"loss": F.cross_entropy(classifier(adversarial), labels)}


class Adversarial(Standard):
    """Cross-entropy on adversarial images (Madry et al. 2018).

    Args:
        attack: any attack on classifiers, see :class:`rt_detectron.attacks.registry.Attack`.
        schedule: of the attack's strength. One that changes eps needs an attack with a ``threat_model``.

    Raises:
        InputError: for what is no attack, and for an attack that cannot follow the schedule.
    """

    attack: Attack

    def __init__(self, attack: Attack, schedule: EpsSchedule = FULL_STRENGTH):
        strategy = type(self).__name__
        if not callable(attack) or not hasattr(attack, "name"):
            raise InputError(f"{strategy}: attack is {attack!r}; it must be an attack, such as PGD")
        self.attack = attack
        self.schedule = schedule
        self.threat_model = getattr(attack, "threat_model", None)
        if schedule.changes_eps and not (self.threat_model and is_dataclass(attack)):
            raise InputError(
                f"{strategy}: the schedule changes eps, but {attack.name} has no threat_model to scale"
            )

    def check_takes_other_loss(self) -> None:
        """Raise :class:`InputError` unless the attack is a PGD that begins beside the image.

        For losses whose gradient is zero at the image.
        """
        strategy = type(self).__name__
        if not isinstance(self.attack, PGD):
            raise InputError(
                f"{strategy}: attack is {self.attack.name}; it must be a PGD, which takes another loss"
            )
        if not self.attack.random_start:
            raise InputError(f"{strategy}: the attack cannot leave the image; set attack.random_start=True")

    def attack_now(self, progress: float) -> Attack:
        """The attack at its present strength."""
        if not self.schedule.changes_eps:
            return self.attack
        assert self.threat_model is not None  # as __init__ has checked, and the next, too
        assert is_dataclass(self.attack)
        scaled = replace(self.threat_model, scale=self.schedule(progress))
        return replace(self.attack, threat_model=scaled)

    def perturb(self, model, images, labels, progress):
        # Of the batch of all processes, of which this one has the images [rank :: processes].
        attacked = self.schedule.attacked(len(images) * comm.get_world_size(), progress)
        count = len(range(comm.get_rank(), attacked, comm.get_world_size()))
        if count == 0:
            return images
        adversarial = self._perturb(self.attack_now(progress), model, images[:count], labels[:count])
        return torch.cat([adversarial, images[count:]]) if count < len(images) else adversarial

    def _perturb(self, attack: Attack, model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        """What ``attack``, at its present strength, makes of the images that are attacked."""
        return attack(model, images, labels)


class Fast(Adversarial):
    """A single step of 1.25 eps from a random start (Wong et al. 2020, algorithm 3).

    It comes with a check for catastrophic overfitting (Andriushchenko & Flammarion 2020): within an epoch,
    the network can learn to withstand the single step by bending its loss surface, and lose its robustness
    to anything else. So every ``check_every`` steps the same batch is attacked with five steps as well. If
    of 200 images or more, from as many of these batches as it takes, less than half as many withstand five
    steps as one step, twice in a row, a warning is logged. Both accuracies go to Detectron2's event storage.
    Each process judges by its own images.

    Args:
        threat_model: of the training.
        schedule: of the attack's strength.
        check_every: steps between two checks. Each check costs about five forward and backward passes.
        random_start: False takes a step of eps from the image (Goodfellow et al. 2015). From a random point
            of an L2 ball a step goes mostly sideways, and moves less than eps along the gradient.
    """

    def __init__(
        self,
        threat_model: ThreatModel,
        schedule: EpsSchedule = FULL_STRENGTH,
        check_every: int = 100,
        random_start: bool = True,
    ):
        if type(check_every) is not int or check_every < 1:
            raise InputError(f"Fast: check_every is {check_every!r}; it must be a whole number >= 1")
        size = 1.25 if random_start else 1.0
        super().__init__(
            PGD(threat_model, steps=1, relative_step_size=size, random_start=random_start), schedule
        )
        self.check_every = check_every
        self.seen = self.suspicions = 0
        self.pooled = [0, 0, 0]  # images, and how many of them withstand one step and five

    def _perturb(self, attack, model, images, labels):
        adversarial = attack(model, images, labels)
        if self.seen % self.check_every == self.check_every - 1:
            five_steps = replace(attack, steps=5, relative_step_size=2.5)
            self._check_overfitting(model, adversarial, five_steps(model, images, labels), labels)
        self.seen += 1
        return adversarial

    @torch.no_grad()
    def _check_overfitting(self, model, single: Tensor, several: Tensor, labels: Tensor) -> None:
        """``single`` and ``several``: the images after one and after five steps."""
        with eval_mode(model):
            right = [(model(images).argmax(1) == labels).sum().item() for images in (single, several)]
        images, one, five = (sum(pair) for pair in zip(self.pooled, (len(labels), *right), strict=True))
        self.pooled = [images, one, five]
        if images < POOL:
            return
        self.pooled = [0, 0, 0]
        one, five = one / images, five / images
        get_event_storage().put_scalars(
            fast_accuracy=100 * one, fast_accuracy_pgd5=100 * five, smoothing_hint=False
        )
        # At 20 % or less the network has not learned enough to tell.
        self.suspicions = self.suspicions + 1 if one > 0.2 and five < one / 2 else 0
        if self.suspicions == 2:
            logger.warning(
                "catastrophic overfitting: accuracy is %.0f %% under the single step of training, but only "
                "%.0f %% under five steps. Go back to an earlier checkpoint and train with a smaller eps, or "
                "with strategy Adversarial and 2 or more steps.",
                100 * one,
                100 * five,
            )

    def state_dict(self) -> dict:
        return {"seen": self.seen, "suspicions": self.suspicions, "pooled": self.pooled}

    def load_state_dict(self, state: dict) -> None:
        self.seen, self.suspicions = state["seen"], state["suspicions"]
        self.pooled = state.get("pooled", [0, 0, 0])  # older checkpoints have none


class Free(Standard):
    """ "Free" adversarial training: several steps on each batch, whose backward passes also give the attack.

    So the attack costs no pass of its own (Shafahi et al. 2019, algorithm 1). The perturbation is kept from
    batch to batch.

    Args:
        threat_model: "linf" or "l2".
        replays: optimiser steps on each batch. Divide the number of epochs by it.
        schedule: of eps.
    """

    def __init__(self, threat_model: ThreatModel, replays: int = 4, schedule: EpsSchedule = FULL_STRENGTH):
        if not isinstance(threat_model, ThreatModel) or threat_model.norm == "l1":
            raise InputError(f"Free: threat_model is {threat_model!r}; it must be a ThreatModel, l2 or linf")
        if type(replays) is not int or replays < 1:
            raise InputError(f"Free: replays is {replays!r}; it must be a whole number >= 1")
        if schedule.grows != "eps":
            raise InputError("Free: whole batches are attacked, at no extra cost; grows must be 'eps'")
        self.threat_model = threat_model
        self.replays = replays
        self.schedule = schedule
        self.perturbation: Tensor | None = None

    def perturb(self, model, images, labels, progress):
        scaled = replace(self.threat_model, scale=self.schedule(progress))
        last, grad = self.perturbation, None
        if last is None or last.shape != images.shape:
            last = torch.zeros_like(images)
        elif last.grad is not None:
            grad = last.grad.to(images)
        self.perturbation = free.moved(last.to(images), grad, scaled).requires_grad_(True)
        return free.perturbed(images, self.perturbation)

    def state_of_process(self) -> dict:
        last = self.perturbation
        if last is None:
            return {}
        parts = {"perturbation": last.detach(), "grad": last.grad}
        return {name: part.cpu() for name, part in parts.items() if part is not None}

    def load_state_of_process(self, states: list[dict]) -> None:
        """Process r of w has the images [r::w] of a batch, so any number of processes can go on."""
        if not states or not states[0]:
            return
        whole = {name: torch.stack([s[name] for s in states], 1).flatten(0, 1) for name in states[0]}
        mine = slice(comm.get_rank(), None, comm.get_world_size())
        self.perturbation = whole["perturbation"][mine].clone()
        self.perturbation.grad = whole["grad"][mine].clone() if "grad" in whole else None


class Trades(Adversarial):
    """TRADES: cross-entropy on clean images plus ``beta`` times the divergence that the attack causes.

    The divergence is that of Kullback and Leibler, from the prediction on the clean image to that on the
    adversarial one (Zhang et al. 2019, equation 5).

    Args:
        attack: a PGD, which here maximises the divergence. It needs a random start, since the divergence has
            no gradient at the clean image.
        beta: a larger one gives more robustness and less clean accuracy; the authors use 6.
        schedule: of the attack's strength.
    """

    def __init__(self, attack: PGD, beta: float = 6.0, schedule: EpsSchedule = FULL_STRENGTH):
        super().__init__(attack, schedule)
        self.check_takes_other_loss()
        if type(beta) not in (int, float) or not 0 <= beta < math.inf:
            raise InputError(f"Trades: beta is {beta!r}; it must be a finite number >= 0")
        self.beta = beta

    def _perturb(self, attack, model, images, labels):
        with torch.no_grad(), eval_mode(model):
            clean = model(images).softmax(1)
        return attack(model, images, clean, loss=_divergence)

    def losses(self, classifier, images, adversarial, labels):
        logits, attacked = classifier(images), classifier(adversarial)
        return {
            "loss_clean": F.cross_entropy(logits, labels),
            "loss_robust": self.beta * _divergence(attacked, logits.softmax(1)).mean(),
        }


def _divergence(logits: Tensor, probabilities: Tensor) -> Tensor:
    """KL(probabilities || softmax(logits)), (N,)."""
    return F.kl_div(logits.log_softmax(1), probabilities, reduction="none").sum(1)
