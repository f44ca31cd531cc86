"""The losses of each image of a batch, from one pass of an R-CNN's heads over all of it.

In training, Detectron2's heads give means over a batch. An attack needs the loss of each image, and to call
the heads image by image would take as many passes.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from detectron2.modeling import GeneralizedRCNN
from detectron2.modeling.proposal_generator import RPN
from detectron2.modeling.roi_heads import CascadeROIHeads, Res5ROIHeads, StandardROIHeads
from detectron2.modeling.roi_heads.fast_rcnn import FastRCNNOutputLayers
from detectron2.modeling.roi_heads.keypoint_head import BaseKeypointRCNNHead
from detectron2.modeling.roi_heads.mask_head import BaseMaskRCNNHead
from detectron2.structures import Instances
from torch import Tensor, nn

from rt_detectron.utils.seeds import seeded

_HEADS = (BaseMaskRCNNHead, BaseKeypointRCNNHead)


def takes_batches(model: GeneralizedRCNN) -> bool:
    """Whether the heads of ``model`` are Detectron2's own, which :func:`image_by_image` knows."""
    generator, heads = model.proposal_generator, model.roi_heads
    if type(generator) not in (RPN, type(None)):
        return False
    if type(heads) not in (StandardROIHeads, CascadeROIHeads, Res5ROIHeads):
        return False
    more = [getattr(heads, name, None) for name in ("mask_head", "keypoint_head")]
    return all(
        head is None
        or any(isinstance(head, kind) and _forward_in_training(head) is kind.forward for kind in _HEADS)
        for head in more
    )


def _forward_in_training(head: nn.Module) -> Callable:
    """A class whose forward differs from its base's in inference alone says so by this attribute."""
    return getattr(type(head), "forward_in_training", type(head).forward)


@contextmanager
def image_by_image(model: GeneralizedRCNN, seeds: Sequence[int]) -> Iterator[None]:
    """Within the block, the losses that the heads give are (N,) tensors, one value for each image.

    What is sampled for an image, and so its losses, follows from its seed, whatever else is in its batch.

    Args:
        model: gives losses, see :func:`takes_batches`.
        seeds: of the N images that each call of the heads gets.
    """
    draws = _Draws(seeds, model.device)
    generator, heads = model.proposal_generator, model.roi_heads
    with ExitStack() as stack:

        def replace(owner: nn.Module, name: str, function: Callable) -> None:
            stack.enter_context(method_replaced(owner, name, function))

        if generator is not None:
            replace(generator, "_subsample_labels", draws.in_turn(generator._subsample_labels))
            replace(generator, "losses", _proposals_by_image(generator.losses))
        replace(heads, "_sample_proposals", draws.in_turn(heads._sample_proposals))
        for module in heads.modules():
            if isinstance(module, FastRCNNOutputLayers):
                replace(module, "losses", _boxes_by_image(module.losses))
            elif isinstance(module, _HEADS):
                replace(module, "forward", _head_by_image(module))
        yield


@contextmanager
def method_replaced(owner: nn.Module, name: str, function: Callable) -> Iterator[None]:
    """Within the block ``owner.name`` is ``function``, whether or not it has been replaced before."""
    before = vars(owner).get(name)
    setattr(owner, name, function)
    try:
        yield
    finally:
        delattr(owner, name)
        if before is not None:
            setattr(owner, name, before)


class _Draws:
    """The random numbers of each image, from its seed on."""

    def __init__(self, seeds: Sequence[int], device: torch.device):
        self.seeds = seeds
        self.device = device
        self.states: dict[int, tuple[Tensor, Tensor | None]] = {}

    def in_turn(self, function: Callable) -> Callable:
        """``function``, which is called for one image after the other, with the numbers of that image."""
        calls = itertools.count()

        def drawing(*arguments):
            image = next(calls) % len(self.seeds)
            with seeded(self.seeds[image], self.device):
                self._go_on(image)
                found = function(*arguments)
                on_gpu = self.device.type == "cuda"
                state = torch.cuda.get_rng_state(self.device) if on_gpu else None
                self.states[image] = torch.get_rng_state(), state
            return found

        return drawing

    def _go_on(self, image: int) -> None:
        on_cpu, on_gpu = self.states.get(image, (None, None))
        if on_cpu is not None:
            torch.set_rng_state(on_cpu)
        if on_gpu is not None:
            torch.cuda.set_rng_state(on_gpu, self.device)


def _together(found: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([losses[name] for losses in found]) for name in found[0]}


def _proposals_by_image(losses: Callable) -> Callable:
    def by_image(anchors, logits, labels, deltas, boxes) -> dict[str, Tensor]:
        of_each = (
            ([maps[i : i + 1] for maps in logits], labels[i : i + 1], [maps[i : i + 1] for maps in deltas])
            for i in range(len(labels))
        )
        return _together([losses(anchors, *one, boxes[i : i + 1]) for i, one in enumerate(of_each)])

    return by_image


def _boxes_by_image(losses: Callable) -> Callable:
    def by_image(predictions: tuple[Tensor, Tensor], proposals: list[Instances]) -> dict[str, Tensor]:
        counts = [len(each) for each in proposals]
        parts = zip(*(values.split(counts) for values in predictions), strict=True)
        return _together([losses(part, [each]) for part, each in zip(parts, proposals, strict=True)])

    return by_image


def _head_by_image(head: nn.Module) -> Callable:
    """The mask or keypoint head, whose layers see all images at once."""

    def by_image(features: Tensor, instances: list[Instances]) -> dict[str, Tensor]:
        predicted = head.layers(features).split([len(each) for each in instances])
        with method_replaced(head, "layers", lambda logits: logits):
            parts = zip(predicted, instances, strict=True)
            return _together([type(head).forward(head, part, [each]) for part, each in parts])

    return by_image
