"""A classifier and the way it is trained, as one module for Detectron2's trainers."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from rt_detectron.data.loader import to_device
from rt_detectron.layers.folding import FoldedNetwork, fold
from rt_detectron.modeling.classifier import Classifier
from rt_detectron.pretrain.schedules import Resolution
from rt_detectron.pretrain.strategies import Standard
from rt_detectron.utils.errors import InputError, one_line
from rt_detectron.utils.modes import eval_mode
from rt_detectron.utils.ranges import images_are_checked
from rt_detectron.utils.seeds import seeded


class Pretraining(nn.Module):
    """From a batch to the losses of a training step, or in eval mode to logits.

    Args:
        classifier: what is trained.
        strategy: makes the losses.
        resolution: of the images trained on; None leaves them as they are.

    Attributes:
        attacked: the classifier as attacks see it.
        progress: share of the training that is done; the trainer sets it.
        attack_dtype: what attacks are computed in, by autocast; None: what the rest of the step is. The
            trainer sets it.

    Raises:
        InputError: for a strategy or a resolution that is none.
    """

    def __init__(self, classifier: Classifier, strategy: Standard, resolution: Resolution | None = None):
        super().__init__()
        if not isinstance(strategy, Standard):
            raise InputError(
                f"model.strategy is {strategy!r}; it must be one of rt_detectron.pretrain.strategies"
            )
        if resolution is not None and not callable(resolution):
            raise InputError(
                f"model.resolution is {resolution!r}; it must be a Resolution, of "
                "rt_detectron.pretrain.schedules, or null for none"
            )
        self.classifier = classifier
        self.strategy = strategy
        self.resolution = resolution
        self.attacked = AttackedModel(classifier)
        self.progress = 0.0
        self.attack_dtype: torch.dtype | None = None

    @property
    def device(self) -> torch.device:
        return self.classifier.mean.device

    def compile_networks(self, backend: str) -> None:
        """Have torch.compile compute the classifier, and its folded copy that is attacked.

        In place: modules, and the names of their weights, stay as they are.
        """
        self.classifier.compile(backend=backend)
        self.attacked.backend = backend

    def forward(self, batch) -> dict[str, Tensor] | Tensor:
        """In training mode a dict of losses, in eval mode the logits (N, num_classes) of the clean images.

        Args:
            batch: see :func:`to_device`.
        """
        images, labels = to_device(batch, self.device)
        if not self.training:
            return self.classifier(images)
        if self.resolution is not None:
            images = self.resolution(images, self.progress)
        self.strategy.begin_step(images)
        adversarial = images
        if type(self.strategy).perturb is not Standard.perturb:  # else nothing is attacked
            with self._precision_of_attacks(), images_are_checked():  # by to_device
                adversarial = self.strategy.perturb(self.attacked.now(), images, labels, self.progress)
            self.attacked.release()
            # What autocast cast without gradients, as for the predictions on clean images, must not be used
            # again: the weights would get none.
            torch.clear_autocast_cache()
        return self.strategy.losses(self.classifier, images, adversarial, labels)

    def _precision_of_attacks(self) -> AbstractContextManager:
        if self.attack_dtype is None:
            return nullcontext()
        return torch.autocast(self.device.type, self.attack_dtype)


def check_takes(classifier: Classifier, dataset: Dataset, resolution: Resolution | None = None) -> None:
    """Check that the network takes the images of ``dataset``, on its first one.

    Args:
        classifier: the network.
        dataset: of the images, transformed.
        resolution: what else they go through.

    Raises:
        InputError: if it does not, such as a transformer of another image size.
    """
    with seeded(0):  # transforms may draw random numbers
        sample = next(iter(dataset), None)
    if sample is None:  # of few images in shards, this process has none
        return
    image, label, key = sample
    images, _ = to_device((image[None], torch.tensor([label])), classifier.mean.device)
    if resolution is not None:
        images = resolution(images, 0.0)
    try:
        with torch.no_grad(), eval_mode(classifier):
            classifier(images)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, AssertionError) as error:
        size = " x ".join(map(str, images.shape[2:]))
        raise InputError(
            f"{classifier.arch} does not take images of {size} pixels, as {key} is after the transform "
            f"({one_line(error)[:150]}): change their size, or the network"
        ) from None


class AttackedModel:
    """``classifier`` in eval mode with its present weights; batch norm is folded, which is faster.

    Attributes:
        backend: of torch.compile, which then computes the folded network; None for none.
    """

    backend: str | None = None

    def __init__(self, classifier: Classifier):
        self._classifier = classifier
        self._folded: nn.Module | None = None

    def now(self) -> nn.Module:
        """It maps images (N, 3, H, W) in [0, 1] to logits (N, num_classes)."""
        if self._folded is None:
            self._folded = fold(self._classifier)
            if self.backend and isinstance(self._folded, FoldedNetwork):
                self._folded.compile(backend=self.backend)
        self.release()
        if self.backend and isinstance(self._folded, FoldedNetwork):
            self._folded.prepare()
        return self._folded

    def release(self) -> None:
        """Free the folded copy of the weights: the training step needs the memory."""
        if isinstance(self._folded, FoldedNetwork):
            self._folded.forget()
