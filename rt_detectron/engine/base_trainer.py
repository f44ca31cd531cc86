"""What the trainers of classifiers, heads and detectors share."""

import logging
import math
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from detectron2.engine import SimpleTrainer
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage
from torch import Tensor, distributed

from rt_detectron.engine.processes import patient_group

logger = logging.getLogger(__name__)


class LossesOnTheWay:
    """Losses that a GPU may still be computing. To read those that are there does not wait for the others."""

    def __init__(self):
        self._queue: deque[tuple[Tensor, torch.cuda.Event | None, tuple]] = deque()

    def add(self, losses: Tensor, *about: Any) -> None:
        """Send ``losses``, of any shape, to the CPU, and keep what they are ``about`` with them."""
        arrival = None
        sent = losses.detach().to("cpu", non_blocking=True)
        if losses.device.type == "cuda":
            arrival = torch.cuda.Event()
            arrival.record()
        self._queue.append((sent, arrival, about))

    def arrived(self, wait: bool = False) -> Iterator[tuple]:
        """``(losses, *about)`` of those that have arrived, in order, each once; with ``wait`` of all."""
        while self._queue:
            losses, arrival, about = self._queue[0]
            if arrival is not None:
                if wait:
                    arrival.synchronize()
                elif not arrival.query():
                    return
            self._queue.popleft()
            yield losses, *about


def write_losses(rows: Sequence[tuple[int, dict[str, float], float]]) -> list[float]:
    """Write losses to Detectron2's event storage, as means over the processes. Call it in all of them.

    As ``SimpleTrainer.write_metrics``, but for several iterations at once, and by sums of tensors, where that
    one gathers pickled dicts. What is not finite is not written.

    Args:
        rows: for each iteration its number, this process's losses by name, and the seconds that it waited for
            the data. Numbers and names are the same in all processes.

    Returns:
        The sum of the losses of each iteration.
    """
    means = torch.tensor([loss for _, losses, _ in rows for loss in losses.values()], dtype=torch.float64)
    longest = torch.tensor([seconds for *_, seconds in rows], dtype=torch.float64)
    if comm.get_world_size() > 1:
        distributed.all_reduce(means, group=patient_group())
        means /= comm.get_world_size()
        distributed.all_reduce(longest, distributed.ReduceOp.MAX, group=patient_group())
    storage, values, totals = get_event_storage(), iter(means.tolist()), []
    for (iteration, losses, seconds), data_time in zip(rows, longest.tolist(), strict=True):
        found = {name: next(values) for name in losses}
        totals.append(sum(found.values()))
        storage.put_scalar("rank_data_time", seconds, cur_iter=iteration)
        if comm.is_main_process():
            storage.put_scalar("data_time", data_time, cur_iter=iteration)
            if math.isfinite(totals[-1]):
                storage.put_scalar("total_loss", totals[-1], cur_iter=iteration)
                if len(found) > 1:
                    storage.put_scalars(cur_iter=iteration, **found)
    return totals


class BaseTrainer(SimpleTrainer):
    """Detectron2's SimpleTrainer; resumed, its optimiser has the options of the config.

    So the learning rate that the config has now counts, as the advice after a divergence needs it, and not
    that of the time when the checkpoint was written.
    """

    def _write_metrics(self, loss_dict, data_time: float, prefix: str = "", iter: int | None = None) -> None:
        """The losses of every ``gather_metric_period``-th step, see :func:`write_losses`."""
        if (self.iter + 1) % self.gather_metric_period == 0:
            write_losses([(self.iter, {k: float(loss) for k, loss in loss_dict.items()}, data_time)])

    def state_of_process(self) -> dict:
        """What this process alone needs to go on, as torch saves it. Called after a step."""
        return {}

    def load_state_of_process(self, states: list[dict]) -> None:
        """Take over what :meth:`state_of_process` gave in each process, however many there were."""

    def load_state_dict(self, state: dict) -> None:
        super().load_state_dict({**state, "optimizer": _with_options_of(self.optimizer, state["optimizer"])})
        _with_strides_of_parameters(self.optimizer)


# Options that tell optimisers with different states apart.
_KINDS = ("momentum", "betas", "alpha", "rho", "lambd", "etas")


def _with_options_of(optimizer: torch.optim.Optimizer, state: dict) -> dict:
    """A saved ``state`` of an optimiser, with the learning rate and all other options of ``optimizer``.

    Raises:
        ValueError: if it is of an optimiser of another kind, or for other parameters.
    """
    kind, earlier = (
        [name for name in _KINDS if name in groups[0]]
        for groups in (optimizer.param_groups, state["param_groups"])
    )
    if kind != earlier:  # torch takes its state all the same, and fails in the next step or begins it anew
        raise ValueError(f"its optimizer is of another kind: {earlier}, not {kind}")
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
