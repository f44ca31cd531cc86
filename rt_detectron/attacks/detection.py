"""PGD on what a detector sees, with the detector's own losses.

eps is measured after resizing, on what enters the network, in the units of :class:`ThreatModel`. Each image
of a batch has a ball of its own, without its padding. The losses are those that Detectron2 trains with.
"""

import sys
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from detectron2.modeling import GeneralizedRCNN
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from detectron2.structures import ImageList, Instances
from detectron2.utils.events import EventStorage
from torch import Tensor, nn

from rt_detectron.attacks.pgd import PGD
from rt_detectron.attacks.threat_model import ThreatModel
from rt_detectron.utils.errors import InputError

# The training losses that each objective sums, by what their names contain: loss_rpn_cls, loss_cls_stage2, ..
TERMS = {
    "classification": ("cls",),
    "localization": ("box_reg", "loc"),
    "mask": ("mask",),
    "all": ("loss",),
}
LOSSES = (*TERMS, "vanishing")


@dataclass(frozen=True)
class DetectorAttack:
    """PGD that raises a detector's loss, as the TOG attacks do (Chow et al. 2020, https://arxiv.org/abs/2004.04320).

    Attributes:
        pgd: threat model, steps and restarts; each image keeps the restart with the largest loss.
        loss: what grows. "classification", "localization" and "mask" are the training losses of that kind
            (of all stages, the RPN's included), "all" is the sum of all there are, weighted as in training.
            "vanishing" is minus the classification loss of an image that shows no object: every proposal
            of an R-CNN, or anchor of a dense detector, is pushed towards the background, until none is
            left to report. (Not the RPN's objectness: whatever it is, the best proposals are kept.)
        seed: of random starts and of the sampling of anchors and proposals. The attack of an image that
            comes in a batch by itself depends on this and on its image_id alone.
    """

    pgd: PGD
    loss: str = "all"
    seed: int = 0

    def __post_init__(self):
        if self.loss not in LOSSES:
            raise InputError(f"attack: loss {self.loss!r} is unknown; use one of {', '.join(LOSSES)}")

    def __call__(self, model: nn.Module, inputs: Sequence[dict]) -> list[dict]:
        """Attack a batch; nothing of the model, nor the global random state, is different afterwards.

        Args:
            model: a GeneralizedRCNN or a DenseDetector (RetinaNet, FCOS) of Detectron2.
            inputs: as Detectron2's test mappers give them, but with the ground truth: "image", (C, H, W) in
                0..255, uint8 or float, in the model's channel order, and "instances" of the image's size.

        Returns:
            The same dicts with other images: float32, in [0, 255], not rounded, on the model's device.

        Raises:
            InputError: for a detector of another kind, or without a loss of the kind asked for, or for
                images without "instances".
        """
        losses_of = _losses_function(model)
        if any("instances" not in each for each in inputs):
            raise InputError("attack: the test set has no annotations, which the detector's loss needs")
        targets = [each["instances"].to(model.device) for each in inputs]
        if self.loss == "vanishing":
            targets = [instances[:0] for instances in targets]
        seeds = [_seed(self.seed, each) for each in inputs]

        def objective(images: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
            found = losses_of(model, _with_images(inputs, images), targets, seeds)
            # An image without objects has no mask loss, say; its gradient is then zero and not missing.
            return [
                (self._select(losses).reshape(1) + 0 * image.sum(), image.new_zeros(1, dtype=torch.bool))
                for losses, image in zip(found, images, strict=True)
            ]

        with _random_state(seeds[0], model.device), _giving_losses(model, self.loss == "vanishing"):
            adversarial = self.pgd.maximize(objective, _unit_images(model, inputs))
        return _with_images(inputs, adversarial)

    def _select(self, losses: dict[str, Tensor]) -> Tensor:
        """The objective, a scalar, of one image's training losses."""
        if self.loss == "vanishing":
            return -sum(value for name, value in losses.items() if "cls" in name and "rpn" not in name)
        chosen = [value for name, value in losses.items() if any(part in name for part in TERMS[self.loss])]
        if not chosen:
            raise InputError(f"attack: this detector has no {self.loss} loss; it has {', '.join(losses)}")
        return sum(chosen)


@dataclass(frozen=True)
class RandomNoise:
    """Noise as large as ``threat_model`` allows, in a random direction: what an attack has to be worse than.

    For "l2" a Gaussian scaled to the norm eps, for "linf" eps up or down in every value of every pixel.
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


def _losses_function(model: nn.Module):
    if isinstance(model, GeneralizedRCNN):
        return _rcnn_losses
    if isinstance(model, DenseDetector):
        return _dense_losses
    raise InputError(
        f"attack: {type(model).__name__} is no GeneralizedRCNN and no DenseDetector, the kinds that are known"
    )


def _rcnn_losses(
    model: GeneralizedRCNN, inputs: list[dict], targets: list[Instances], seeds: list[int]
) -> list:
    """The training losses by name of each image by itself; Detectron2's forward has those of the batch.

    The sampling is seeded anew each time, so that all steps and restarts climb the same function.
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
) -> list:
    """As :func:`_rcnn_losses`."""
    images = model.preprocess_image(inputs)
    features = model.backbone(images.tensor)
    features = [features[name] for name in model.head_in_features]
    predictions = model.head(features)
    found = []
    for i, (target, seed) in enumerate(zip(targets, seeds, strict=True)):
        feature = [maps[i : i + 1] for maps in features]
        prediction = [[maps[i : i + 1] for maps in levels] for levels in predictions]
        # Every call moves loss_normalizer, a running mean, which is thus put back after every call.
        with _random_state(seed, model.device), _attribute_kept(model, "loss_normalizer"):
            found.append(model.forward_training(_one_of(images, i), feature, prediction, [target]))
    return found


def _one_of(images: ImageList, i: int) -> ImageList:
    return ImageList(images.tensor[i : i + 1], images.image_sizes[i : i + 1])


def _unit_images(model: nn.Module, inputs: Sequence[dict]) -> list[Tensor]:
    """(1, C, H, W) each, in [0, 1], unpadded: the network pads them itself, after normalisation."""
    return [each["image"].to(model.device).float()[None] / 255 for each in inputs]


def _with_images(inputs: Sequence[dict], images: Sequence[Tensor]) -> list[dict]:
    return [{**each, "image": 255 * image[0]} for each, image in zip(inputs, images, strict=True)]


def _seed(seed: int, image: dict) -> int:
    return zlib.crc32(f"{seed}/{image.get('image_id')}".encode())


@contextmanager
def _random_state(seed: int, device: torch.device) -> Iterator[None]:
    """torch's random numbers begin at ``seed``; afterwards they go on where they were."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


@contextmanager
def _attribute_kept(owner: nn.Module, name: str) -> Iterator[None]:
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
    """Detectron2's detectors give losses in training mode, but the attacked function is that of eval mode.

    So the backbone and all leaves (norms, dropout) are in eval mode, and only what contains other modules is
    not. No parameter takes a gradient. With ``all_proposals`` no sample is drawn of an R-CNN's proposals.
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
