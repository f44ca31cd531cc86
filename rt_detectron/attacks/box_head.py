"""Attacks on the box head of an R-CNN alone, as published: A_cls, A_reg, A_cwa, MTD and DAG.

They raise the losses of the detections themselves and leave the proposals' to themselves. Of a dense detector
(RetinaNet, FCOS) they raise the losses of its one head. Each proposal can be weighted by its class, and its
loss clipped, as Li et al. do (TIFS 2025, "On the Importance of Backbone to the Adversarial Robustness of
Object Detectors", https://arxiv.org/abs/2305.17438).
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from detectron2.modeling.roi_heads.fast_rcnn import FastRCNNOutputLayers
from detectron2.structures import Instances
from torch import Tensor, nn

from rt_detectron.attacks.detection import (
    CLASSIFICATION,
    REGRESSION,
    DetectorAttack,
    LossAttack,
    other_classes,
    register_detector_attack,
)
from rt_detectron.utils.errors import InputError


class BoxHeadAttack(LossAttack):
    """Raises losses of the box head, the mean over its proposals.

    With ``clip``, a proposal's loss above it counts as ``clip``, and so does its gradient less.
    """

    clippable = True

    def replaced_losses(self, model: nn.Module) -> dict[nn.Module, Callable]:
        if not self.clip:
            return {}
        return dict.fromkeys(box_predictors(model, f"{self.name} with CLIP"), self._losses)

    def _losses(
        self, predictor: FastRCNNOutputLayers, predictions: tuple[Tensor, Tensor], proposals: list[Instances]
    ) -> dict[str, Tensor]:
        weights = self.class_weights(predictor.num_classes)
        return _clipped_means(predictor, self.clip, predictions, proposals, weights)

    def class_weights(self, num_classes: int) -> Tensor | None:
        """(num_classes + 1,) what the classification loss of a class is multiplied by, background last."""
        return None


@register_detector_attack
class BoxClassification(BoxHeadAttack):
    """Raises the classification loss of the box head."""

    name, terms, targetable = "A_cls", CLASSIFICATION, True


@register_detector_attack
class BoxRegression(BoxHeadAttack):
    """Raises the regression loss of the box head."""

    name, terms = "A_reg", REGRESSION


@register_detector_attack
class BoxLosses(BoxHeadAttack):
    """Raises both losses of the box head."""

    name, terms = "A_box", CLASSIFICATION + REGRESSION


@register_detector_attack
class ClassBalanced(BoxHeadAttack):
    """Raises both losses of the box head, where rare classes count more in the classification.

    A class counts as the inverse of its number of objects in the data set, scaled so that the mean over the
    classes is 1; background counts 1. So it is in the code of Li et al. (after Chen et al. 2021,
    "Class-Aware Robust Adversarial Training for Object Detection").
    """

    name, terms = "A_cwa", CLASSIFICATION + REGRESSION
    needs_object_counts = True

    def replaced_losses(self, model: nn.Module) -> dict[nn.Module, Callable]:
        return dict.fromkeys(box_predictors(model, self.name), self._losses)

    def class_weights(self, num_classes: int) -> Tensor:
        return inverse_frequency(self.object_counts, num_classes)


@register_detector_attack
class Dense(BoxHeadAttack):
    """DAG: raises the score of a wrong class over the true one's, for each proposal that is still right.

    The wrong class that stands for a true one is drawn once, by the seed. (Xie et al. 2017, "Adversarial
    Examples for Semantic Segmentation and Object Detection", https://arxiv.org/abs/1703.08603, equation 1;
    they bound the number of steps, and here it is the ball that bounds the perturbation.)
    """

    name, terms, clippable = "DAG", ("loss_cls",), False

    def replaced_losses(self, model: nn.Module) -> dict[nn.Module, Callable]:
        return dict.fromkeys(box_predictors(model, self.name), self._losses)

    def _losses(
        self, predictor: FastRCNNOutputLayers, predictions: tuple[Tensor, Tensor], proposals: list[Instances]
    ) -> dict[str, Tensor]:
        scores, classes = predictions[0], torch.cat([each.gt_classes for each in proposals])
        right = ((classes < predictor.num_classes) & (scores.argmax(1) == classes)).nonzero()[:, 0]
        true = classes[right]
        wrong = other_classes(predictor.num_classes, self.seed).to(true.device)[true]
        gaps = scores[right, wrong] - scores[right, true]
        return {"loss_cls": gaps.sum() / max(len(classes), 1)}


@register_detector_attack
class MultiTask(DetectorAttack):
    """MTD: of the attacks on classification and on regression, the one that raises their sum more.

    Image by image (Zhang & Wang 2019, "Towards Adversarially Robust Object Detection",
    https://arxiv.org/abs/1907.10310, equation 6). It costs as much as both.
    """

    name, clippable = "MTD", True

    def __call__(self, model: nn.Module, inputs: Sequence[dict]) -> list[dict]:
        before = self._both.value(model, inputs)
        chosen = zip(self._chosen(model, inputs), before, strict=True)
        return [{**found, "objective": (first, last)} for (found, last), first in chosen]

    def perturb(self, model: nn.Module, inputs: Sequence[dict]) -> list[dict]:
        return [found for found, _ in self._chosen(model, inputs)]

    def check(self, model: nn.Module) -> None:
        for part in self._parts:
            part.check(model)

    @property
    def _parts(self) -> list[LossAttack]:
        return [
            kind(self.pgd, self.seed, clip=self.clip, padding=self.padding, amp=self.amp)
            for kind in (BoxClassification, BoxRegression)
        ]

    @property
    def _both(self) -> BoxLosses:
        return BoxLosses(self.pgd, self.seed, clip=self.clip)

    def _chosen(self, model: nn.Module, inputs: Sequence[dict]) -> list[tuple[dict, float]]:
        """Each image, attacked, and the sum of its losses."""
        tried = [attack.perturb(model, inputs) for attack in self._parts]
        valued = [zip(found, self._both.value(model, found), strict=True) for found in tried]
        return [max(pairs, key=lambda pair: pair[1]) for pairs in zip(*valued, strict=True)]

    @property
    def passes(self) -> dict[str, int]:
        passes = self.pgd.passes
        return {"forward": 2 * passes["forward"] + 3, "backward": 2 * passes["backward"]}


def box_predictors(model: nn.Module, what: str) -> list[FastRCNNOutputLayers]:
    """The layers that predict the boxes of an R-CNN, one for each stage of a cascade.

    Raises:
        InputError: for a detector without, or with losses other than cross entropy and one smooth L1 loss.
    """
    roi_heads = getattr(model, "roi_heads", None)
    found = [m for m in roi_heads.modules() if isinstance(m, FastRCNNOutputLayers)] if roi_heads else []
    if not found:
        raise InputError(
            f"attack: {what} is defined for the box head of an R-CNN, and {type(model).__name__} has none; "
            "use A_cls and A_reg without CLIP"
        )
    for predictor in found:
        if predictor.use_sigmoid_ce or predictor.box_reg_loss_type != "smooth_l1":
            raise InputError(f"attack: {what} needs a box head with cross entropy and smooth L1 losses")
    return found


def proposal_losses(
    predictor: FastRCNNOutputLayers,
    predictions: tuple[Tensor, Tensor],
    proposals: list[Instances],
    class_weights: Tensor | None = None,
) -> dict[str, Tensor]:
    """What :meth:`FastRCNNOutputLayers.losses` gives the means of: (R,) each, of all R proposals."""
    scores, deltas = predictions
    classes = torch.cat([each.gt_classes for each in proposals])
    weights = None if class_weights is None else class_weights.to(scores)
    classification = F.cross_entropy(scores, classes, weight=weights, reduction="none")
    regression = torch.zeros_like(classification)
    rows = ((classes >= 0) & (classes < predictor.num_classes)).nonzero()[:, 0]
    if len(rows):
        boxes = torch.cat([each.proposal_boxes.tensor for each in proposals])
        # Without an object in its image a proposal has no gt_boxes, and none of its rows counts.
        truth = torch.cat(
            [(each.gt_boxes if each.has("gt_boxes") else each.proposal_boxes).tensor for each in proposals]
        )
        targets = predictor.box2box_transform.get_deltas(boxes[rows], truth[rows])
        by_class = deltas.view(len(deltas), -1, 4)[rows]  # of one class if the head tells none apart
        found = by_class[torch.arange(len(rows)), classes[rows] if by_class.shape[1] > 1 else 0]
        each_side = F.smooth_l1_loss(found, targets, reduction="none", beta=predictor.smooth_l1_beta)
        regression = regression.index_add(0, rows, each_side.sum(1))
    losses = {"loss_cls": classification, "loss_box_reg": regression}
    return {name: values * predictor.loss_weight.get(name, 1.0) for name, values in losses.items()}


def clip_proposal_losses(model: nn.Module, limit: float) -> None:
    """Have the box head of ``model`` train on losses of at most ``limit`` for each proposal, in place.

    So Li et al. train.

    Raises:
        InputError: as :func:`box_predictors`.
    """
    for predictor in box_predictors(model, "CLIP"):
        predictor.losses = partial(_clipped_means, predictor, limit)


def _clipped_means(
    predictor: FastRCNNOutputLayers,
    limit: float,
    predictions: tuple[Tensor, Tensor],
    proposals: list[Instances],
    class_weights: Tensor | None = None,
) -> dict[str, Tensor]:
    losses = proposal_losses(predictor, predictions, proposals, class_weights)
    # As Detectron2, 0 without proposals.
    return {name: _clipped(values, limit).sum() / max(len(values), 1) for name, values in losses.items()}


def inverse_frequency(counts: Sequence[int], num_classes: int) -> Tensor:
    """(num_classes + 1,) weights of classes with so many objects each, see :class:`ClassBalanced`.

    A class without objects weighs nothing, and takes no part in the mean.

    Raises:
        InputError: if there are not as many counts as classes.
    """
    if len(counts) != num_classes:
        raise InputError(
            f"attack: A_cwa got the objects of {len(counts)} classes; the detector has {num_classes}"
        )
    inverse = torch.tensor([1 / count if count else 0.0 for count in counts], dtype=torch.float64)
    present = max(sum(count > 0 for count in counts), 1)
    weights = present * inverse / inverse.sum().clamp_min(torch.finfo(torch.float64).tiny)
    return torch.cat([weights, weights.new_ones(1)]).float()


def _clipped(values: Tensor, limit: float) -> Tensor:
    """``values`` of at most ``limit``; beyond it the gradient shrinks by the same factor, as in Li et al."""
    if not limit:
        return values
    return values * (limit / values.detach().clamp_min(limit))
