"""Attention in windows for timm's plain vision transformers, with their weights as they are."""

import functools
from typing import Any

import torch
from detectron2.modeling.backbone.utils import window_partition, window_unpartition
from torch import Tensor, nn

from rt_detectron.utils.errors import InputError

GLOBAL_BLOCKS = 4  # that attend to the whole image, evenly spread, the last block among them


def put_windows(trunk: nn.Module, arch: str, window: int) -> None:
    """Have all but four blocks of timm's ``trunk`` attend in windows, in place (Li et al. 2022, section 3).

    Args:
        trunk: a features_only model on a VisionTransformer (ViT, DeiT, DINOv2, CLIP).
        arch: its name, for messages.
        window: the windows' side in patches.

    Raises:
        InputError: for another network, whose positions or attention windows would change, and for a side
            below 1.
    """
    from timm.models.vision_transformer import Block, VisionTransformer

    network: Any = getattr(trunk, "model", None)
    blocks = list(network.blocks) if isinstance(network, VisionTransformer) else []
    if not blocks or any(type(block) is not Block for block in blocks):
        raise InputError(
            f"{arch} does not attend in windows, ViT, DeiT, DINOv2 and CLIP do: set MODEL.ROBUST.WINDOW 0"
        )
    if window < 1:
        raise InputError(f"MODEL.ROBUST.WINDOW is {window}; it must be a number of patches, or 0 for none")

    whole = {len(blocks) * (part + 1) // GLOBAL_BLOCKS - 1 for part in range(GLOBAL_BLOCKS)}
    for index, block in enumerate(blocks):
        if index not in whole:
            block.__class__ = _window_block()
            block.window, block.prefix = window, network.num_prefix_tokens


@functools.cache
def _window_block() -> type[nn.Module]:
    from timm.models.vision_transformer import Block

    class WindowBlock(Block):
        """A block of timm's on windows; its parameters and their names are the block's own.

        Each window has the tokens of the class besides its own. What becomes of them is averaged.
        """

        window: int  # side in patches
        prefix: int  # number of tokens of the class
        grid: tuple[int, int]  # of patches, set before each forward pass

        def extra_repr(self) -> str:
            return f"window={self.window}, prefix={self.prefix}"

        def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
            return _in_windows(super().forward, x, self.grid, self.prefix, self.window)

    return WindowBlock


def set_grid(trunk: nn.Module, images: Tensor) -> None:
    """Tell the blocks that attend in windows how many patches ``images`` (N, 3, H, W) have."""
    network: Any = getattr(trunk, "model", None)
    for block in getattr(network, "blocks", ()):
        if hasattr(block, "window"):
            block.grid = network.patch_embed.dynamic_feat_size(images.shape[2:])


def _in_windows(block, x: Tensor, grid: tuple[int, int], prefix: int, window: int) -> Tensor:
    """``block`` on windows of ``x`` (N, prefix + H * W, C); the grid is padded to whole windows, unseen."""
    number, _, channels = x.shape
    patches = x[:, prefix:].reshape(number, *grid, channels)
    windows, padded = window_partition(patches, window)
    count = len(windows) // number
    tokens = torch.cat([x[:, :prefix].repeat_interleave(count, 0), windows.flatten(1, 2)], 1)
    mask = None if tuple(padded) == tuple(grid) else _mask(grid, prefix, window, number, x.device)
    tokens = block(tokens, attn_mask=mask)
    own = tokens[:, :prefix].reshape(number, count, prefix, channels).mean(1)
    windows = tokens[:, prefix:].reshape(-1, window, window, channels)
    return torch.cat([own, window_unpartition(windows, window, padded, grid).flatten(1, 2)], 1)


def _mask(grid: tuple[int, int], prefix: int, window: int, number: int, device: torch.device) -> Tensor:
    """(N * windows, 1, 1, prefix + window ** 2): False for padding, to which nothing attends."""
    seen, _ = window_partition(torch.ones(1, *grid, 1, device=device), window)
    seen = torch.cat([seen.new_ones(len(seen), prefix), seen.flatten(1)], 1) > 0
    return seen.repeat(number, 1)[:, None, None]
