"""What goes wrong in the second of two processes; for ``prepare`` of tool_process.py."""

import os
import signal
import time

from detectron2.modeling import GeneralizedRCNN
from detectron2.utils import comm

from rt_detectron.detection import Trainer
from rt_detectron.pretrain.strategies import Adversarial

STEP = 2  # the training step that goes wrong, from 1


def _at_step(cls, name: str, change) -> None:
    """``change(value)`` is what the method gives at STEP in the second process, when it trains."""
    original, calls = getattr(cls, name), []

    def method(self, *args):
        value = original(self, *args)
        if getattr(self, "training", True) and comm.get_rank() == 1:
            calls.append(1)
            return change(value) if len(calls) == STEP else value
        return value

    setattr(cls, name, method)


def _not_finite(losses: dict) -> dict:
    return {name: loss * float("nan") for name, loss in losses.items()}


def _raise(losses: dict) -> dict:
    raise FloatingPointError("Predicted boxes or scores contain Inf/NaN. Training has diverged.")


def detectors_loss_is_not_finite() -> None:
    _at_step(GeneralizedRCNN, "forward", _not_finite)


def detectors_forward_raises() -> None:
    """As Detectron2's RPN does for proposals that are not finite."""
    _at_step(GeneralizedRCNN, "forward", _raise)


def classifiers_loss_is_not_finite() -> None:
    _at_step(Adversarial, "losses", _not_finite)


def told_to_stop_during_an_evaluation() -> None:
    def test(cls, cfg, model, evaluators=None):
        if comm.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(600)
        comm.gather(None)
        return {}

    Trainer.test = classmethod(test)
