"""What a detector's scores depend on in an image, and what of the image its backbone's features still hold.

Gradients of robust networks follow the shapes of objects (Tsipras et al. 2019,
https://arxiv.org/abs/1805.12152, section 3), and from their features alone the image can be told (Engstrom
et al. 2019, https://arxiv.org/abs/1906.00945). Those of standard networks look like noise.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from detectron2.layers import ShapeSpec
from detectron2.structures import Instances
from torch import Tensor
from tqdm import trange

from rt_detectron.attacks.detection import unit_images, with_images
from rt_detectron.detection.predictor import Predictor
from rt_detectron.utils.errors import InputError, did_you_mean

STEPS = 200  # of a feature inversion, unless told
_LEARNING_RATE = 0.05  # of Adam at the start, in the unit of images in [0, 1]


def input_gradient(predictor: Predictor, bgr: np.ndarray, threshold: float) -> tuple[Instances, Tensor]:
    """The detections in an image, and how their scores depend on its pixels.

    Proposals and anchors are taken as they are found: boxes do not move with the pixels, as in training.

    Args:
        bgr: the image, H x W x 3, uint8.
        threshold: detections with a lower score do not count.

    Returns:
        The detections, as ``predictor(bgr)`` gives them, and the gradient of the sum of their scores'
        logarithms, that of the cross entropy but for the sign. It is (3, h, w), R, G and B of the image in
        [0, 1] in the size that the network sees; 0 if there are no detections.
    """
    inputs = predictor.inputs(bgr)
    (image,) = unit_images(predictor.model, [inputs])
    image.requires_grad_()
    with torch.enable_grad():
        found = predictor.detect(*with_images([inputs], [image]))
        scores = found.scores[found.scores >= threshold]
        (gradient,) = torch.autograd.grad(scores.log().sum() + 0 * image.sum(), image)
    fields = {
        name: value.detach() if isinstance(value, Tensor) else value
        for name, value in found.get_fields().items()
    }
    fields["pred_boxes"] = type(found.pred_boxes)(found.pred_boxes.tensor.detach())
    return Instances(found.image_size, **fields), _rgb(predictor, gradient)


@dataclass(frozen=True)
class Inversion:
    """An image made from features.

    Attributes:
        image: (3, h, w), R, G and B in [0, 1].
        feature: which features, such as "res5".
        start, end: how far the features of the first and of this image are from those of the original, as
            a fraction of the latter's L2 norm.
    """

    image: Tensor
    feature: str
    start: float
    end: float


def invert_features(
    predictor: Predictor, bgr: np.ndarray, feature: str | None = None, steps: int = STEPS, seed: int = 0
) -> Inversion:
    """An image, made from noise, that the backbone gives the features of this image.

    Adam minimises the squared distance of the features, normalised as in Mahendran & Vedaldi (2015,
    https://arxiv.org/abs/1412.0035, equation 1). Unlike there, no term asks for a natural image, so that
    what appears comes from the features alone, as in Engstrom et al.

    Args:
        bgr: the image, H x W x 3, uint8.
        feature: of the backbone or of its pyramid; None for the backbone's of largest stride.
        steps: forward and backward passes of the backbone.
        seed: of the noise.

    Raises:
        InputError: for a feature that the backbone does not have, and for fewer than one step.
    """
    model, inputs = predictor.model, predictor.inputs(bgr)
    name, compute = find_feature(predictor, feature)
    (original,) = unit_images(model, [inputs])

    def features(image: Tensor) -> Tensor:
        return compute(model.preprocess_image(with_images([inputs], [image])).tensor)

    image, start, end = matching_image(features, original, steps, seed)
    return Inversion(_rgb(predictor, image), name, start, end)


def matching_image(
    features: Callable[[Tensor], Tensor], original: Tensor, steps: int, seed: int = 0
) -> tuple[Tensor, float, float]:
    """See :func:`invert_features`; ``features`` is any function of images (1, 3, H, W) in [0, 1].

    Returns:
        The image and the distances of :class:`Inversion`.
    """
    if steps < 1:
        raise InputError(f"feature inversion takes at least one step, not {steps}")
    with torch.no_grad():
        target = features(original)
    scale = target.norm().clamp_min(torch.finfo(target.dtype).tiny)

    def distance(image: Tensor) -> Tensor:
        return (features(image) - target).norm() / scale

    noise = torch.rand(original.shape, generator=torch.Generator().manual_seed(seed))
    best = noise.to(original)
    with torch.no_grad():
        start = end = float(distance(best))
    image = best.clone().requires_grad_()
    optimizer = torch.optim.Adam([image], lr=_LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in trange(steps, desc="inverting features", unit="step", leave=False):
        with torch.enable_grad():
            found = distance(image)
            (image.grad,) = torch.autograd.grad(found.square(), image)
        if found.item() < end:
            best, end = image.detach().clone(), found.item()
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            image.clamp_(0, 1)
    with torch.no_grad():
        last = float(distance(image))
    return (image.detach(), start, last) if last < end else (best, start, end)


def find_feature(predictor: Predictor, name: str | None) -> tuple[str, Callable[[Tensor], Tensor]]:
    """The feature's name, see :func:`invert_features`, and the function that computes it from what
    ``preprocess_image`` gives.

    Raises:
        InputError: for a feature that the backbone does not have.
    """
    backbone = predictor.model.backbone
    trunk = getattr(backbone, "bottom_up", getattr(backbone, "net", backbone))  # below an FPN, or ViTDet's
    shapes: dict[str, ShapeSpec] = trunk.output_shape()
    name = name or max(shapes, key=lambda each: shapes[each].stride or 0)
    if name in shapes:
        return name, lambda images: trunk(images)[name]
    known = {**shapes, **backbone.output_shape()}
    if name not in known:
        raise InputError(
            f"the backbone has no feature {name!r}; it has {', '.join(known)}{did_you_mean(name, known)}"
        )
    return name, lambda images: backbone(images)[name]


def _rgb(predictor: Predictor, image: Tensor) -> Tensor:
    """(1, 3, h, w) in the model's channel order to (3, h, w) in that of RGB, on the CPU."""
    image = image[0].detach().cpu()
    return image.flip(0) if predictor.input_format == "BGR" else image
