"""Training of the last linear layer on cached features: by SGD, or by logistic regression."""

import warnings

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rt_detectron.engine.base_trainer import BaseTrainer
from rt_detectron.transfer.features import Features
from rt_detectron.utils.errors import InputError, one_line, optional_import
from rt_detectron.utils.seeds import seeded, seeded_generator

HELD_OUT = 0.2  # of the training images, for choosing the penalty


def fresh_linear(layer: nn.Linear, seed: int) -> nn.Linear:
    """``layer``, initialised again as torch initialises linear layers, from ``seed``."""
    with seeded(seed):
        layer.reset_parameters()
    return layer


class HeadTrainer(BaseTrainer):
    """Trains a linear layer by SGD on features in memory.

    An iteration is a whole epoch, since a single step is less work than the engine's overhead around it. So
    the learning rate changes only between epochs. The order of the images, and which of them an incomplete
    last batch leaves out, is that of :class:`rt_detectron.data.loader.TrainLoader`.

    Args:
        head: what is trained.
        features: on the device of ``head``; each image gets one of its views, at random.
        optimizer: over its parameters.
        batch_size: images of a step.
        seed: for the order and the views.
    """

    diverged = "the loss is not finite in epoch {}"

    def __init__(
        self,
        head: nn.Linear,
        features: Features,
        optimizer: torch.optim.Optimizer,
        batch_size: int,
        seed: int,
    ):
        super().__init__(head, None, optimizer)
        if batch_size > len(features.labels):
            raise InputError(
                f"dataloader.total_batch_size {batch_size} exceeds the {len(features.labels)} training images"
            )
        self.features = features.views.flatten(0, 1)
        self.labels = features.labels
        self.views = len(features.views)
        self.batch_size = batch_size
        self.steps_per_epoch = len(self.labels) // batch_size
        self.seed = seed
        self.loss = torch.zeros(())

    def run_step(self):
        images = len(self.labels)
        generator = seeded_generator(self.seed, self.iter)
        order = torch.randperm(images, generator=generator)
        view = torch.randint(self.views, (images,), generator=generator)
        shape = (self.steps_per_epoch, self.batch_size)
        order, view = (x[: shape[0] * shape[1]].view(shape).to(self.labels.device) for x in (order, view))
        losses = []
        for batch, row in zip(order, view * images + order, strict=True):
            loss = F.cross_entropy(self.model(self.features[row]), self.labels[batch])
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            losses.append(loss.detach())
        self.loss = torch.stack(losses).mean()
        if not self.has_diverged():
            self._write_metrics({"loss": self.loss}, data_time=0.0)

    def has_diverged(self, wait: bool = False) -> bool:
        """Whether the last epoch's loss was not finite."""
        return not torch.isfinite(self.loss).item()


def fit_logistic_regression(
    head: nn.Linear, features: Tensor, labels: Tensor, penalties: list[float], scoring: str, seed: int
) -> tuple[float, int]:
    """Fill ``head`` with the L2-regularised logistic regression on the features, by scikit-learn's lbfgs.

    Args:
        head: (D, classes).
        features: (N, D).
        labels: (N,).
        penalties: inverse penalties C; the one that scores best on a held-out, stratified fifth of the images
            is used.
        scoring: "accuracy" or "balanced_accuracy".
        seed: for the split.

    Returns:
        C and the number of lbfgs's iterations.

    Raises:
        InputError: without scikit-learn, and for classes of fewer than two images, which cannot be split.
    """
    optional_import("sklearn.linear_model", "scikit-learn>=1.3", "head.solver=logistic_regression")
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import get_scorer
    from sklearn.model_selection import train_test_split

    x, y = features.cpu().numpy(), labels.cpu().numpy()

    def fitted(c: float, images, targets) -> LogisticRegression:
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore", ConvergenceWarning
            )  # of a weak penalty; stronger ones are tried as well
            return LogisticRegression(C=c, max_iter=1000).fit(images, targets)

    best = penalties[0]
    if len(penalties) > 1:
        try:
            x_fit, x_held, y_fit, y_held = train_test_split(
                x, y, test_size=HELD_OUT, stratify=y, random_state=seed
            )
        except ValueError as error:
            raise InputError(
                f"cannot choose head.C: {one_line(error)}; give a single one: head.C=[1.0]"
            ) from None
        score = get_scorer(scoring)
        best = max(penalties, key=lambda c: score(fitted(c, x_fit, y_fit), x_held, y_held))
    model = fitted(best, x, y)
    _fill(head, model)
    return best, int(model.n_iter_.max())


@torch.no_grad()
def _fill(head: nn.Linear, model) -> None:
    """For two classes scikit-learn has a single row: the logit of the second minus that of the first."""
    weight, bias = (torch.as_tensor(x, dtype=torch.float32) for x in (model.coef_, model.intercept_))
    if len(weight) == 1:
        weight, bias = (torch.cat([-x, x]) / 2 for x in (weight, bias))
    if len(weight) != head.out_features:
        raise InputError(f"{head.out_features - len(model.classes_)} classes have no training images")
    head.weight.copy_(weight)
    head.bias.copy_(bias)
