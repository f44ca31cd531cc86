"""The training step: Detectron2's, watched for divergence."""

import logging

import torch
from detectron2.engine import AMPTrainer, SimpleTrainer, create_ddp_model
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage
from torch import Tensor, nn

from rt_detectron.layers.frozen_norm import fold_frozen_norms
from rt_detectron.utils.errors import InputError, one_line

logger = logging.getLogger(__name__)

DIVERGED = "the training diverged around iteration {}; log.txt says how"
WINDOW = 20  # iterations whose median loss is looked at
EXPLOSION = 100.0  # so many times the median loss of the first ones is no training any more


class DetectorTrainer(SimpleTrainer):
    """Detectron2's SimpleTrainer, which notes a loss that is not finite or explodes, and does not raise."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._broken = False
        self._at_first: float | None = None  # the median loss of the first WINDOW iterations
        self._steps = 0

    def run_step(self):
        try:
            super().run_step()
        except FloatingPointError as error:  # in the process that gathers the losses
            self._break(one_line(error))
            return
        self._steps += 1
        if comm.is_main_process() and self._steps >= WINDOW:
            self._look_for_explosion()

    def _look_for_explosion(self) -> None:
        median = get_event_storage().history("total_loss").median(WINDOW)
        if self._at_first is None:
            self._at_first = median
        elif median > EXPLOSION * self._at_first:
            self._break(
                f"the median loss of {WINDOW} iterations is {median:.3g}, {self._at_first:.3g} at first"
            )

    def _break(self, reason: str) -> None:
        if not self._broken:
            logger.error("Diverged: %s", reason)
        self._broken = True

    def has_broken(self, wait: bool = False) -> bool:
        """Whether the training has diverged, as far as this process knows.

        Args:
            wait: look at the weights, too, as before they are saved: a step with finite losses can leave
                weights that are not.
        """
        if wait and not self._broken:
            for name, parameter in self.model.named_parameters():
                if not torch.isfinite(parameter).all():
                    self._break(f"{name} is not finite")
                    break
        return self._broken


class DetectorAMPTrainer(DetectorTrainer, AMPTrainer):
    """The same in mixed precision; needs a GPU."""


def fast(model: nn.Module) -> nn.Module:
    """Have ``model`` compute the same with fewer passes over memory, in place; benchmarks/train_net.py.

    Frozen norms are folded into their convolutions. On CPUs the backbone computes in channels_last, which
    spares oneDNN's convolutions their conversions.
    """
    fold_frozen_norms(model)
    backbone = getattr(model, "backbone", None)
    if backbone is not None and next(model.parameters()).device.type == "cpu":
        backbone.to(memory_format=torch.channels_last)
        backbone.register_forward_pre_hook(_in_channels_last)
    return model


def _in_channels_last(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(x.contiguous(memory_format=torch.channels_last) for x in inputs)


def build_trainer(
    model: nn.Module, loader, optimizer: torch.optim.Optimizer, amp: bool = False, **ddp
) -> SimpleTrainer:
    """The trainer of the steps of ``model``, in DistributedDataParallel where there are several processes.

    Args:
        ddp: arguments of DistributedDataParallel.

    Raises:
        InputError: for torch's SyncBatchNorm in several processes on CPUs.
    """
    on_cpu = next(model.parameters()).device.type == "cpu"
    if on_cpu and comm.get_world_size() > 1 and any(isinstance(m, nn.SyncBatchNorm) for m in model.modules()):
        raise InputError("SyncBN needs GPUs: on several CPU processes set NORM naiveSyncBN, BN or FrozenBN")
    # On CPUs DistributedDataParallel wants no device ids.
    wrapped = create_ddp_model(model, **ddp, **({"device_ids": None} if on_cpu else {}))
    return (DetectorAMPTrainer if amp else DetectorTrainer)(wrapped, loader, optimizer)
