"""What tests/test_builders_in_detectors.py proves, and the table of it in docs/use-in-your-project.md.

    python tests/helpers/proven.py

writes the table anew; a test compares it with the cases here, which are those that the tests run.
"""

from pathlib import Path
from typing import NamedTuple

GUIDE = Path(__file__).parents[2] / "docs" / "use-in-your-project.md"
BEGIN, END = "<!-- by tests/helpers/proven.py -->\n", "<!-- end -->\n"


class Case(NamedTuple):
    """A builder on one network in one detector: it trains, resumes and is exported.

    ``in_short`` is what `make test` runs of it, the rest being for `make test-slow`: some of "train" and
    "export", the latter as TorchScript only.
    """

    builder: str
    arch: str
    detector: str
    in_short: tuple[str, ...] = ()
    onnx: bool | None = True
    program: bool | None = True

    @property
    def name(self) -> str:
        return f"{self.builder.removeprefix('build_').removesuffix('_backbone')}-{self.arch}-{self.detector}"


# Not to ONNX: antialiased resizing, of position embeddings or, for patches of 14, of images. None: not
# compared, for lack of time or, of the RetinaNet with GELU, since scores on random weights tie.
MASK, RETINA, C4, ONE = "Mask R-CNN", "RetinaNet", "Mask R-CNN C4", "Mask R-CNN on res4 alone"
TRAIN = ("train",)
CASES = (
    Case("build_robust_resnet_backbone", "resnet50", C4, onnx=None),
    Case("build_robust_resnet_fpn_backbone", "resnet18", MASK, ("train", "export")),
    Case("build_robust_resnet_fpn_backbone", "resnext50_32x4d", MASK),
    Case("build_retinanet_robust_resnet_fpn_backbone", "resnet18", RETINA, TRAIN),
    Case("build_robust_torchvision_backbone", "resnet50", C4, onnx=None),
    Case("build_robust_torchvision_backbone", "mobilenet", ONE, onnx=None),
    Case("build_robust_torchvision_fpn_backbone", "mobilenet", MASK, TRAIN),
    Case("build_robust_torchvision_fpn_backbone", "densenet", MASK),
    Case("build_robust_torchvision_fpn_backbone", "mnasnet", MASK),
    Case("build_robust_torchvision_fpn_backbone", "vgg16_bn", MASK),
    Case("build_robust_torchvision_fpn_backbone", "ra_resnet50", MASK, onnx=None),
    Case("build_retinanet_robust_torchvision_fpn_backbone", "shufflenet", RETINA, TRAIN),
    Case("build_robust_timm_backbone", "timm/convnext_atto", ONE, onnx=None),
    Case("build_robust_timm_backbone", "timm/vit_tiny_patch16_224", ONE, onnx=False),
    Case("build_robust_timm_fpn_backbone", "timm/convnext_atto", MASK, TRAIN),
    Case("build_robust_timm_fpn_backbone", "timm/convnext_tiny:stem=conv", MASK),
    Case("build_robust_timm_fpn_backbone", "timm/swin_tiny_patch4_window7_224", MASK),
    Case("build_retinanet_robust_timm_fpn_backbone", "timm/efficientnet_lite0", RETINA, TRAIN),
    Case("build_retinanet_robust_timm_fpn_backbone", "timm/resnet18:act_layer=gelu", RETINA, onnx=None),
    Case(
        "build_robust_timm_sfp_backbone", "timm/vit_tiny_patch16_224", MASK, ("train", "export"), onnx=False
    ),
    Case("build_retinanet_robust_timm_sfp_backbone", "timm/vit_tiny_patch16_224", RETINA, TRAIN, onnx=False),
    Case("build_robust_timm_sfp_backbone", "timm/vit_small_patch14_reg4_dinov2", MASK, onnx=False),
    Case("build_robust_timm_sfp_backbone", "timm/xcit_nano_12_p16_224", MASK),
    Case("build_robust_timm_sfp_backbone", "timm/eva02_tiny_patch14_224", MASK, onnx=False),
)
# Who reads output_shape() and strides of what `build_backbone` gives.
CONSUMERS = ("Mask2Former's pixel decoder", "DETR's masked backbone")
CONSUMED = (
    ("build_robust_resnet_backbone", "resnet18"),
    ("build_robust_torchvision_backbone", "mobilenet"),
    ("build_robust_timm_backbone", "timm/convnext_atto"),
)


SAID = {True: "yes", False: "no", None: "not compared"}


def table() -> str:
    lines = [
        "| `MODEL.BACKBONE.NAME` | network | in | trains, resumes, TorchScript | `torch.export` | ONNX |",
        "|---|---|---|---|---|---|",
        *(
            f"| `{c.builder}` | `{c.arch}` | {c.detector} | yes | {SAID[c.program]} | {SAID[c.onnx]} |"
            for c in CASES
        ),
        *(
            f"| `{builder}` | `{arch}` | {consumer} | gradients | | |"
            for builder, arch in CONSUMED
            for consumer in CONSUMERS
        ),
    ]
    return "\n".join(lines) + "\n"


def written(text: str) -> str:
    """The guide's text with the table of these cases in it."""
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    return f"{before}{BEGIN}\n{table()}\n{END}{after}"


if __name__ == "__main__":
    GUIDE.write_text(written(GUIDE.read_text(encoding="utf-8")), encoding="utf-8")
