"""The training step: Detectron2's, watched for divergence."""

import logging
from collections.abc import Callable

import torch
from detectron2.config import CfgNode
from detectron2.engine import AMPTrainer, SimpleTrainer, create_ddp_model
from detectron2.solver.build import get_default_optimizer_params, maybe_add_gradient_clipping
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage
from torch import Tensor, nn

from rt_detectron.checkpoint.checkpointer import TRUNK
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
        self._diverged = False
        self._at_first: float | None = None  # the median loss of the first WINDOW iterations
        self._steps = 0

    def run_step(self):
        try:
            super().run_step()
        except FloatingPointError as error:  # in the process that gathers the losses
            self._note_divergence(one_line(error))
            return
        self._steps += 1
        if comm.is_main_process() and self._steps >= WINDOW:
            self._look_for_explosion()

    def _look_for_explosion(self) -> None:
        median = get_event_storage().history("total_loss").median(WINDOW)
        if self._at_first is None:
            self._at_first = median
        elif median > EXPLOSION * self._at_first:
            self._note_divergence(
                f"the median loss of {WINDOW} iterations is {median:.3g}, {self._at_first:.3g} at first"
            )

    def _note_divergence(self, reason: str) -> None:
        if not self._diverged:
            logger.error("Diverged: %s", reason)
        self._diverged = True

    def has_diverged(self, wait: bool = False) -> bool:
        """Whether the training has diverged, as far as this process knows.

        Args:
            wait: look at the weights, too, as before they are saved: a step with finite losses can leave
                weights that are not.
        """
        if wait and not self._diverged:
            for name, parameter in self.model.named_parameters():
                if not torch.isfinite(parameter).all():
                    self._note_divergence(f"{name} is not finite")
                    break
        return self._diverged


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


def backbone_factor(multiplier: float) -> Callable[[str], float]:
    """An ``lr_factor_func`` of Detectron2's ``get_default_optimizer_params``.

    Args:
        multiplier: of the learning rate of what a backbone's file fills (also the res5 of a C4 head, but not
            an FPN's own layers, which start at random).

    Raises:
        InputError: for a multiplier that is not a finite number > 0; freezing is MODEL.BACKBONE.FREEZE_AT's.
    """
    if not 0 < multiplier < float("inf"):
        raise InputError(
            f"SOLVER.BACKBONE_MULTIPLIER is {multiplier}; it must be > 0 (MODEL.BACKBONE.FREEZE_AT 5 freezes)"
        )
    return lambda name: multiplier if TRUNK.search(name) else 1.0


def build_optimizer(cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
    """Detectron2's SGD as SOLVER says, in one fused kernel, with SOLVER.BACKBONE_MULTIPLIER.

    Raises:
        InputError: for a multiplier that cannot be.
    """
    solver = cfg.SOLVER
    if solver.BACKBONE_MULTIPLIER != 1 and solver.BIAS_LR_FACTOR not in (None, 1):
        raise InputError("SOLVER.BACKBONE_MULTIPLIER and SOLVER.BIAS_LR_FACTOR: set one of the two to 1")
    params = get_default_optimizer_params(
        model,
        base_lr=solver.BASE_LR,
        weight_decay_norm=solver.WEIGHT_DECAY_NORM,
        bias_lr_factor=solver.BIAS_LR_FACTOR,
        weight_decay_bias=solver.WEIGHT_DECAY_BIAS,
        lr_factor_func=backbone_factor(solver.BACKBONE_MULTIPLIER),
    )
    # Under AMP the fused kernel would undo the loss scaling itself, after the clipping.
    how = "foreach" if solver.AMP.ENABLED else "fused"
    return maybe_add_gradient_clipping(cfg, torch.optim.SGD)(
        params,
        lr=solver.BASE_LR,
        momentum=solver.MOMENTUM,
        nesterov=solver.NESTEROV,
        weight_decay=solver.WEIGHT_DECAY,
        **{how: True},
    )
