"""A classification network as attacks and training see it: images in [0, 1] to logits."""

from collections import OrderedDict

import torch
from torch import Tensor, nn

from rt_detectron.checkpoint.architectures import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Architecture,
    get_architecture,
)
from rt_detectron.utils.errors import InputError


def versioned(state_dict: dict[str, Tensor], network: nn.Module) -> OrderedDict[str, Tensor]:
    """``state_dict`` with the module versions of ``network``, which MNASNet needs."""
    found = OrderedDict(state_dict)
    found._metadata = network.state_dict()._metadata  # type: ignore[attr-defined]  # torch hangs it on the dict
    return found


class Classifier(nn.Module):
    """A torchvision network behind its normalisation: images in [0, 1] to logits.

    Args:
        arch: a name of :data:`rt_detectron.checkpoint.architectures.ARCHITECTURES`.
        num_classes: number of logits.
        pixel_mean, pixel_std: of RGB, in 0..255 as in Detectron2's configuration.

    Raises:
        InputError: for an unknown network, and for a mean or std that is not of three channels.
    """

    def __init__(
        self, arch: str | Architecture, num_classes: int, pixel_mean=IMAGENET_MEAN, pixel_std=IMAGENET_STD
    ):
        super().__init__()
        self.architecture = get_architecture(arch)
        self.num_classes = num_classes
        self.pixel_mean = list(pixel_mean)
        self.pixel_std = list(pixel_std)
        if len(self.pixel_mean) != 3 or len(self.pixel_std) != 3 or min(self.pixel_std) <= 0:
            raise InputError(
                f"pixel_mean {self.pixel_mean} and pixel_std {self.pixel_std}: give three numbers each, R, "
                "G and B in 0..255 (grey images are read as RGB), and std > 0"
            )
        # channels_last: the same numbers, and convolutions that are up to 1.5 times as fast on CPUs and
        # on GPUs with tensor cores.
        self.network = self.architecture.build(num_classes).to(memory_format=torch.channels_last)
        # Not persistent: the state dict is the network's alone.
        self.register_buffer("mean", torch.tensor(self.pixel_mean).view(-1, 1, 1) / 255, persistent=False)
        self.register_buffer("std", torch.tensor(self.pixel_std).view(-1, 1, 1) / 255, persistent=False)

    @property
    def arch(self) -> str:
        """The name of its architecture."""
        return self.architecture.name

    @property
    def last_linear(self) -> str:
        """The name in ``network`` of the linear layer that gives the logits.

        Raises:
            InputError: for a network that ends in another kind of layer.
        """
        head = self.architecture.head
        names = [name for name, module in self.network.named_modules() if isinstance(module, nn.Linear)]
        names = [name for name in names if f"{name}.".startswith(head)]
        if not names:
            raise InputError(f"{self.arch} does not end in a linear layer: choose another network")
        return names[-1]

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """(N, 3, H, W) RGB in [0, 1] to (N, num_classes)."""
        images = images.contiguous(memory_format=torch.channels_last)
        return self.network((images - self.mean) / self.std)
