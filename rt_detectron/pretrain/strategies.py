"""What one training step optimises: clean images, or those of an adversary."""

import logging
import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from detectron2.utils.events import get_event_storage
from torch import Tensor, fx, nn

from rt_detectron.attacks import PGD, ThreatModel
from rt_detectron.layers.folding import FoldedNetwork
from rt_detectron.modeling.classifier import Classifier
from rt_detectron.utils.errors import InputError
from rt_detectron.utils.modes import eval_mode

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class EpsSchedule:
    """What an adversary may do while training goes on.

    Attributes:
        clean: share of the training in which it may do nothing. Its steps are on clean images, and cost no
            attack: a network that has learned something is made robust in less time than one that starts
            from nothing.
        warmup: share of the training over which it then gains its full strength, linearly from 0.
        grows: in the warm-up. "eps": all images are attacked, with a part of eps. "images": a part of each
            batch is attacked, with all of eps, which costs as much less.
        random: of the eps that the warm-up allows, every batch gets a uniformly random part.
    """

    clean: float = 0.0
    warmup: float = 0.0
    grows: str = "eps"
    random: bool = False

    def __post_init__(self):
        for name in ("clean", "warmup"):
            value = getattr(self, name)
            if type(value) not in (int, float) or not 0 <= value <= 1:
                raise InputError(f"eps schedule: {name} is {value!r}; it is a share of training, 0 to 1")
        if self.grows not in ("eps", "images"):
            raise InputError(f"eps schedule: grows is {self.grows!r}; it must be 'eps' or 'images'")

    def __call__(self, progress: float) -> float:
        """The part of eps, in [0, 1], after the share ``progress`` of the training."""
        scale = self._strength(progress) if self.grows == "eps" else 1.0
        return scale * torch.rand(()).item() if self.random else scale

    def attacked(self, images: int, progress: float) -> int:
        """How many of a batch's ``images`` are attacked."""
        return round(images * self._strength(progress)) if self.grows == "images" else images

    def _strength(self, progress: float) -> float:
        if progress < self.clean:
            return 0.0
        return min((progress - self.clean) / self.warmup, 1.0) if self.warmup else 1.0


class Standard:
    """Cross-entropy on the images as they are."""

    threat_model: ThreatModel | None = None
    replays = 1

    def perturb(self, target: nn.Module, images: Tensor, labels: Tensor, progress: float) -> Tensor:
        """The images that an adversary makes of ``images``.

        Args:
            target: what it attacks: the same function as the classifier in eval mode.
            images: (N, 3, H, W) in [0, 1].
            labels: (N,).
            progress: share of the training that is done, in [0, 1).
        """
        return images

    def losses(
        self, classifier: nn.Module, images: Tensor, adversarial: Tensor, labels: Tensor
    ) -> dict[str, Tensor]:
        """What a step minimises.

        Args:
            classifier: what learns, in train mode.
            images: (N, 3, H, W) in [0, 1].
            adversarial: what :meth:`perturb` made of them.
            labels: (N,).
        """
        return {"loss": F.cross_entropy(classifier(adversarial), labels)}


class Adversarial(Standard):
    """Cross-entropy on the images that ``attack`` makes (Madry et al. 2018).

    Args:
        attack: of the inner maximisation.
        schedule: of its eps.
    """

    def __init__(self, attack: PGD, schedule: EpsSchedule = EpsSchedule()):
        if not isinstance(attack, PGD):
            raise InputError(f"{type(self).__name__}: attack is {attack!r}; it must be a PGD")
        self.attack = attack
        self.schedule = schedule
        self.threat_model = attack.threat_model

    def attack_now(self, progress: float) -> PGD:
        scaled = replace(self.threat_model, scale=self.schedule(progress))
        return replace(self.attack, threat_model=scaled)

    def perturb(self, target, images, labels, progress):
        count = self.schedule.attacked(len(images), progress)
        if count == 0:
            return images
        adversarial = self._perturb(self.attack_now(progress), target, images[:count], labels[:count])
        return torch.cat([adversarial, images[count:]]) if count < len(images) else adversarial

    def _perturb(self, attack: PGD, target: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        """The images that are attacked, after the attack of now."""
        return attack(target, images, labels)


class Fast(Adversarial):
    """A single step of 1.25 eps from a random start (Wong et al. 2020, algorithm 3), and a look-out.

    Single-step training can collapse from one epoch to the next: the network withstands the single step by
    bending its loss surface, and nothing else ("catastrophic overfitting"; Andriushchenko & Flammarion
    2020). So every ``check_every`` steps the same batch is attacked by five steps; if, twice in a row, less
    than half of what withstood one step withstands five, a warning says so. Both accuracies go to
    Detectron2's event storage.

    Args:
        threat_model: of the training.
        schedule: of its eps.
        check_every: steps between two look-outs; each costs about five forward and backward passes.
    """

    def __init__(
        self, threat_model: ThreatModel, schedule: EpsSchedule = EpsSchedule(), check_every: int = 100
    ):
        if type(check_every) is not int or check_every < 1:
            raise InputError(f"Fast: check_every is {check_every!r}; it must be a whole number >= 1")
        super().__init__(PGD(threat_model, steps=1, relative_step_size=1.25, random_start=True), schedule)
        self.check_every = check_every
        self.seen = self.suspicions = 0

    def _perturb(self, attack, target, images, labels):
        adversarial = attack(target, images, labels)
        if self.seen % self.check_every == self.check_every - 1:
            several = replace(attack, steps=5, relative_step_size=2.5)
            self._look_out(target, adversarial, several(target, images, labels), labels)
        self.seen += 1
        return adversarial

    @torch.no_grad()
    def _look_out(self, target, single: Tensor, several: Tensor, labels: Tensor) -> None:
        with eval_mode(target):
            one, five = (
                (target(adversarial).argmax(1) == labels).float().mean().item()
                for adversarial in (single, several)
            )
        get_event_storage().put_scalars(
            fast_accuracy=100 * one, fast_accuracy_pgd5=100 * five, smoothing_hint=False
        )
        # A network that has learned nothing withstands nothing, either.
        self.suspicions = self.suspicions + 1 if one > 0.2 and five < one / 2 else 0
        if self.suspicions == 2:
            logger.warning(
                "catastrophic overfitting: %.0f %% of the batch withstand the single step of training, but "
                "only %.0f %% withstand five. Go back to a checkpoint before this and train with a smaller "
                "eps or with strategy Adversarial and 2 or more steps.",
                100 * one,
                100 * five,
            )

    def state_dict(self) -> dict:
        return {"seen": self.seen, "suspicions": self.suspicions}

    def load_state_dict(self, state: dict) -> None:
        self.seen, self.suspicions = state["seen"], state["suspicions"]


class Free(Standard):
    """Every batch ``replays`` times in a row, the perturbation moving with the weights' own backward pass
    (Shafahi et al. 2019, algorithm 1), so that attacking costs no pass of its own.

    The perturbation is kept from batch to batch.

    Args:
        threat_model: "linf" or "l2".
        replays: optimiser steps for each batch; train for as many fewer epochs.
        schedule: of its eps.
    """

    def __init__(self, threat_model: ThreatModel, replays: int = 4, schedule: EpsSchedule = EpsSchedule()):
        if not isinstance(threat_model, ThreatModel) or threat_model.norm == "l1":
            raise InputError(f"Free: threat_model is {threat_model!r}; it must be a ThreatModel, l2 or linf")
        if type(replays) is not int or replays < 1:
            raise InputError(f"Free: replays is {replays!r}; it must be a whole number >= 1")
        if schedule.grows != "eps":
            raise InputError("Free: whole batches are attacked, at no cost; grows must be 'eps'")
        self.threat_model = threat_model
        self.replays = replays
        self.schedule = schedule
        self.perturbation: Tensor | None = None

    def perturb(self, target, images, labels, progress):
        now = replace(self.threat_model, scale=self.schedule(progress))
        perturbation = self._moved(now, images)
        self.perturbation = perturbation.requires_grad_(True)
        # Its gradient is that of the image, which clamping would cut off at black and white.
        adversarial = images + self.perturbation
        return adversarial + (adversarial.clamp(0, 1) - adversarial).detach()

    @torch.no_grad()
    def _moved(self, now: ThreatModel, images: Tensor) -> Tensor:
        """The last perturbation, a step of eps along the gradient that the last backward pass left on it."""
        last = self.perturbation
        if last is None or last.shape != images.shape:
            return torch.zeros_like(images)
        last = last.to(images)
        if self.perturbation.grad is not None:
            last = last + now.step(self.perturbation.grad.to(images), now.radius)
        return now.project(last)

    def state_dict(self) -> dict:
        if self.perturbation is None:
            return {}
        return {"perturbation": self.perturbation.detach(), "grad": self.perturbation.grad}

    def load_state_dict(self, state: dict) -> None:
        if state:
            self.perturbation = state["perturbation"].clone()
            self.perturbation.grad = state["grad"]


class Trades(Adversarial):
    """Cross-entropy on clean images plus ``beta`` times how far the attack moves the prediction
    (Zhang et al. 2019, equation 5).

    Args:
        attack: maximises the Kullback-Leibler divergence from the clean prediction. It needs a random start,
            since the divergence has no gradient at the image itself.
        beta: more of it, more robustness and less clean accuracy; the authors use 6.
        schedule: of its eps.
    """

    def __init__(self, attack: PGD, beta: float = 6.0, schedule: EpsSchedule = EpsSchedule()):
        super().__init__(attack, schedule)
        if not attack.random_start:
            raise InputError("Trades: the attack cannot leave the image; set attack.random_start=True")
        if type(beta) not in (int, float) or not 0 <= beta < math.inf:
            raise InputError(f"Trades: beta is {beta!r}; it must be a finite number >= 0")
        self.beta = beta

    def _perturb(self, attack, target, images, labels):
        with torch.no_grad(), eval_mode(target):
            clean = target(images).softmax(1)
        return attack(target, images, clean, loss=_divergence)

    def losses(self, classifier, images, adversarial, labels):
        logits, attacked = classifier(images), classifier(adversarial)
        return {
            "loss_clean": F.cross_entropy(logits, labels),
            "loss_robust": self.beta * _divergence(attacked, logits.softmax(1)).mean(),
        }


def _divergence(logits: Tensor, probabilities: Tensor) -> Tensor:
    """KL(probabilities || softmax(logits)), (N,)."""
    return F.kl_div(logits.log_softmax(1), probabilities, reduction="none").sum(1)


@dataclass(frozen=True)
class Resolution:
    """Smaller images at first, which cost less (progressive resizing; Howard 2018).

    eps stays what it is, so at half the side an l2 eps moves each pixel twice as far.

    Attributes:
        start: side in pixels at the beginning; the loader's images tell what it grows to, linearly.
        until: share of the training after which images have their full size.
        multiple: sides are multiples of it, so that they are few and fit the network's strides.
    """

    start: int
    until: float
    multiple: int = 32

    def __post_init__(self):
        for name in ("start", "multiple"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise InputError(f"Resolution: {name} is {value!r}; it must be a whole number of pixels >= 1")
        if type(self.until) not in (int, float) or not 0 <= self.until <= 1:
            raise InputError(f"Resolution: until is {self.until!r}; it is a share of training, 0 to 1")

    def side(self, full: int, progress: float) -> int:
        """Of images whose shorter side is ``full``, after the share ``progress`` of the training."""
        if progress >= self.until or self.start >= full:
            return full
        side = self.start + (full - self.start) * progress / self.until
        return min(max(round(side / self.multiple), 1) * self.multiple, full)

    def __call__(self, images: Tensor, progress: float) -> Tensor:
        """(N, 3, H, W) in [0, 1] to the same, made smaller."""
        full = min(images.shape[2:])
        side = self.side(full, progress)
        if side == full:
            return images
        size = [round(length * side / full) for length in images.shape[2:]]
        return F.interpolate(images, size, mode="bilinear", antialias=True)


class Pretraining(nn.Module):
    """A classifier and how it is trained, as Detectron2's trainers want it: a batch to a dict of losses.

    Args:
        classifier: what is trained.
        strategy: makes the losses.
        resolution: of the images trained on; None leaves them as they are.

    Attributes:
        progress: share of the training that is done, set by the trainer.
        source: where the weights come from, for the files that they are written to.
    """

    def __init__(self, classifier: Classifier, strategy: Standard, resolution: Resolution | None = None):
        super().__init__()
        self.resolution = resolution
        self.classifier = classifier
        self.strategy = strategy
        self.progress = 0.0
        self.source = "rt_detectron pretraining"
        self._target: list[nn.Module] = []  # a list, so that it is no submodule

    def forward(self, batch):
        """In training mode a dict of losses, in eval mode the logits (N, num_classes) of the clean images.

        Args:
            batch: images (N, 3, H, W), float in [0, 1] or uint8, labels (N,) and, if need be, keys.
        """
        images, labels = self.to_device(batch)
        if not self.training:
            return self.classifier(images)
        if self.resolution is not None:
            images = self.resolution(images, self.progress)
        # Clean training attacks nothing, so it need not keep the target up to date.
        target = self.target() if self.strategy.threat_model is not None else self.classifier
        adversarial = self.strategy.perturb(target, images, labels, self.progress)
        if isinstance(target, FoldedNetwork):
            target.forget()  # its weights, before the classifier needs the memory
        return self.strategy.losses(self.classifier, images, adversarial, labels)

    def target(self) -> nn.Module:
        """What the inner attack runs against: the classifier in eval mode, with its weights of now."""
        if not self._target:
            try:
                self._target.append(FoldedNetwork(self.classifier))
            except (fx.proxy.TraceError, TypeError, RuntimeError) as error:  # a network that asks its input
                logger.warning("attacking %s as it is, not folded: %s", self.classifier.arch, error)
                self._target.append(self.classifier)
        if isinstance(self._target[0], FoldedNetwork):
            self._target[0].forget()
        return self._target[0]

    def to_device(self, batch) -> tuple[Tensor, Tensor]:
        """Images, as float in [0, 1], and labels of the batch on the model's device; its keys stay behind."""
        images, labels = (part.to(self.classifier.mean.device, non_blocking=True) for part in batch[:2])
        if images.dtype == torch.uint8:
            images = images.float() / 255
        return images, labels
