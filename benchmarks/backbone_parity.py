"""How much the features of converted backbones differ from torchvision's: one line per architecture.

    python benchmarks/backbone_parity.py [ARCH ...]

Each network gets random weights and batch-norm statistics. It is converted to a file of RGB weights and
one of BGR-folded weights, and both are run on a real photograph. The figure is the largest over res2..res5 of
max |Detectron2 - torchvision| / max |torchvision|, in float32 on the CPU.
"""

import argparse
import os
import tempfile
import warnings

import torch
from detectron2.config import get_cfg
from detectron2.modeling import build_backbone
from sklearn.datasets import load_sample_image
from torch import Tensor, nn

from rt_detectron.checkpoint.architectures import ARCHITECTURES, IMAGENET_MEAN, IMAGENET_STD, build_classifier
from rt_detectron.checkpoint.checkpointer import RobustCheckpointer
from rt_detectron.checkpoint.convert import convert_checkpoint
from rt_detectron.config import add_robust_config
from rt_detectron.utils.errors import one_line_errors

STAGES = ["res2", "res3", "res4", "res5"]


def photograph() -> Tensor:
    """uint8 RGB, (3, 224, 224)."""
    return torch.as_tensor(load_sample_image("china.jpg")[100:324, 150:374].transpose(2, 0, 1).copy())


def normalise(image: Tensor, mean: list[float], std: list[float]) -> Tensor:
    """(3, H, W) in 0..255 to (1, 3, H, W)."""
    return ((image - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1))[None]


def random_classifier(arch: str) -> nn.Module:
    network = build_classifier(arch).eval()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.1)
            nn.init.normal_(module.running_mean, 0, 0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return network


@torch.no_grad()
def torchvision_features(arch: str, network: nn.Module, image: Tensor) -> dict[str, Tensor]:
    """res2..res5, taken from torchvision's own modules by hooks."""
    taps = ARCHITECTURES[arch].taps or {stage: f"layer{i}" for i, stage in enumerate(STAGES, start=1)}
    features = {}
    for stage in STAGES:
        by_function = taps[stage] == "relu"  # DenseNet's last ReLU is no module
        network.get_submodule("features" if by_function else taps[stage]).register_forward_hook(
            lambda _, __, output, stage=stage, by_function=by_function: features.update(
                {stage: output.relu() if by_function else output.clone()}  # later layers work in place
            )
        )
    network(normalise(image, IMAGENET_MEAN, IMAGENET_STD))
    return features


@torch.no_grad()
def detectron2_features(arch: str, weights: str, image: Tensor, input_format: str) -> dict[str, Tensor]:
    """From ``weights`` under their own preprocessing; BGR is that of an unchanged config."""
    cfg = get_cfg()
    add_robust_config(cfg)
    cfg.MODEL.ROBUST.ARCH = arch
    cfg.MODEL.BACKBONE.NAME = ARCHITECTURES[arch].builder("fpn")
    cfg.MODEL.FPN.IN_FEATURES = STAGES
    with torch.device("meta"):  # loading must fill every tensor, so initialise none
        backbone = build_backbone(cfg).bottom_up
    backbone.to_empty(device="cpu").eval()
    RobustCheckpointer(backbone).load(weights)
    if input_format == "BGR":
        return backbone(normalise(image.flip(0), cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD))
    return backbone(normalise(image, IMAGENET_MEAN, IMAGENET_STD))


def largest_difference(arch: str, image: Tensor) -> dict[str, float]:
    """The largest relative difference over res2..res5, by input format."""
    network = random_classifier(arch)
    expected = torchvision_features(arch, network, image)
    result = {}
    with tempfile.TemporaryDirectory() as folder:
        source, output = os.path.join(folder, f"{arch}.pth"), os.path.join(folder, f"{arch}.pkl")
        torch.save(network.state_dict(), source)
        del network
        for input_format in ("RGB", "BGR"):
            convert_checkpoint(source, output, input_format=input_format)
            found = detectron2_features(arch, output, image, input_format)
            result[input_format] = max(
                float((found[s] - expected[s]).abs().max() / expected[s].abs().max()) for s in STAGES
            )
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("arch", nargs="*", help="default: all")
    archs = parser.parse_args().arch or list(ARCHITECTURES)
    warnings.simplefilter("ignore", FutureWarning)
    torch.manual_seed(0)
    image = photograph()
    with one_line_errors():
        print(f"{'architecture':<18} {'RGB':>9} {'BGR-folded':>11}")
        for arch in archs:
            difference = largest_difference(arch, image)
            print(f"{arch:<18} {difference['RGB']:>9.1e} {difference['BGR']:>11.1e}", flush=True)


if __name__ == "__main__":
    main()
