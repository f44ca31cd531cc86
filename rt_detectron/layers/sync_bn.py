"""Batch norm synchronised over all processes."""

import torch
from detectron2.layers import NaiveSyncBatchNorm
from detectron2.utils import comm
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from rt_detectron.utils.errors import InputError


class CpuSyncBatchNorm(NaiveSyncBatchNorm):
    """Detectron2's NaiveSyncBatchNorm, which runs on CPUs, with torch's running statistics.

    Those use the unbiased variance and count the batches.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Normalise (N, C, H, W); N, H and W must be the same in all processes."""
        if not self.training or comm.get_world_size() == 1:
            return super().forward(x)
        before = self.running_var.clone()
        output = super().forward(x)
        pixels = comm.get_world_size() * x.numel() // x.shape[1]
        with torch.no_grad():
            biased = self.running_var - (1 - self.momentum) * before  # the batch's share
            self.running_var.add_(biased, alpha=1 / max(pixels - 1, 1))
            self.num_batches_tracked += 1
        return output


def synchronised(norm: nn.Module) -> nn.Module:
    """torch's SyncBatchNorm with the parameters of a batch ``norm``; for GPUs."""
    if hasattr(norm, "act"):  # timm's layer of a batch norm and an activation, which torch would drop
        from timm.layers import convert_sync_batchnorm

        return convert_sync_batchnorm(norm)
    return nn.SyncBatchNorm.convert_sync_batchnorm(norm)


def use_sync_bn(network: nn.Module, device: str) -> nn.Module:
    """``network`` with synchronised batch norms, on GPUs torch's own; its state dict stays the same.

    Raises:
        InputError: for norms that cannot be synchronised on CPUs.
    """
    on_cpu = torch.device(device).type == "cpu"
    for name, module in list(network.named_modules()):
        if not isinstance(module, _BatchNorm):
            continue
        if not on_cpu:
            network.set_submodule(name, synchronised(module))
        elif type(module) is nn.BatchNorm2d:
            module.__class__ = CpuSyncBatchNorm
            module._stats_mode = ""
        else:
            raise InputError(
                f"train.sync_bn: {name} is a {type(module).__name__}, which cannot be synchronised on CPUs; "
                "set train.sync_bn=False"
            )
    return network
