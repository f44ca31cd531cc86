"""How much the features of converted backbones differ from their classifiers': one line per architecture.

    python benchmarks/backbone_parity.py [ARCH ...]

Each network gets random weights and batch-norm statistics. It is converted to a file of RGB weights and
one of BGR-folded weights, and both are run on a real photograph. The figure is the largest over res2..res5
(of plain vision transformers, res4) of max |backbone - classifier| / max |classifier|, in float32 on the CPU.
"refused" is where mean and std cannot be folded into the stem.
"""

import argparse
import os
import re
import tempfile
import warnings

import torch
import torch.nn.functional as F
from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_backbone
from detectron2.modeling.backbone import Backbone
from sklearn.datasets import load_sample_image
from torch import Tensor, nn

from rt_detectron.checkpoint.architectures import (
    ARCHITECTURES,
    TIMM_FAMILY,
    Architecture,
    build_timm,
    get_architecture,
)
from rt_detectron.checkpoint.checkpointer import RobustCheckpointer
from rt_detectron.checkpoint.convert import convert_checkpoint
from rt_detectron.checkpoint.formats import read_pickle
from rt_detectron.checkpoint.metadata import Metadata
from rt_detectron.config import add_robust_config
from rt_detectron.utils.errors import InputError, one_line_errors

STAGES = ["res2", "res3", "res4", "res5"]
# One of each of timm's families that published robust networks are of; any other is taken by name.
TIMM = (
    "timm/convnext_atto",
    "timm/convnext_tiny:stem=conv",
    "timm/swin_tiny_patch4_window7_224",
    "timm/resnet50:act_layer=gelu",
    "timm/efficientnet_lite0",
    "timm/resnetv2_50x1_bit",
    "timm/vit_tiny_patch16_224",
    "timm/deit_small_patch16_224:stem=conv",
    "timm/deit3_small_patch16_224",
    "timm/xcit_nano_12_p16_224",
    "timm/vit_small_patch14_reg4_dinov2",
    "timm/eva02_tiny_patch14_224",
    "timm/vit_base_patch16_clip_224",
)
SIZE = (256, 288)  # multiples of 32, and more than a window in Swin's res5


def photograph() -> Tensor:
    """uint8 RGB, (3, 256, 288)."""
    height, width = SIZE
    picture = load_sample_image("china.jpg")[100 : 100 + height, 150 : 150 + width]
    return torch.as_tensor(picture.transpose(2, 0, 1).copy())


def normalise(image: Tensor, mean, std) -> Tensor:
    """(3, H, W) in 0..255 to (1, 3, H, W)."""
    return ((image - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1))[None]


def random_classifier(architecture: Architecture) -> nn.Module:
    network = architecture.build(1000) if architecture.family is not TIMM_FAMILY else any_size(architecture)
    for module in network.eval().modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.1)
            nn.init.normal_(module.running_mean, 0, 0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    for name, tensor in network.state_dict().items():
        if re.search(r"gamma(_?\d)?$|pos_embed$", name):  # next to 0 in a new network, and so without a say
            tensor.normal_(0, 0.5)
    return network


def any_size(architecture: Architecture) -> nn.Module:
    """timm's classifier for images of SIZE, in the way that leaves its tensors as they are."""
    if "swin" in architecture.name:  # its classifier of this size has windows as a detector has them
        return build_timm(architecture.name, img_size=SIZE)
    try:
        return build_timm(architecture.name, dynamic_img_size=True)
    except TypeError:  # networks that take any size have no such argument
        return build_timm(architecture.name)


@torch.no_grad()
def classifier_features(
    architecture: Architecture, network: nn.Module, image: Tensor, shapes: dict[str, ShapeSpec]
) -> dict[str, Tensor]:
    """The features of ``shapes``, taken from the classifier's own modules by hooks."""
    found, images = {}, normalise(image, architecture.pixel_mean, architecture.pixel_std)
    if architecture.family is TIMM_FAMILY:
        taps, patch = timm_taps(architecture, shapes)
        size = [side * patch // 16 for side in SIZE]
        if patch != 16:
            images = F.interpolate(images, size, mode="bilinear", antialias=True)
    else:
        taps = architecture.taps or {stage: f"layer{i}" for i, stage in enumerate(STAGES, start=1)}
    for stage in shapes:
        by_function = taps[stage] == "relu"  # DenseNet's last ReLU is no module
        network.get_submodule("features" if by_function else taps[stage]).register_forward_hook(
            lambda _, __, output, stage=stage, by_function=by_function: found.update(
                {stage: output.relu() if by_function else output.clone()}  # later layers work in place
            )
        )
    network(images)
    return {stage: as_map(found[stage], shapes[stage]) for stage in shapes}


def timm_taps(architecture: Architecture, shapes: dict[str, ShapeSpec]) -> tuple[dict[str, str], int]:
    """The classifier's module at each feature, by timm's table of them, and the side of a patch."""
    with torch.device("meta"):
        info = build_timm(architecture.name, features_only=True).feature_info.info
    strides = {each["reduction"]: each["module"] for each in info}  # the last of each stride
    if len(strides) == 1:
        ((patch, module),) = strides.items()
        return dict.fromkeys(shapes, module), patch
    return {stage: strides[shape.stride] for stage, shape in shapes.items()}, 16


def as_map(output: Tensor, shape: ShapeSpec) -> Tensor:
    """(1, C, H, W) of a module that may give patches as a sequence, or channels last."""
    height, width = (side // shape.stride for side in SIZE)
    if output.dim() == 3:
        return output[:, -height * width :].transpose(1, 2).reshape(1, shape.channels, height, width)
    return output.permute(0, 3, 1, 2) if output.shape[1] != shape.channels else output


def build(architecture: Architecture) -> Backbone:
    """The bare backbone with all of its features."""
    cfg = get_cfg()
    add_robust_config(cfg)
    cfg.MODEL.ROBUST.ARCH = architecture.name
    cfg.MODEL.BACKBONE.NAME = architecture.builder()
    cfg.MODEL.BACKBONE.FREEZE_AT = 0
    cfg.MODEL.ROI_HEADS.NAME = "StandardROIHeads"
    for features in (STAGES, ["res4"]):
        cfg.MODEL.RESNETS.OUT_FEATURES = features
        try:
            return build_backbone(cfg).eval()
        except InputError:
            if features == ["res4"]:
                raise
    raise AssertionError


@torch.no_grad()
def backbone_features(backbone: Backbone, weights: str, image: Tensor) -> dict[str, Tensor]:
    """From ``weights`` under the preprocessing that their file asks for."""
    RobustCheckpointer(backbone).load(weights)
    metadata = Metadata.from_dict(read_pickle(weights)["rt_detectron"], weights)
    ordered = image.flip(0) if metadata.input_format == "BGR" else image
    return backbone(normalise(ordered, metadata.pixel_mean, metadata.pixel_std))


def largest_difference(arch: str, image: Tensor) -> dict[str, float | None]:
    """The largest relative difference over the features, by input format; None if that is refused."""
    architecture = get_architecture(arch)
    backbone = build(architecture)
    network = random_classifier(architecture)
    expected = classifier_features(architecture, network, image, backbone.output_shape())
    result: dict[str, float | None] = {}
    with tempfile.TemporaryDirectory() as folder:
        source, output = os.path.join(folder, "classifier.pth"), os.path.join(folder, "backbone.pkl")
        torch.save(network.state_dict(), source)
        del network
        for input_format in ("RGB", "BGR"):
            try:
                convert_checkpoint(source, output, arch, input_format=input_format)
            except InputError:
                if input_format == "RGB":
                    raise
                result[input_format] = None
                continue
            found = backbone_features(backbone, output, image)
            result[input_format] = max(
                float((found[s] - expected[s]).abs().max() / expected[s].abs().max()) for s in expected
            )
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("arch", nargs="*", help="default: the table's, and one of each of timm's families")
    archs = parser.parse_args().arch or [*ARCHITECTURES, *TIMM]
    warnings.simplefilter("ignore", FutureWarning)
    torch.manual_seed(0)
    image = photograph()
    with one_line_errors():
        print(f"{'architecture':<36} {'RGB':>9} {'BGR-folded':>11}")
        for arch in archs:
            rgb, bgr = largest_difference(arch, image).values()
            print(f"{arch:<36} {rgb:>9.1e} {'refused' if bgr is None else f'{bgr:.1e}':>11}", flush=True)


if __name__ == "__main__":
    main()
