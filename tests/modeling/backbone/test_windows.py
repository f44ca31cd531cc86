"""Attention in windows, against timm's own blocks, one window at a time and under a mask."""

import copy

import pytest
import torch
from detectron2.modeling import build_backbone

timm = pytest.importorskip("timm")

VIT = "vit_tiny_patch16_224"
DEPTH, PREFIX, CHANNELS = 8, 1, 192
GRID = (3, 5)  # patches of an image of 48 x 80 pixels


@pytest.fixture
def vit(make_cfg):
    """``vit(window, depth)``: the trunk of a ViT with the same numbers for every window."""

    def build(window: int, depth: int = DEPTH):
        cfg = make_cfg(f"timm/{VIT}:depth={depth}", OUT_FEATURES=["res4"])
        cfg.MODEL.BACKBONE.NAME = "build_robust_timm_backbone"
        cfg.MODEL.BACKBONE.FREEZE_AT = 0
        cfg.MODEL.ROBUST.WINDOW = window
        torch.manual_seed(0)
        return build_backbone(cfg).eval()

    return build


@pytest.fixture
def tokens():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, PREFIX + GRID[0] * GRID[1], CHANNELS, generator=generator)


@torch.no_grad()
def test_a_window_as_large_as_the_image_changes_nothing(vit, photograph):
    images = (photograph[None, :, :64, :96].float() - 120) / 60  # 4 x 6 patches
    expected = vit(0)(images)["res4"]
    for window in (6, 9):
        found = vit(window)(images)["res4"]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())
    assert (vit(2)(images)["res4"] - expected).abs().max() > 0.01 * expected.abs().max()


def windows_of(side: int) -> list[list[int]]:
    """The patches of each window, as indices of tokens."""
    rows, columns = (range(0, size, side) for size in GRID)
    inside = [
        [(y, x) for y in range(top, top + side) for x in range(left, left + side)]
        for top in rows
        for left in columns
    ]
    return [[PREFIX + GRID[1] * y + x for y, x in cells if y < GRID[0] and x < GRID[1]] for cells in inside]


@torch.no_grad()
def test_a_block_in_windows_is_timms_block_on_each_window(vit, tokens):
    backbone = vit(2)  # windows of 2 x 2, those at the edges smaller
    block, plain = backbone.trunk.model.blocks[0], vit(0).trunk.model.blocks[0]
    block.grid = GRID
    found = block(tokens)
    outcomes = []
    for members in windows_of(2):
        own = plain(tokens[:, [*range(PREFIX), *members]])
        torch.testing.assert_close(found[:, members], own[:, PREFIX:], rtol=1e-4, atol=1e-5)
        outcomes.append(own[:, :PREFIX])
    torch.testing.assert_close(found[:, :PREFIX], torch.stack(outcomes).mean(0), rtol=1e-4, atol=1e-5)


def test_four_blocks_see_the_whole_image(vit):
    blocks = vit(7, depth=12).trunk.model.blocks
    assert [n for n, block in enumerate(blocks) if not hasattr(block, "window")] == [2, 5, 8, 11]
    whole = vit(0, depth=12).state_dict()
    assert vit(7, depth=12).state_dict().keys() == whole.keys()


def test_it_trains_and_is_copied(vit):
    backbone = vit(2).train()
    copied = copy.deepcopy(backbone)
    images = torch.randn(2, 3, 48, 80, generator=torch.Generator().manual_seed(0))
    features = copied(images)["res4"]
    features.square().mean().backward()
    assert [name for name, parameter in copied.named_parameters() if parameter.grad is None] == []
    with torch.no_grad():  # another size, which the copy must not have told the original
        assert backbone(images[:, :, :32, :32])["res4"].shape == (2, CHANNELS, 2, 2)
        torch.testing.assert_close(copied(images)["res4"], features)
