"""Attacks on detectors.

An attack is called as ``attack(model, inputs)`` and gives the inputs with other images. Those here are PGD on
the losses that Detectron2 trains a detector with. eps is measured after resizing, on what enters the network,
in the units of :class:`ThreatModel`. Each image of a batch has its own ball, which leaves out the padding.

To add an attack, derive from :class:`DetectorAttack`, or from :class:`LossAttack` for another objective, in a
new file of this package, and decorate it with :func:`register_detector_attack`. TEST.ATTACK.LOSSES then takes
its name.
"""

import sys
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

import torch
from detectron2.modeling import GeneralizedRCNN
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from detectron2.structures import ImageList, Instances
from detectron2.utils.events import EventStorage
from torch import Tensor, nn

from rt_detectron.attacks.pgd import PGD
from rt_detectron.attacks.threat_model import ThreatModel
from rt_detectron.utils.errors import InputError, did_you_mean

DETECTOR_ATTACKS: dict[str, type["DetectorAttack"]] = {}  # by name


def register_detector_attack(attack: type["DetectorAttack"]) -> type["DetectorAttack"]:
    """Class decorator: the attack can be asked for by its name."""
    DETECTOR_ATTACKS[attack.name] = attack
    return attack


def build_detector_attack(name: str, pgd: PGD, seed: int = 0) -> "DetectorAttack":
    """The registered attack of this name.

    Raises:
        InputError: for an unknown name.
    """
    if name not in DETECTOR_ATTACKS:
        hint = did_you_mean(name, DETECTOR_ATTACKS)
        known = ", ".join(DETECTOR_ATTACKS)
        raise InputError(f"attack: loss {name!r} is unknown; use one of {known}{hint}")
    return DETECTOR_ATTACKS[name](pgd, seed)


@dataclass(frozen=True)
class DetectorAttack(ABC):
    """An attack on a detector.

    Attributes:
        name: what TEST.ATTACK.LOSSES and results call it.
        needs_masks: whether it only works on detectors that predict masks.
        pgd: threat model, steps and restarts.
        seed: of all random numbers. The attack on an image that comes in a batch by itself depends on this
            and on its image_id alone.
    """

    name: ClassVar[str]
    needs_masks: ClassVar[bool] = False

    pgd: PGD
    seed: int = 0

    @abstractmethod
    def __call__(self, model: nn.Module, inputs: Sequence[dict]) -> list[dict]:
        """Attack a batch. The model and the global random state are unchanged afterwards.

        Args:
            model: a GeneralizedRCNN or a DenseDetector (RetinaNet, FCOS) of Detectron2.
            inputs: as Detectron2's test mappers give them, but with the ground truth: "image", (C, H, W) in
                0..255, uint8 or float, in the model's channel order, and "instances" of the image's size.

        Returns:
            The same dicts with other images: float32, in [0, 255], not rounded, on the model's device.

        Raises:
            InputError: for a detector that the attack does not work on, images without "instances", or
                images that are not in 0..255.
        """

    @property
    def settings(self) -> dict[str, str | float]:
        """What results say of the attack."""
        ball = self.pgd.threat_model
        return {
            "norm": ball.norm,
            "eps": ball.eps,
            "loss": self.name,
            "steps": self.pgd.steps,
            "restarts": self.pgd.restarts,
            "seed": self.seed,
        }


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

    def __call__(self, model: nn.Module, inputs: Sequence[dict]) -> list[dict]:
        losses_of = _losses_function(model)
        if any("instances" not in each for each in inputs):
            raise InputError("attack: the test set has no annotations, which the detector's loss needs")
        targets = [self.ground_truth(each["instances"].to(model.device)) for each in inputs]
        seeds = [_seed(self.seed, each) for each in inputs]

        def objective(images: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
            found = losses_of(model, _with_images(inputs, images), targets, seeds)
            # An image without objects has no mask loss, for example: its gradient is then zero.
            return [
                (self.objective(losses).reshape(1) + 0 * image.sum(), image.new_zeros(1, dtype=torch.bool))
                for losses, image in zip(found, images, strict=True)
            ]

        with _random_state(seeds[0], model.device), _giving_losses(model, self.all_proposals):
            adversarial = self.pgd.maximize(objective, _unit_images(model, inputs))
        return _with_images(inputs, adversarial)


@register_detector_attack
class Classification(LossAttack):
    """Raises the classification losses of all stages, the RPN included."""

    name, terms = "classification", ("cls",)


@register_detector_attack
class Localization(LossAttack):
    """Raises the box regression losses of all stages, the RPN included."""

    name, terms = "localization", ("box_reg", "loc")


@register_detector_attack
class Mask(LossAttack):
    """Raises the mask loss."""

    name, terms, needs_masks = "mask", ("mask",), True


@register_detector_attack
class AllLosses(LossAttack):
    """Raises the sum of all training losses."""

    name, terms = "all", ("loss",)


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
        return -sum(value for name, value in losses.items() if "cls" in name and "rpn" not in name)


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
        for each, image in zip(inputs, _unit_images(model, inputs), strict=True):
            with _random_state(_seed(self.seed, each), model.device):
                noise = self.threat_model.step(torch.randn_like(image), self.threat_model.radius)
            noisy.append((image + noise).clamp_(0, 1))
        return _with_images(inputs, noisy)


def _losses_function(model: nn.Module) -> Callable[..., list[dict[str, Tensor]]]:
    if isinstance(model, GeneralizedRCNN):
        return _rcnn_losses
    if isinstance(model, DenseDetector):
        return _dense_losses
    raise InputError(
        f"attack: {type(model).__name__} is no GeneralizedRCNN and no DenseDetector; others are not supported"
    )


def _rcnn_losses(
    model: GeneralizedRCNN, inputs: list[dict], targets: list[Instances], seeds: list[int]
) -> list[dict[str, Tensor]]:
    """The training losses of each image by name. (Detectron2's forward gives those of the whole batch.)

    Sampling is seeded again each time, so that all steps and restarts climb the same function.
    """
    images = model.preprocess_image(inputs)
    features = model.backbone(images.tensor)
    found = []
    for i, (target, seed) in enumerate(zip(targets, seeds, strict=True)):
        image = _one_of(images, i)
        feature = {name: maps[i : i + 1] for name, maps in features.items()}
        with _random_state(seed, model.device):
            if model.proposal_generator is None:
                proposals, losses = [inputs[i]["proposals"].to(model.device)], {}
            else:
                proposals, losses = model.proposal_generator(image, feature, [target])
            found.append({**losses, **model.roi_heads(image, feature, proposals, [target])[1]})
    return found


def _dense_losses(
    model: DenseDetector, inputs: list[dict], targets: list[Instances], seeds: list[int]
) -> list[dict[str, Tensor]]:
    """As :func:`_rcnn_losses`."""
    images = model.preprocess_image(inputs)
    features = model.backbone(images.tensor)
    features = [features[name] for name in model.head_in_features]
    predictions = model.head(features)
    found = []
    for i, (target, seed) in enumerate(zip(targets, seeds, strict=True)):
        feature = [maps[i : i + 1] for maps in features]
        prediction = [[maps[i : i + 1] for maps in levels] for levels in predictions]
        # Every call updates loss_normalizer, a running mean: restore it.
        with _random_state(seed, model.device), _attribute_kept(model, "loss_normalizer"):
            found.append(model.forward_training(_one_of(images, i), feature, prediction, [target]))
    return found


def _one_of(images: ImageList, i: int) -> ImageList:
    return ImageList(images.tensor[i : i + 1], images.image_sizes[i : i + 1])


def _unit_images(model: nn.Module, inputs: Sequence[dict]) -> list[Tensor]:
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
    return [each["image"].to(model.device).float()[None] / 255 for each in inputs]


def _with_images(inputs: Sequence[dict], images: Sequence[Tensor]) -> list[dict]:
    return [{**each, "image": 255 * image[0]} for each, image in zip(inputs, images, strict=True)]


def _seed(seed: int, image: dict) -> int:
    return zlib.crc32(f"{seed}/{image.get('image_id')}".encode())


@contextmanager
def _random_state(seed: int, device: torch.device) -> Iterator[None]:
    """Seed torch's random numbers in the block and restore their state afterwards."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


@contextmanager
def _attribute_kept(owner: nn.Module, name: str) -> Iterator[None]:
    """Restore an attribute afterwards, or its absence."""
    missing = object()
    value = getattr(owner, name, missing)
    try:
        yield
    finally:
        if value is not missing:
            setattr(owner, name, value)
        elif hasattr(owner, name):
            delattr(owner, name)


@contextmanager
def _giving_losses(model: nn.Module, all_proposals: bool) -> Iterator[None]:
    """Make a detector compute losses, while its layers stay in eval mode.

    Detectron2's detectors give losses in training mode only, but the detector under attack runs in eval mode.
    So the backbone and all leaf modules (norms, dropout) are in eval mode, and only the modules that contain
    others are in training mode. No parameter takes a gradient. With ``all_proposals``, an R-CNN's proposals
    are not sampled.
    """
    training = {module: module.training for module in model.modules()}
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    roi_heads = getattr(model, "roi_heads", None)
    batch_size = getattr(roi_heads, "batch_size_per_image", None)
    model.train()
    model.backbone.eval()
    for module in model.modules():
        if next(module.children(), None) is None:
            module.eval()
    try:
        for parameter in trainable:
            parameter.requires_grad_(False)
        if all_proposals and roi_heads is not None and batch_size is not None:
            roi_heads.batch_size_per_image = sys.maxsize
        with EventStorage():
            yield
    finally:
        if roi_heads is not None and batch_size is not None:
            roi_heads.batch_size_per_image = batch_size
        for parameter in trainable:
            parameter.requires_grad_(True)
        for module, mode in training.items():
            module.training = mode
