"""Batch norm that keeps its statistics and trains its scale and shift (mmdetection's ``norm_eval``)."""

from torch import nn


class EvalBatchNorm2d(nn.BatchNorm2d):
    """Batch norm that stays in eval mode while it trains. Its state dict is batch norm's."""

    def train(self, mode: bool = True) -> "EvalBatchNorm2d":
        return super().train(False)


def keep_statistics(network: nn.Module) -> nn.Module:
    """Turn the batch norms of ``network`` into :class:`EvalBatchNorm2d`, in place."""
    for module in network.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = EvalBatchNorm2d
            module.eval()
    return network
