"""Detectron2's optimiser, with a learning rate of its own for what was pretrained."""

from collections.abc import Callable

import torch
from detectron2.config import CfgNode
from detectron2.solver.build import get_default_optimizer_params, maybe_add_gradient_clipping
from torch import nn

from rt_detectron.checkpoint.detection_checkpointer import TRUNK
from rt_detectron.utils.errors import InputError


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
