"""Attacks on detectors.

An attack is called as ``attack(model, inputs)`` and gives the inputs with other images. Those here are PGD on
the losses that Detectron2 trains a detector with. eps is measured after resizing, on what enters the network,
in the units of :class:`ThreatModel`. Each image of a batch has its own ball, which leaves out the padding.

To add an attack, derive from :class:`DetectorAttack`, or from :class:`LossAttack` for another objective, in a
new file of this package, and decorate it with :func:`register_detector_attack`. TEST.ATTACK.LOSSES then takes
its name.
"""

import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from detectron2.structures import ImageList, Instances
from torch import Tensor, nn

from rt_detectron.attacks.apgd import APGD
from rt_detectron.attacks.batched import method_replaced
from rt_detectron.attacks.losses import LossesFunction, giving_losses, losses_function, segmentor_losses
from rt_detectron.attacks.pgd import PGD, Objective
from rt_detectron.attacks.threat_model import ThreatModel
from rt_detectron.utils.errors import InputError, did_you_mean
from rt_detectron.utils.seeds import seeded

DETECTOR_ATTACKS: dict[str, type["DetectorAttack"]] = {}  # by name


def register_detector_attack(attack: type["DetectorAttack"]) -> type["DetectorAttack"]:
    """Class decorator: the attack can be asked for by its name."""
    DETECTOR_ATTACKS[attack.name] = attack
    return attack


def build_detector_attack(name: str, pgd: PGD, seed: int = 0, **options) -> "DetectorAttack":
    """The registered attack of this name; ``options`` are further attributes of :class:`DetectorAttack`.

    Raises:
        InputError: for an unknown name, or an option that it does not have.
    """
    if name not in DETECTOR_ATTACKS:
        hint = did_you_mean(name, DETECTOR_ATTACKS)
        known = ", ".join(DETECTOR_ATTACKS)
        raise InputError(f"attack: loss {name!r} is unknown; use one of {known}{hint}")
    return DETECTOR_ATTACKS[name](pgd, seed, **options)


# What the losses of the last head are called: of R-CNNs and RetinaNet, and of FCOS.
CLASSIFICATION, REGRESSION = ("loss_cls", "loss_fcos_cls"), ("loss_box_reg", "loss_fcos_loc")


@dataclass(frozen=True)
class DetectorAttack(ABC):
    """An attack on a detector.

    Attributes:
        name: what TEST.ATTACK.LOSSES and results call it.
        task: of the metrics that it aims to lower, such as "segm"; "" for the detector's first one.
        needs_object_counts: whether it takes ``object_counts``.
        needs_pixel_counts: whether it takes ``pixel_counts``.
        targetable: whether it can be ``targeted``.
        clippable: whether it has a loss for each proposal, which can be clipped.
        pgd: threat model, steps, step size, start and restarts.
        seed: of all random numbers. The attack on an image that comes in a batch by itself depends on this
            and on its image_id alone.
        targeted: lower the loss of a wrong class, drawn for each class by the seed, instead of raising that
            of the true one.
        clip: what a proposal's loss counts at most; 0 for no limit.
        padding: whether the ball holds the padding, too, which makes the sides of an image multiples of 32.
        object_counts: the number of objects of each class in the data set.
        amp: attack in mixed precision.
        pixel_counts: the number of pixels of each class of its semantic segmentation.
    """

    name: ClassVar[str]
    task: ClassVar[str] = ""
    needs_object_counts: ClassVar[bool] = False
    needs_pixel_counts: ClassVar[bool] = False
    targetable: ClassVar[bool] = False
    clippable: ClassVar[bool] = False

    pgd: PGD
    seed: int = 0
    targeted: bool = False
    clip: float = 0.0
    padding: bool = False
    object_counts: tuple[int, ...] = ()
    amp: bool = False
    pixel_counts: tuple[int, ...] = ()

    def __post_init__(self):
        if self.targeted and not self.targetable:
            raise InputError(
                f"attack: {self.name!r} has no target; the attacks on classification can have one"
            )
        if self.clip < 0 or (self.clip and not self.clippable):
            raise InputError(
                f"attack: CLIP is {self.clip:g}; it takes a positive limit, and A_cls, A_reg, A_box, "
                "A_cwa or MTD"
            )

    @abstractmethod
    def __call__(self, model: nn.Module, inputs: Sequence[dict]) -> list[dict]:
        """Attack a batch. The model and the global random state are unchanged afterwards.

        Args:
            model: a GeneralizedRCNN, a DenseDetector (RetinaNet, FCOS) or a SemanticSegmentor of Detectron2.
            inputs: as Detectron2's test mappers give them, but with the ground truth: "image", (C, H, W) in
                0..255, uint8 or float, in the model's channel order, and "instances" and "sem_seg" of the
                image's size, whichever the model learns from.

        Returns:
            The same dicts with other images: float32, in [0, 255], not rounded, on the model's device. They
            may also have "objective", a pair of what the attack raised, before and after it; and
            "image_size", the (height, width) without the padding, for :func:`detect`.

        Raises:
            InputError: for a detector that the attack does not work on, images without the ground truth, or
                images that are not in 0..255.
        """

    def check(self, model: nn.Module) -> None:  # noqa: B027  (an attack of a user's may work on any)
        """Raise :class:`InputError` for a detector that the attack does not work on."""

    def perturb(self, model: nn.Module, inputs: Sequence[dict]) -> list[dict]:
        """The same, where nobody asks for the objective before and after it."""
        return self(model, inputs)

    @property
    def settings(self) -> dict[str, Any]:
        """What results say of the attack: all that defines it. Sizes are in the units of eps."""
        ball, adaptive = self.pgd.threat_model, isinstance(self.pgd, APGD)
        return {
            "norm": ball.norm,
            "eps": ball.eps,
            "loss": self.name,
            "steps": self.pgd.steps,
            "adaptive": adaptive,
            **({"reduce_radius": True} if getattr(self.pgd, "reduce_radius", False) else {}),
            "step_size": None
            if adaptive
            else round(self.pgd.relative_step_size * ball.eps / self.pgd.steps, 9),
            "start": "random" if self.pgd.random_start else "image",
            "restarts": self.pgd.restarts,
            "best": self.pgd.best,
            "targeted": self.targeted,
            "clip": self.clip,
            "padding": self.padding,
            "seed": self.seed,
            **({"object_counts": list(self.object_counts)} if self.object_counts else {}),
            **({"amp": True} if self.amp else {}),
            **({"pixel_counts": list(self.pixel_counts)} if self.pixel_counts else {}),
        }

    @property
    def passes(self) -> dict[str, int]:
        """What the attack on an image costs, in "forward" and "backward" passes of the detector."""
        return self.pgd.passes


class LossAttack(DetectorAttack):
    """PGD that raises a detector's training losses, weighted as in training.

    The TOG attacks do the same (Chow et al. 2020, https://arxiv.org/abs/2004.04320). Each image keeps the
    restart with the largest loss.

    Attributes:
        terms: the losses whose names contain one of these are summed: "cls" is loss_rpn_cls,
            loss_cls_stage2 and so on.
        all_proposals: compute an R-CNN's losses on all proposals, not on a sample.
    """

    terms: ClassVar[tuple[str, ...]] = ()
    all_proposals: ClassVar[bool] = False

    def ground_truth(self, instances: Instances) -> Instances:
        """The objects that the losses are computed with, from those of an image."""
        return instances

    def objective(self, losses: dict[str, Tensor]) -> Tensor:
        """What the attack raises, a scalar, from one image's training losses by name."""
        chosen = [value for name, value in losses.items() if any(term in name for term in self.terms)]
        if not chosen:
            raise InputError(f"attack: this detector has no {self.name} loss; it has {', '.join(losses)}")
        return sum(chosen)

    def losses_function(self, model: nn.Module) -> LossesFunction:
        """What gives the training losses of each image by name.

        Raises:
            InputError: for a model that this attack does not work on.
        """
        return losses_function(model)

    def replaced_losses(self, model: nn.Module) -> dict[nn.Module, Callable]:
        """By module of the detector, what is called with it and the arguments of its ``losses`` instead."""
        return {}

    def check(self, model: nn.Module) -> None:
        self.losses_function(model)
        self.replaced_losses(model)

    def __call__(self, model: nn.Module, inputs: Sequence[dict]) -> list[dict]:
        found, first = self._attacked(model, inputs)
        before = [float(one) for one in first] if self._begins_at_the_image else self.value(model, inputs)
        after = self.value(model, found)
        return [{**each, "objective": pair} for each, *pair in zip(found, before, after, strict=True)]

    @property
    def _begins_at_the_image(self) -> bool:
        """Whether the attack's own first pass gives the objective before it."""
        return not self.pgd.random_start and self.pgd.threat_model.radius > 0

    @property
    def passes(self) -> dict[str, int]:
        passes = self.pgd.passes
        return {**passes, "forward": passes["forward"] + 2 - self._begins_at_the_image}

    def perturb(self, model: nn.Module, inputs: Sequence[dict]) -> list[dict]:
        return self._attacked(model, inputs)[0]

    def _attacked(self, model: nn.Module, inputs: Sequence[dict]) -> tuple[list[dict], list[Tensor]]:
        """The inputs with attacked images, and what the objective was at first, (1,) each."""
        if self.padding:
            inputs = _padded(model, inputs)
        first: list[Tensor] = []
        with self._objective(model, inputs) as objective:
            starts = [
                torch.Generator(model.device).manual_seed(image_seed(self.seed, each)) for each in inputs
            ]

            def noted(images: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
                found = objective(images)
                if not first:
                    first.extend(losses.detach() for losses, _ in found)
                return found

            kind = model.device.type
            half = torch.float16 if kind == "cuda" else torch.bfloat16
            with torch.autocast(kind, half, enabled=self.amp):
                adversarial = self.pgd.maximize(noted, unit_images(model, inputs), starts)
        return with_images(inputs, adversarial), first

    def value(self, model: nn.Module, inputs: Sequence[dict]) -> list[float]:
        """The objective of each image."""
        with self._objective(model, inputs) as objective, torch.no_grad():
            return [float(losses) for losses, _ in objective(_in_units(model, inputs))]

    @contextmanager
    def _objective(self, model: nn.Module, inputs: Sequence[dict]) -> Iterator[Objective]:
        """The objective as a function of the images in [0, 1], within the block."""
        losses_of = self.losses_function(model)
        targets: list[Instances] = []
        if losses_of is not segmentor_losses:
            if any("instances" not in each for each in inputs):
                raise InputError("attack: the test set has no annotations, which the detector's loss needs")
            targets = [self.ground_truth(each["instances"].to(model.device)) for each in inputs]
        if self.targeted:
            targets = [_of_other_classes(each, model, self.seed) for each in targets]
        seeds = [image_seed(self.seed, each) for each in inputs]
        sign = -1 if self.targeted else 1

        def objective(images: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
            found = losses_of(model, with_images(inputs, images), targets, seeds)
            # An image without objects has no mask loss, for example: its gradient is then zero.
            return [
                (
                    sign * self.objective(losses).reshape(1) + 0 * image.sum(),
                    image.new_zeros(1, dtype=torch.bool),
                )
                for losses, image in zip(found, images, strict=True)
            ]

        with ExitStack() as stack:
            stack.enter_context(giving_losses(model, self.all_proposals))
            stack.enter_context(_sizes_known(model))
            for module, losses in self.replaced_losses(model).items():
                stack.enter_context(method_replaced(module, "losses", partial(losses, module)))
            yield objective


@register_detector_attack
class Classification(LossAttack):
    """Raises the classification losses of all stages, the RPN included."""

    name, terms, targetable = "classification", ("cls",), True


@register_detector_attack
class Localization(LossAttack):
    """Raises the box regression losses of all stages, the RPN included."""

    name, terms = "localization", ("box_reg", "loc")


@register_detector_attack
class Mask(LossAttack):
    """Raises the mask loss."""

    name, terms, task = "mask", ("mask",), "segm"


@register_detector_attack
class Keypoint(LossAttack):
    """Raises the keypoint loss."""

    name, terms, task = "keypoint", ("keypoint",), "keypoints"


@register_detector_attack
class AllLosses(LossAttack):
    """Raises the sum of all training losses."""

    name, terms = "all", ("loss",)


@register_detector_attack
class NoRegression(LossAttack):
    """Raises all training losses but those of box regression, as ARES 2.0 does (thu-ml/ares).

    Their filter by name leaves out the heads' regression losses and keeps the RPN's.
    """

    name = "no_regression"

    def objective(self, losses: dict[str, Tensor]) -> Tensor:
        kept = [value for name, value in losses.items() if not any(term in name for term in REGRESSION)]
        return sum(kept) / len(kept)


@register_detector_attack
class Vanishing(LossAttack):
    """Lowers the classification loss of an image without objects, so that no detection is left.

    Every proposal of an R-CNN, or anchor of a dense detector, is pushed towards the background. The RPN's
    objectness is left alone: the best proposals are kept, however low they score.
    """

    name, all_proposals = "vanishing", True

    def ground_truth(self, instances: Instances) -> Instances:
        return instances[:0]

    def objective(self, losses: dict[str, Tensor]) -> Tensor:
        found = [value for name, value in losses.items() if "cls" in name and "rpn" not in name]
        if not found:
            raise InputError(f"attack: this detector has no classes that could vanish: drop {self.name}")
        return -sum(found)


def detect(model: nn.Module, inputs: list[dict]) -> list[dict]:
    """The detector's outputs, also for inputs whose "image_size" says that they bring their own padding."""
    with _sizes_known(model):
        return model(inputs)


@dataclass(frozen=True)
class RandomNoise:
    """Random noise as large as ``threat_model`` allows: an attack must lower AP by more than this.

    For "l2", Gaussian noise scaled to norm eps. For "linf", plus or minus eps in each value of each pixel.
    """

    threat_model: ThreatModel
    seed: int = 0

    def __call__(self, model: nn.Module, inputs: Sequence[dict]) -> list[dict]:
        """As :meth:`DetectorAttack.__call__`; no "instances" are needed."""
        noisy = []
        for each, image in zip(inputs, unit_images(model, inputs), strict=True):
            with seeded(image_seed(self.seed, each), model.device):
                noise = self.threat_model.step(torch.randn_like(image), self.threat_model.radius)
            noisy.append((image + noise).clamp_(0, 1))
        return with_images(inputs, noisy)


def _padded(model: nn.Module, inputs: Sequence[dict]) -> list[dict]:
    """The inputs with the padding that the detector adds, as pixels, and the "image_size" without it."""
    if not hasattr(model, "preprocess_image"):
        raise InputError(f"attack: the padding of a {type(model).__name__} stays as it is: PADDING is False")
    padded = []
    for each in inputs:
        image = each["image"].to(model.device).float()
        height, width = model.preprocess_image([each]).tensor.shape[-2:]
        # The detector pads with 0 after it has subtracted the mean.
        canvas = model.pixel_mean.view(-1, 1, 1).expand(-1, height, width).clone()
        canvas[:, : image.shape[1], : image.shape[2]] = image
        padded.append({**each, "image": canvas, "image_size": tuple(image.shape[1:])})
    return padded


@contextmanager
def _sizes_known(model: nn.Module) -> Iterator[None]:
    """Where an input has an "image_size", the detector takes its image for so large, and padded."""
    if not hasattr(model, "preprocess_image"):  # a SemanticSegmentor, whose padding is left alone
        yield
        return
    original = model.preprocess_image

    def preprocess(inputs: list[dict]) -> ImageList:
        images = original(inputs)
        sizes = [each.get("image_size", size) for each, size in zip(inputs, images.image_sizes, strict=True)]
        return ImageList(images.tensor, sizes)

    with method_replaced(model, "preprocess_image", preprocess):
        yield


def _of_other_classes(instances: Instances, model: nn.Module, seed: int) -> Instances:
    """The objects with the wrong classes that a targeted attack aims for."""
    num_classes = getattr(model, "num_classes", None) or model.roi_heads.num_classes
    if num_classes == 1:
        raise InputError("attack: with a single class there is no other to aim for; set TARGETED to False")
    found = Instances(instances.image_size, **instances.get_fields())
    found.gt_classes = other_classes(num_classes, seed).to(instances.gt_classes.device)[instances.gt_classes]
    return found


def other_classes(num_classes: int, seed: int) -> Tensor:
    """(num_classes,) a wrong class for each class, drawn by the seed; of a single class, the background."""
    if num_classes == 1:
        return torch.ones(1, dtype=torch.long)
    shifts = torch.randint(1, num_classes, (num_classes,), generator=torch.Generator().manual_seed(seed))
    return (torch.arange(num_classes) + shifts) % num_classes


def unit_images(model: nn.Module, inputs: Sequence[dict]) -> list[Tensor]:
    """(1, C, H, W) each, in [0, 1], without padding: the network pads after normalisation.

    Raises:
        InputError: for an image that is not in 0..255, or that seems to be in [0, 1] already.
    """
    for each in inputs:
        low, high = (float(end) for end in each["image"].aminmax())
        fractions = each["image"].is_floating_point() and bool((each["image"] % 1).any())
        if not (low >= 0 and high <= 255) or (high <= 1 and fractions):
            raise InputError(
                f"attack: image {each.get('image_id')} has values from {low:g} to {high:g}; a detector's "
                "input is in 0..255, before it is normalised"
            )
    return _in_units(model, inputs)


def _in_units(model: nn.Module, inputs: Sequence[dict]) -> list[Tensor]:
    """The same, unchecked: an attacked image that was black may look as if it were in [0, 1]."""
    return [each["image"].to(model.device, non_blocking=True).float()[None] / 255 for each in inputs]


def with_images(inputs: Sequence[dict], images: Sequence[Tensor]) -> list[dict]:
    """The inputs with other images, from (1, C, H, W) each, in [0, 1]."""
    return [{**each, "image": 255 * image[0]} for each, image in zip(inputs, images, strict=True)]


def image_seed(seed: int, image: dict) -> int:
    """The seed of an image's random numbers, whichever images come before it."""
    return zlib.crc32(f"{seed}/{image.get('image_id')}".encode())
