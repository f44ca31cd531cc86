"""What the benchmarks share: a plain network and PGD as a plain loop to compare with, and their clock."""

import statistics
import time
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rt_detectron.checkpoint.architectures import IMAGENET_MEAN, IMAGENET_STD

MEAN, STD = torch.tensor(IMAGENET_MEAN) / 255, torch.tensor(IMAGENET_STD) / 255


AMP = {None: None, "bf16": torch.bfloat16, "fp16": torch.float16}


def seconds(work: Callable, device: torch.device) -> tuple[float, object]:
    """How long ``work()`` takes, with all that it has a GPU do, and what it gives."""
    synchronize(device)
    start = time.perf_counter()
    found = work()
    synchronize(device)
    return time.perf_counter() - start, found


def spread(values: Sequence[float], digits: int = 2) -> str:
    """The median and the range, as in "1.50 (1.25 to 1.75)"."""
    median, *ends = (f"{each:.{digits}f}" for each in (statistics.median(values), min(values), max(values)))
    return f"{median} ({' to '.join(ends)})"


def ratios(theirs: Sequence[float], ours: Sequence[float]) -> list[float]:
    """Of each round, in which the sides took turns."""
    return [one / other for one, other in zip(theirs, ours, strict=True)]


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def device_name(device: torch.device) -> str:
    """For tables: the GPU, or the number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{torch.get_num_threads()} threads"


class Normalised(nn.Module):
    """torchvision's network behind its normalisation, in the default format."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network
        self.register_buffer("mean", MEAN.view(3, 1, 1))
        self.register_buffer("std", STD.view(3, 1, 1))

    def forward(self, images):
        return self.network((images - self.mean) / self.std)


def plain_pgd(model: nn.Module, images: Tensor, labels: Tensor, eps: float, steps: int) -> Tensor:
    """L2 PGD with steps of 2*eps/steps from the images; leaves the model in eval mode."""
    model.eval()
    adversarial = images.clone()
    for _ in range(steps):
        adversarial.requires_grad_(True)
        (grad,) = torch.autograd.grad(F.cross_entropy(model(adversarial), labels), adversarial)
        step = 2 * eps / steps * grad / _norms(grad)
        delta = adversarial.detach() + step - images
        adversarial = (images + delta * (eps / _norms(delta)).clamp(max=1)).clamp(0, 1)
    return adversarial


def _norms(x: Tensor) -> Tensor:
    return x.flatten(1).norm(dim=1).clamp_min(1e-12).view(-1, 1, 1, 1)
