"""What the trainers of classifiers, heads and detectors share."""

import logging

import torch
from detectron2.engine import SimpleTrainer

logger = logging.getLogger(__name__)


class BaseTrainer(SimpleTrainer):
    """Detectron2's SimpleTrainer; resumed, its optimiser has the options of the config.

    So the learning rate that the config has now counts, as the advice after a divergence needs it, and not
    that of the time when the checkpoint was written.
    """

    def state_of_process(self) -> dict:
        """What this process alone needs to go on, as torch saves it. Called after a step."""
        return {}

    def load_state_of_process(self, states: list[dict]) -> None:
        """Take over what :meth:`state_of_process` gave in each process, however many there were."""

    def load_state_dict(self, state: dict) -> None:
        super().load_state_dict({**state, "optimizer": _with_options_of(self.optimizer, state["optimizer"])})
        _with_strides_of_parameters(self.optimizer)


def _with_options_of(optimizer: torch.optim.Optimizer, state: dict) -> dict:
    """A saved ``state`` of an optimiser, with the learning rate and all other options of ``optimizer``."""
    rates = [group.get("initial_lr", group["lr"]) for group in optimizer.param_groups]
    groups = [
        {**group, "lr": rate, "initial_lr": rate, "params": saved["params"]}
        for group, rate, saved in zip(optimizer.param_groups, rates, state["param_groups"], strict=True)
    ]
    before = max(saved.get("initial_lr", saved["lr"]) for saved in state["param_groups"])
    if max(rates) != before:
        logger.warning(
            "The learning rate is now %g, as the config says; it was %g before", max(rates), before
        )
    return {**state, "param_groups": groups}


def _with_strides_of_parameters(optimizer: torch.optim.Optimizer) -> None:
    """Lay momentum and the like out in memory as their parameters are.

    torch's fused kernels pair the numbers by their place in memory, and say nothing if a checkpoint was
    written in another layout, such as channels_last.
    """
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            is_like_it = isinstance(value, torch.Tensor) and value.shape == parameter.shape
            if is_like_it and value.stride() != parameter.stride():
                state[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
