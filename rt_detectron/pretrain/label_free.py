"""Robustness for a network that exists, without labels."""

import copy

import torch
from torch import Tensor, nn

from rt_detectron.attacks import PGD
from rt_detectron.layers.folding import fold
from rt_detectron.modeling.classifier import Classifier, versioned
from rt_detectron.pretrain.schedules import FULL_STRENGTH, EpsSchedule
from rt_detectron.pretrain.strategies import Adversarial
from rt_detectron.utils.modes import eval_mode


class LabelFree(Adversarial):
    """FARE: under attack, the features stay where those of the original network are on the clean images.

    It minimises the squared L2 distance between the two (Schlarmann et al. 2024, equation 3,
    https://arxiv.org/abs/2402.12336). The original is the network that the training starts from, frozen. So
    neither labels nor a head are needed: any pretrained backbone serves, and a head trained on the original,
    which is kept as it is, still fits afterwards. Features are the inputs of the last linear layer.

    Args:
        attack: a PGD, which here maximises the distance. It needs a random start, since the distance has no
            gradient where the two networks agree. The authors take 10 steps.
        schedule: of the attack's strength.
    """

    needs_weights = True
    compilable = False  # hooks give it the features
    attack: PGD

    def __init__(self, attack: PGD, schedule: EpsSchedule = FULL_STRENGTH):
        super().__init__(attack, schedule)
        self.check_takes_other_loss()

    def begin(self, classifier: Classifier, has_head: bool) -> None:
        self.has_head = has_head
        # It learns nothing, and weight decay must not shrink it.
        classifier.network.get_submodule(classifier.last_linear).requires_grad_(False)
        self._last_layer = f"network.{classifier.last_linear}"
        self._keep(copy.deepcopy(classifier).eval())

    def _keep(self, original: Classifier) -> None:
        self._original = original
        self._folded = fold(original)

    def begin_step(self, images):
        with torch.no_grad():
            self._clean = self._features(self._folded, images)

    def perturb(self, model, images, labels, progress):
        return super().perturb(model, images, self._clean, progress)

    def _perturb(self, attack, model, images, labels):
        """``labels`` are the original's features."""

        def objective(batches: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
            distances = _squared_distance(self._features(model, batches[0]), labels)
            return [(distances, torch.zeros_like(distances, dtype=torch.bool))]

        with eval_mode(model):
            return attack.maximize(objective, [images])[0]

    def losses(self, classifier, images, adversarial, labels):
        features = self._features(classifier, adversarial)
        return {"loss_features": _squared_distance(features, self._clean).mean()}

    def _features(self, model: nn.Module, images: Tensor) -> Tensor:
        """What the last linear layer of ``model`` is given, (N, D)."""
        found = []
        layer = next(module for name, module in model.named_modules() if name.endswith(self._last_layer))
        with layer.register_forward_pre_hook(lambda _, inputs: found.append(inputs[0])):
            model(images)
        return found[0]

    def state_dict(self) -> dict:
        """The original, too: its file may be gone when the training is resumed."""
        return {"original": self._original.network.state_dict(), "has_head": self.has_head}

    def load_state_dict(self, state: dict) -> None:
        self.has_head = state["has_head"]
        network = self._original.network
        network.load_state_dict(versioned(state["original"], network))
        self._keep(self._original)


def _squared_distance(features: Tensor, others: Tensor) -> Tensor:
    """(N, D) each to (N,), in float32 whatever autocast chose."""
    return (features.float() - others.float()).square().sum(1)
