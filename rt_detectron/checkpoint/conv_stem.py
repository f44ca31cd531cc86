"""Convolutional stems, which adversarial training works better with, on networks of timm's."""

from itertools import pairwise

from torch import Tensor, nn

from rt_detectron.utils.errors import InputError

# (channels, stride) of the 3x3 convolutions in place of the patch convolution (Singh et al. 2023,
# https://arxiv.org/abs/2303.01870, appendix A).
_SMALL_CONVNEXT = ((48, 2), (96, 2))
_VIT = ((48, 2), (96, 2), (192, 2), (384, 2))
_LAYERS = {
    "convnext_tiny": _SMALL_CONVNEXT,
    "convnext_small": _SMALL_CONVNEXT,
    "convnext_base": ((64, 2), (96, 2), (128, 1)),
    "convnext_large": ((96, 2), (144, 2), (192, 1)),
    "deit_small_patch16_224": _VIT,
    "vit_base_patch16_224": _VIT,
}


class ConvStem(nn.Module):
    """3x3 convolutions, each with a LayerNorm and GELU, in place of a patch convolution.

    Args:
        layers: channels and stride of each.
        width: channels of a 1x1 convolution behind them, which vision transformers have; None: there is none.
    """

    def __init__(self, layers: tuple[tuple[int, int], ...], width: int | None):
        super().__init__()
        from timm.layers import LayerNorm2d

        modules: list[nn.Module] = []
        for (before, _), (channels, stride) in pairwise(((3, 1), *layers)):
            modules += [nn.Conv2d(before, channels, 3, stride, 1), LayerNorm2d(channels, eps=1e-6), nn.GELU()]
        if width is not None:
            modules.append(nn.Conv2d(layers[-1][0], width, 1))
        self.stem = nn.Sequential(*modules)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) to (N, C, H / s, W / s), s the product of the strides."""
        return self.stem(x)


def put_conv_stem(network: nn.Module, name: str) -> None:
    """Replace the patch convolution of timm's ``network``, whose name there is ``name``, in place."""
    if _is_convnext(name):
        network.stem = ConvStem(_LAYERS[name], None)
    else:
        network.patch_embed.proj = ConvStem(_LAYERS[name], network.embed_dim)


def first_convolution(name: str) -> str:
    """Its name in a network with a convolutional stem.

    Raises:
        InputError: for a network that is not known with such a stem.
    """
    if name not in _LAYERS:
        raise InputError(f"timm/{name}:stem=conv is not known; known are {', '.join(_LAYERS)}")
    return "stem.stem.0" if _is_convnext(name) else "patch_embed.proj.stem.0"


def _is_convnext(name: str) -> bool:
    return name.startswith("convnext")
