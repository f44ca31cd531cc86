"""Files in the layouts that robust networks are published in, made from timm's own networks."""

import re

import pytest
import torch
from torch import Tensor, nn

from rt_detectron import load_backbone
from rt_detectron.checkpoint.architectures import build_classifier, get_architecture
from rt_detectron.checkpoint.convert import convert_checkpoint, read_network
from rt_detectron.utils.errors import InputError

Tensors = dict[str, Tensor]


def renamed(tensors: Tensors, *rules: tuple[str, str]) -> Tensors:
    found = {}
    for name, tensor in tensors.items():
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
        found[name] = tensor
    return found


def sequential(tensors: Tensors) -> Tensors:
    """ARES and EasyRobust: Sequential(normalisation, network)."""
    statistics = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
    buffers = {f"0.{name}": torch.tensor(numbers) for name, numbers in statistics.items()}
    return buffers | {f"1.{name}": tensor for name, tensor in tensors.items()}


def training(tensors: Tensors) -> dict:
    """timm's training script on several GPUs."""
    wrapped = {f"module.{name}": tensor for name, tensor in tensors.items()}
    return {"epoch": 3, "arch": "x", "state_dict": wrapped, "optimizer": {"state": {}}, "metric": 0.5}


def old_swin(tensors: Tensors) -> Tensors:
    """The authors' Swin (MIMIR, RobustBench): stages end with their downsampling; buffers are stored."""
    found = renamed(
        tensors,
        (r"layers\.(\d)\.downsample", lambda match: f"layers.{int(match[1]) - 1}.downsample"),
        (r"^head\.fc\.", "head."),
    )
    tables = [name for name in found if name.endswith("relative_position_bias_table")]
    for name in tables:
        side = (int(len(found[name]) ** 0.5) + 1) // 2
        index = torch.zeros(side**2, side**2, dtype=torch.long)
        found[name.replace("bias_table", "index")] = index
        found[name.replace("attn.relative_position_bias_table", "attn_mask")] = torch.zeros(
            4, side**2, side**2
        )
    return found


def encoder(tensors: Tensors) -> Tensors:
    """OpenAI's and open_clip's image encoder: FARE and TeCoA as their repository publishes them."""
    found = renamed(
        {name: tensor for name, tensor in tensors.items() if name != "head.bias"},
        (r"^blocks\.", "transformer.resblocks."),
        (r"\.norm(\d)\.", r".ln_\1."),
        (r"^norm_pre\.", "ln_pre."),
        (r"^norm\.", "ln_post."),
        (r"attn\.qkv\.(\w+)", r"attn.in_proj_\1"),
        (r"attn\.proj\.", "attn.out_proj."),
        (r"mlp\.fc1\.", "mlp.c_fc."),
        (r"mlp\.fc2\.", "mlp.c_proj."),
        (r"^patch_embed\.proj\.", "conv1."),
        (r"^cls_token$", "class_embedding"),
        (r"^pos_embed$", "positional_embedding"),
        (r"^head\.weight$", "proj"),
    )
    found["class_embedding"] = found["class_embedding"].flatten()
    found["positional_embedding"] = found["positional_embedding"][0]
    found["proj"] = found["proj"].T.contiguous()
    return found


def text_encoder() -> Tensors:
    """The least that CLIP has beside its image encoder."""
    block = {f"transformer.resblocks.0.{name}": torch.ones(8) for name in ("ln_1.weight", "ln_1.bias")}
    return {"positional_embedding": torch.ones(7, 8), "logit_scale": torch.tensor(4.6), **block}


def whole_clip(tensors: Tensors) -> Tensors:
    return text_encoder() | {f"visual.{name}": tensor for name, tensor in encoder(tensors).items()}


def clip_of_timm(tensors: Tensors) -> Tensors:
    """open_clip on a network of timm's, such as ConvNeXt: its last layer is outside the network."""
    names = ((r"^head\.fc\.weight$", "head.proj.weight"), (r"^(?!head\.proj)", "trunk."))
    kept = {name: tensor for name, tensor in tensors.items() if name != "head.fc.bias"}
    return text_encoder() | {f"visual.{name}": tensor for name, tensor in renamed(kept, *names).items()}


def same(tensors: Tensors) -> Tensors:
    return tensors


CLIP, SWIN = "timm/vit_base_patch16_clip_quickgelu_224:depth=3", "timm/swin_tiny_patch4_window7_224"
# The network, the layout of its file, the pyramid on it, and the size of the images.
LAYOUTS = {
    "EasyRobust's ViT": ("timm/vit_tiny_patch16_224:depth=3", sequential, "sfp", 224),
    "ARES's ResNet with GELU": ("timm/resnet18:act_layer=gelu", same, None, 64),
    "XCiT of 3 blocks": ("timm/xcit_nano_12_p16_224:depth=3", training, "sfp", 64),
    "MIMIR's Swin": (f"{SWIN}:norm_layer=layernorm", old_swin, None, (256, 288)),
    "robust CLIP's file": (CLIP, encoder, "sfp", 224),
    "robust CLIP on the Hub": (CLIP, whole_clip, "sfp", 224),
    "robust CLIP with ConvNeXt": ("timm/convnext_atto", clip_of_timm, None, 64),
}


def filled(network: nn.Module) -> nn.Module:
    """``network`` with numbers in each tensor that show in what it computes."""
    generator = torch.Generator().manual_seed(0)
    for name, tensor in network.state_dict().items():
        if name.endswith(("running_var", "norm.weight", "gamma", "gamma1", "gamma2", "gamma3")):
            tensor.uniform_(0.5, 1.5, generator=generator)
        elif (
            tensor.dim() < 2
            and tensor.is_floating_point()
            and not name.endswith(("head.bias", "head.fc.bias"))
        ):
            tensor.add_(0.1 * torch.randn(tensor.shape, generator=generator))
    return network.eval()


SLOW = "MIMIR's Swin"


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=pytest.mark.slow) if case == SLOW else case for case in LAYOUTS]
)
@torch.no_grad()
def test_features_are_the_networks_own(case, tmp_path, photograph):
    arch, layout, pyramid, size = LAYOUTS[case]
    if arch.startswith(SWIN):  # as large as a detector's images: its windows are then many in all stages
        build = get_architecture(arch).build
        network = filled(build(5))
        network.set_input_size(size, window_size=(7, 7))
    else:
        network = filled(build_classifier(arch, 5))
    source, output = str(tmp_path / "published.pt"), str(tmp_path / "backbone.pkl")
    torch.save(layout(network.state_dict()), source)
    conversion = convert_checkpoint(source, output, arch, "linf", 4.0)
    backbone = load_backbone(output, detector=pyramid, freeze_at=0).eval()
    size = (size, size) if isinstance(size, int) else size
    images = (photograph.repeat(1, 3, 3)[None, :, : size[0], : size[1]].float() - 120) / 60
    features = (backbone.net if pyramid else backbone)(images)
    _, expected = network.forward_intermediates(images)
    if pyramid:
        expected = expected[-1:]
    expected = expected[-len(features) :]
    for feature, own in zip(features.values(), expected, strict=True):
        assert own.std() > 0.01
        torch.testing.assert_close(feature, own, rtol=1e-4, atol=1e-4 * own.abs().max().item())
    assert conversion.metadata.arch == arch
    read = read_network(source, arch).state_dict
    classes = get_architecture(arch).head
    assert all(torch.equal(read[name], own) for name, own in network.state_dict().items() if name in read)
    assert any(name.startswith(classes) for name in read)


def test_windows_of_14_pixels_stay_as_they_are(tmp_path):
    """MIMIR's Swin-L: at 224 pixels a window of 14 is all of res4, and more than all of res5."""
    arch = f"{SWIN}:norm_layer=layernorm,window_size=14"
    network = build_classifier(arch, 5)
    table = "relative_position_bias_table"
    torch.save(old_swin(network.state_dict()), tmp_path / "swin.pt")
    convert_checkpoint(str(tmp_path / "swin.pt"), str(tmp_path / "swin.pkl"), arch)
    backbone = load_backbone(str(tmp_path / "swin.pkl"))
    for stage, window in enumerate((14, 14, 14, 7)):
        even, odd = backbone.trunk.get_submodule(f"layers_{stage}").blocks[:2]
        assert (even.window_size, even.shift_size) == ((window, window), (0, 0))
        assert (odd.window_size, odd.shift_size) == ((window, window), (window // 2,) * 2)
        own = network.get_submodule(f"layers.{stage}.blocks.0.attn").get_parameter(table)
        assert torch.equal(even.attn.get_parameter(table), own)
        assert even.norm1.eps == 1e-6


@pytest.mark.parametrize(
    ("arch", "other", "tensor"),
    [
        pytest.param(
            f"{SWIN}:window_size=8",
            SWIN,
            "layers.0.blocks.0.attn.relative_position_bias_table",
            marks=pytest.mark.slow,
        ),
        ("timm/vit_tiny_patch16_224:depth=3", "timm/vit_tiny_patch16_384:depth=3", "pos_embed"),
    ],
)
def test_files_of_another_size_are_not_resampled(tmp_path, arch, other, tensor):
    path = str(tmp_path / "other.pth")
    torch.save(build_classifier(other, 5).state_dict(), path)
    with pytest.raises(InputError, match=rf"misshaped {tensor} .* instead of "):
        read_network(path, arch)
