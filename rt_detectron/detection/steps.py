"""The training step of a detector: Detectron2's, with checks for divergence, and its optimiser."""

import functools
import logging
import math
import re
import statistics
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from detectron2.config import CfgNode
from detectron2.engine import AMPTrainer, create_ddp_model
from detectron2.solver.build import (
    _generate_optimizer_class_with_gradient_clipping,
    get_default_optimizer_params,
    maybe_add_gradient_clipping,
)
from detectron2.utils import comm
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from rt_detectron.checkpoint.checkpointer import TRUNK
from rt_detectron.detection.loader import ChangedBatches, batches_from
from rt_detectron.engine.base_trainer import BaseTrainer, LossesOnTheWay, write_losses
from rt_detectron.layers.frozen_norm import fold_frozen_norms
from rt_detectron.layers.mask_head import use_one_class_masks
from rt_detectron.layers.paste_masks import use_product_paste
from rt_detectron.layers.roi_align import use_rows_roi_align
from rt_detectron.utils.errors import InputError, one_line

logger = logging.getLogger(__name__)

DIVERGED = "the training diverged around iteration {}; log.txt says how"
WINDOW = 20  # iterations whose median loss is checked
EXPLOSION = 100.0  # a median loss this many times that of the first iterations has diverged


class DetectorTrainer(BaseTrainer):
    """Detectron2's SimpleTrainer for detectors; resumed, it goes on as if it had not been interrupted.

    It notes a loss that is not finite or explodes, instead of raising: where it is known at once, as on CPUs,
    the step changes nothing. On a GPU the host does not wait for it, but looks at the losses that are there,
    at all of them every ``gather_metric_period`` steps and before anything is saved. Only where several
    processes run, and the forward pass of one of them finds no finite numbers, the FloatingPointError is
    raised: the others already wait for the gradients of this one.
    """

    def __init__(self, model: nn.Module, data_loader: Iterable, optimizer: torch.optim.Optimizer, **kwargs):
        super().__init__(model, data_loader, optimizer, **kwargs)
        self._diverged = self._is_not_finite = False
        self._on_the_way = LossesOnTheWay()
        self._unwritten: list[tuple[int, dict[str, float], float]] = []  # see write_losses
        self._losses: deque[float] = deque(maxlen=WINDOW)  # sums, the means over all processes
        self._at_first: float | None = None  # the median loss of the first WINDOW iterations

    _data_loader_iter_obj: Iterator | None

    @property
    def _data_loader_iter(self) -> Iterator:
        if self._data_loader_iter_obj is None:
            self._data_loader_iter_obj = batches_from(self.data_loader, self.iter)
        return self._data_loader_iter_obj

    def run_step(self):
        self._is_local = True
        try:
            super().run_step()
        except FloatingPointError as error:
            self._note_divergence(one_line(error))
            if self._is_local and comm.get_world_size() > 1:
                raise

    def _write_metrics(self, loss_dict, data_time: float, prefix: str = "", iter: int | None = None) -> None:
        self._is_local = False  # of what this process finds from now on, the others are told
        losses = torch.cat([loss.detach().reshape(1) for loss in loss_dict.values()])
        self._on_the_way.add(losses, self.iter, tuple(loss_dict), data_time)
        self._look()
        if (self.iter + 1) % self.gather_metric_period == 0:
            self._write_all()
        if self._is_not_finite:
            raise FloatingPointError("a loss is not finite")  # ahead of the optimiser's step

    def _look(self, wait: bool = False) -> None:
        """Check the losses that have arrived."""
        for losses, iteration, names, data_time in self._on_the_way.arrived(wait):
            found = dict(zip(names, losses.tolist(), strict=True))
            self._unwritten.append((iteration, found, data_time))
            if not self._is_not_finite and not math.isfinite(sum(found.values())):
                self._is_not_finite = True
                self._note_divergence(f"Loss became infinite or NaN at iteration={iteration}: {found}")

    def _write_all(self) -> None:
        """Write the losses of all steps since the last time. Called in all processes."""
        self._look(wait=True)
        rows, self._unwritten = self._unwritten, []
        for total in write_losses(rows) if rows else ():
            if math.isfinite(total):
                self._losses.append(total)
                self._check_explosion()

    def _check_explosion(self) -> None:
        if len(self._losses) < WINDOW:
            return
        median = statistics.median(self._losses)
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
            wait: look at the losses of all steps, and at the weights, as before saving: a step with finite
                losses can leave weights that are not finite. All processes must ask for it at a time.
        """
        if wait:
            self._write_all()
        else:
            self._look()
        if wait and not self._diverged:
            for name, parameter in self.model.named_parameters():
                if not torch.isfinite(parameter).all():
                    self._note_divergence(f"{name} is not finite")
                    break
        return self._diverged

    def state_dict(self) -> dict:
        state = {**super().state_dict(), "losses": list(self._losses), "at_first": self._at_first}
        if hasattr(self.data_loader, "state_dict"):
            state["loader"] = self.data_loader.state_dict()
        return state

    def load_state_dict(self, state: dict) -> None:
        super().load_state_dict(state)
        self._losses.extend(state.get("losses", ()))
        self._at_first = state.get("at_first")
        if "loader" in state and hasattr(self.data_loader, "load_state_dict"):
            self.data_loader.load_state_dict(state["loader"])

    def state_of_process(self) -> dict:
        """That of the loader; and the running mean that dense detectors (RetinaNet, FCOS) divide their losses
        by, which is in no state dict."""
        loader = self.data_loader
        state = loader.state_of_process() if isinstance(loader, ChangedBatches) else {}
        if hasattr(self.detector, "loss_normalizer"):
            state["loss_normalizer"] = float(self.detector.loss_normalizer)
        return state

    def load_state_of_process(self, states: list[dict]) -> None:
        if not states:
            return
        mine = states[comm.get_rank() % len(states)]
        if "loss_normalizer" in mine:
            self.detector.loss_normalizer = mine["loss_normalizer"]
        if isinstance(self.data_loader, ChangedBatches):
            self.data_loader.load_state_of_process(states)

    @property
    def detector(self) -> nn.Module:
        """The model without DistributedDataParallel."""
        return self.model.module if isinstance(self.model, DistributedDataParallel) else self.model


class DetectorAMPTrainer(DetectorTrainer, AMPTrainer):
    """The same in mixed precision; needs a GPU."""

    def load_state_dict(self, state: dict) -> None:
        # A training that went on without mixed precision has left no scale.
        super().load_state_dict({"grad_scaler": self.grad_scaler.state_dict(), **state})


def check_layers(model: nn.Module, keys: str = "MODEL") -> None:
    """Raise :class:`InputError` for a layer without weights, which torch builds but cannot run.

    Args:
        keys: of the configuration that describe the model, for the message.
    """
    for name, parameter in model.named_parameters():
        if parameter.numel() == 0:
            shape = " x ".join(map(str, parameter.shape))
            raise InputError(f"{name} has no weights ({shape}): check the numbers of {keys}")


def fast(model: nn.Module) -> nn.Module:
    """Make ``model`` faster in place, without changing its function (benchmarks/train_net.py measures it).

    Frozen norms are folded into their convolutions, and masks are predicted for one class only; on CPUs
    ROIAlign is a sum of rows, and masks are pasted by products of matrices.
    """
    fold_frozen_norms(model)
    use_one_class_masks(model)
    if next(model.parameters()).device.type == "cpu":
        use_rows_roi_align(model)
        use_product_paste(model)
    return model


def build_trainer(
    model: nn.Module, loader, optimizer: torch.optim.Optimizer, amp: bool = False, log_period: int = 1, **ddp
) -> DetectorTrainer:
    """The trainer of ``model``, wrapped in DistributedDataParallel if there are several processes.

    Args:
        log_period: iterations between two times that metrics are read from the event storage, for all of
            which the losses are written at once.
        ddp: arguments of DistributedDataParallel.

    Raises:
        InputError: for mixed precision, and for torch's SyncBatchNorm in several processes, on CPUs.
    """
    on_cpu = next(model.parameters()).device.type == "cpu"
    if on_cpu and amp:
        raise InputError(
            "mixed precision needs a GPU: set SOLVER.AMP.ENABLED False (LazyConfig: train.amp.enabled=False)"
        )
    if on_cpu and comm.get_world_size() > 1 and any(isinstance(m, nn.SyncBatchNorm) for m in model.modules()):
        raise InputError("SyncBN needs GPUs: on several CPU processes set NORM naiveSyncBN, BN or FrozenBN")
    # On CPUs DistributedDataParallel takes no device ids.
    wrapped = create_ddp_model(model, **ddp, **({"device_ids": None} if on_cpu else {}))
    trainer = (DetectorAMPTrainer if amp else DetectorTrainer)(wrapped, loader, optimizer)
    trainer.gather_metric_period = math.gcd(log_period, WINDOW)  # so that an explosion is seen in time
    return trainer


def check_batch_size(images: int, key: str, processes: int) -> None:
    """Raise :class:`InputError` if a batch cannot be divided evenly among the processes.

    Args:
        images: in a batch of all processes.
        key: of the config, for the message.
        processes: their number.
    """
    if images < 1 or images % processes:
        fitting = max(round(images / processes), 1) * processes
        raise InputError(
            f"{key} is {images}; it must be a multiple of the {processes} processes: {fitting}, say"
        )


def backbone_factor(
    multiplier: float = 1.0, layer_decay: float = 1.0, depths: Sequence[int] = ()
) -> Callable[[str], float]:
    """An ``lr_factor_func`` of Detectron2's ``get_default_optimizer_params``.

    Args:
        multiplier: of the learning rate of all pretrained layers: the backbone and the res5 of a C4 head, but
            not an FPN's own layers, which start at random.
        layer_decay: multiplies the rate once more for each block between a pretrained layer and the end of
            the backbone, so that early layers learn slowest (Bao et al. 2022, https://arxiv.org/abs/2106.08254;
            ViTDet takes 0.7 for ViT-B and 0.8 for ViT-L). 1: none.
        depths: numbers of blocks in each stage, see :func:`block_depths`; (12,) for a ViT-B.

    Raises:
        InputError: for a multiplier that is not a finite number > 0 (to freeze: MODEL.BACKBONE.FREEZE_AT), a
            decay outside (0, 1], and a decay for a network without blocks.
    """
    if not 0 < multiplier < float("inf"):
        raise InputError(
            f"SOLVER.BACKBONE_MULTIPLIER is {multiplier}; it must be > 0 (MODEL.BACKBONE.FREEZE_AT 5 freezes)"
        )
    if not 0 < layer_decay <= 1:
        raise InputError(f"SOLVER.LAYER_DECAY is {layer_decay}; it must be > 0 and at most 1")
    if layer_decay < 1 and not depths:
        raise InputError("SOLVER.LAYER_DECAY is for ViT, Swin, ConvNeXt and the like: set it to 1")

    def factor(name: str) -> float:
        if not TRUNK.search(name):
            return 1.0
        return multiplier * layer_decay ** (sum(depths) + 1 - _layer(name, depths) if depths else 0)

    return factor


# timm's names: blocks.3, or stages_2.blocks.3 and layers_2.blocks.3 where there are several stages.
BLOCK = re.compile(r"\.(?:(?:stages|layers)[._](\d+)\.)?blocks\.(\d+)\.")
STAGE = re.compile(r"\.(?:stages|layers)[._](\d+)\.")


def block_depths(model: nn.Module) -> list[int]:
    """Numbers of blocks in each stage of the backbone of ``model``, [] if it has none; (12,) for a ViT-B."""
    depths: dict[int, int] = {}
    for name, _ in model.named_parameters():
        if TRUNK.search(name) and (match := BLOCK.search(name)):
            stage = int(match[1] or 0)
            depths[stage] = max(depths.get(stage, 0), int(match[2]) + 1)
    return [depths[stage] for stage in sorted(depths)]


def _layer(name: str, depths: Sequence[int]) -> int:
    """0 in front of the first block, then 1, 2, ...; a stage's other layers count as its first block."""
    if match := BLOCK.search(name):
        return sum(depths[: int(match[1] or 0)]) + int(match[2]) + 1
    match = STAGE.search(name)
    return sum(depths[: int(match[1])]) + 1 if match else 0


def build_optimizer(cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
    """SGD as in Detectron2 or AdamW, with the settings of SOLVER, fused.

    The learning rate of pretrained layers follows SOLVER.BACKBONE_MULTIPLIER and SOLVER.LAYER_DECAY.

    Raises:
        InputError: for an unknown optimiser, and as :func:`backbone_factor`.
    """
    solver = cfg.SOLVER
    if (solver.BACKBONE_MULTIPLIER, solver.LAYER_DECAY) != (1, 1) and solver.BIAS_LR_FACTOR not in (None, 1):
        raise InputError(
            "SOLVER.BIAS_LR_FACTOR works without SOLVER.BACKBONE_MULTIPLIER and SOLVER.LAYER_DECAY only: "
            "set it to 1"
        )
    if solver.OPTIMIZER not in ("SGD", "ADAMW"):
        raise InputError(f"SOLVER.OPTIMIZER is {solver.OPTIMIZER!r}; it must be SGD or ADAMW")
    depths = block_depths(model)
    params = get_default_optimizer_params(
        model,
        base_lr=solver.BASE_LR,
        weight_decay_norm=solver.WEIGHT_DECAY_NORM,
        bias_lr_factor=solver.BIAS_LR_FACTOR,
        weight_decay_bias=solver.WEIGHT_DECAY_BIAS,
        lr_factor_func=backbone_factor(solver.BACKBONE_MULTIPLIER, solver.LAYER_DECAY, depths),
        overrides={"pos_embed": {"weight_decay": 0.0}} if solver.OPTIMIZER == "ADAMW" else None,
    )
    # Under AMP the fused kernel would unscale the gradients only after they are clipped.
    how = "foreach" if solver.AMP.ENABLED else "fused"
    common = {"lr": solver.BASE_LR, "weight_decay": solver.WEIGHT_DECAY, how: True}
    if solver.OPTIMIZER == "ADAMW":
        return _clipping(cfg, torch.optim.AdamW)(params, **common)
    return _clipping(cfg, torch.optim.SGD)(
        params, momentum=solver.MOMENTUM, nesterov=solver.NESTEROV, **common
    )


def _clipping(cfg: CfgNode, optimizer: type[torch.optim.Optimizer]) -> type[torch.optim.Optimizer]:
    """``optimizer`` with SOLVER.CLIP_GRADIENTS, as Detectron2 clips; "full_model": all gradients as one."""
    clip = cfg.SOLVER.CLIP_GRADIENTS
    if clip.ENABLED and clip.CLIP_TYPE == "full_model":
        return _clipping_the_norm(optimizer, clip.CLIP_VALUE)
    if not clip.ENABLED or clip.CLIP_TYPE != "norm":
        return maybe_add_gradient_clipping(cfg, optimizer)
    clipper = functools.partial(_clip_each_norm, max_norm=clip.CLIP_VALUE, norm_type=clip.NORM_TYPE)
    return _generate_optimizer_class_with_gradient_clipping(optimizer, global_clipper=clipper)


@torch.no_grad()
def _clip_each_norm(parameters: Iterable[nn.Parameter], max_norm: float, norm_type: float) -> None:
    """``clip_grad_norm_`` of each parameter by itself; on CPUs, short gradients cost no multiplication."""
    grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not grads:
        return
    factors = (max_norm / (torch.stack(torch._foreach_norm(grads, norm_type)) + 1e-6)).clamp(max=1)
    if factors.device.type == "cpu":
        for grad, factor in zip(grads, factors.tolist(), strict=True):
            if factor != 1:
                grad.mul_(factor)
    else:
        torch._foreach_mul_(grads, list(factors.unbind()))


def clipped_optimizer(optimizer: str, max_norm: float, params, **options) -> torch.optim.Optimizer:
    """An optimiser that clips the norm of all gradients together; for LazyConfigs.

    Args:
        optimizer: its name in torch.optim, such as "AdamW".
        max_norm: of the gradients of all ``params``.

    Raises:
        InputError: for ``fused``, with which mixed precision unscales gradients after they are clipped.
    """
    if options.get("fused"):
        raise InputError("clipped_optimizer: leave out fused, which clips gradients that are still scaled")
    return _clipping_the_norm(getattr(torch.optim, optimizer), max_norm)(params, **options)


def _clipping_the_norm(
    optimizer: type[torch.optim.Optimizer], max_norm: float
) -> type[torch.optim.Optimizer]:
    """``optimizer``; the norm of all gradients together is at most ``max_norm``."""

    def clip(parameters: Iterable[nn.Parameter]) -> None:
        nn.utils.clip_grad_norm_(list(parameters), max_norm)

    return _generate_optimizer_class_with_gradient_clipping(optimizer, global_clipper=clip)
