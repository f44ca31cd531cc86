"""The losses that a detector trains with, for each image of a batch by itself, as attacks raise them."""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch.nn.functional as F
from detectron2.modeling import GeneralizedRCNN, SemanticSegmentor
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from detectron2.structures import ImageList, Instances
from detectron2.utils.events import EventStorage
from torch import Tensor, nn

from rt_detectron.attacks.batched import image_by_image, takes_batches
from rt_detectron.utils.errors import InputError
from rt_detectron.utils.seeds import seeded

# From a detector, its inputs, the objects and a seed of each image, to the losses of each image by name.
LossesFunction = Callable[
    [nn.Module, Sequence[dict], Sequence[Instances], Sequence[int]], list[dict[str, Tensor]]
]


def losses_function(model: nn.Module) -> LossesFunction:
    """The one for this kind of detector.

    Raises:
        InputError: for another kind.
    """
    if isinstance(model, GeneralizedRCNN):
        return _rcnn_losses
    if isinstance(model, DenseDetector):
        return _dense_losses
    if isinstance(model, SemanticSegmentor):
        return segmentor_losses
    raise InputError(
        f"attack: {type(model).__name__} is no GeneralizedRCNN, DenseDetector or SemanticSegmentor; others "
        "are not supported"
    )


def _rcnn_losses(
    model: GeneralizedRCNN, inputs: Sequence[dict], targets: Sequence[Instances], seeds: Sequence[int]
) -> list[dict[str, Tensor]]:
    """The training losses of each image by name. (Detectron2's forward gives those of the whole batch.)

    Sampling is seeded again each time, so that all steps and restarts climb the same function.
    """
    images = model.preprocess_image(inputs)
    features = model.backbone(images.tensor)
    if takes_batches(model):
        with image_by_image(model, seeds):  # one pass of the heads for all images
            losses = _head_losses(model, inputs, images, features, targets)
        found = [{name: values[i] for name, values in losses.items()} for i in range(len(inputs))]
    else:
        found = []
        for i, seed in enumerate(seeds):
            with seeded(seed, model.device):
                one = inputs[i : i + 1], _one_of(images, i), _features_of(features, i), targets[i : i + 1]
                found.append(_head_losses(model, *one))
    if hasattr(model, "sem_seg_head"):  # a PanopticFPN
        for i, losses in enumerate(found):
            losses |= sem_seg_losses(model, _features_of(features, i), inputs[i], images.tensor.shape[-2:])
    return found


def _head_losses(
    model: GeneralizedRCNN,
    inputs: Sequence[dict],
    images: ImageList,
    features: dict[str, Tensor],
    targets: Sequence[Instances],
) -> dict[str, Tensor]:
    """The losses of proposals and boxes."""
    if model.proposal_generator is None:
        proposals, losses = [each["proposals"].to(model.device) for each in inputs], {}
    else:
        proposals, losses = model.proposal_generator(images, features, targets)
    return {**losses, **model.roi_heads(images, features, proposals, targets)[1]}


def _dense_losses(
    model: DenseDetector, inputs: Sequence[dict], targets: Sequence[Instances], seeds: Sequence[int]
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
        with seeded(seed, model.device), _attribute_kept(model, "loss_normalizer"):
            found.append(model.forward_training(_one_of(images, i), feature, prediction, [target]))
    return found


def segmentor_losses(
    model: nn.Module, inputs: Sequence[dict], targets: Sequence[Instances], seeds: Sequence[int]
) -> list[dict[str, Tensor]]:
    """As :func:`_rcnn_losses`, of the semantic segmentation alone; ``targets`` and ``seeds`` are not used."""
    images = preprocess(model, inputs)
    features = model.backbone(images.tensor)
    return [
        sem_seg_losses(model, _features_of(features, i), given, images.tensor.shape[-2:])
        for i, given in enumerate(inputs)
    ]


def _one_of(images: ImageList, i: int) -> ImageList:
    return ImageList(images.tensor[i : i + 1], images.image_sizes[i : i + 1])


def _features_of(features: dict[str, Tensor], i: int) -> dict[str, Tensor]:
    return {name: maps[i : i + 1] for name, maps in features.items()}


def preprocess(model: nn.Module, inputs: Sequence[dict]) -> ImageList:
    """The detector's own normalised and padded input; a SemanticSegmentor has no method for it."""
    if hasattr(model, "preprocess_image"):
        return model.preprocess_image(inputs)
    images = [(each["image"].to(model.device) - model.pixel_mean) / model.pixel_std for each in inputs]
    constraints = model.backbone.padding_constraints
    return ImageList.from_tensors(images, model.backbone.size_divisibility, padding_constraints=constraints)


def sem_seg_losses(
    model: nn.Module, features: dict[str, Tensor], given: dict, size: Sequence[int]
) -> dict[str, Tensor]:
    """The training losses of the semantic segmentation of one image, by name.

    Args:
        model: with a ``sem_seg_head`` that gives losses.
        features: of that image, (1, C, H, W) each.
        given: the image's input, with its "sem_seg", (H, W), int64.
        size: height and width of what the backbone was given, with its padding.

    Raises:
        InputError: for an input without "sem_seg", or a head unlike Detectron2's own.
    """
    head = model.sem_seg_head
    if "sem_seg" not in given:
        raise InputError("attack: the test set has no semantic segmentation, which the model's loss needs")
    if not all(hasattr(head, name) for name in ("ignore_value", "common_stride", "losses")):
        raise InputError(f"attack: {type(head).__name__} is unlike Detectron2's heads; it is not supported")
    target = given["sem_seg"].to(model.device)
    # The predictions' sides are multiples of their stride, which those of the image need not be.
    height, width = (-(-side // head.common_stride) * head.common_stride for side in size)
    beyond = (0, width - target.shape[1], 0, height - target.shape[0])
    return head(features, F.pad(target, beyond, value=head.ignore_value)[None])[1]


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
def giving_losses(model: nn.Module, all_proposals: bool) -> Iterator[None]:
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
    if hasattr(model, "sem_seg_head"):  # DeepLab's has dropout that is no module
        model.sem_seg_head.eval().training = True
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
