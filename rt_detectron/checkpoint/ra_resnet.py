"""RaResNets, a design of ResNets for adversarial training, of torchvision's RegNet blocks."""

from collections.abc import Sequence

from torch import nn

# What Peng et al. (2023), https://arxiv.org/abs/2308.16258, and their code call these layers -> torchvision.
PUBLISHED_NAMES = (
    (r"^stem\.stem\.stem\.", "stem."),
    (r"^stages\.stage\d\.stage(\d)-block(\d+)\.", r"trunk_output.block\1.block\1-\2."),
    (r"(block\d-\d+)\.F\.", r"\1.f."),
)


def build_ra_resnet(depths: Sequence[int], widths: Sequence[int], num_classes: int) -> nn.Module:
    """A RaResNet, randomly initialised.

    It is a ResNet of bottlenecks with SiLU, squeeze and excitation, and convolutions in two groups. The first
    convolution of a block has no norm. The stem of 7x7 is followed by no pooling: stage 1 has the stride.

    Args:
        depths, widths: blocks and channels of each of the four stages.
    """
    from torchvision.models.regnet import BlockParams, RegNet
    from torchvision.ops.misc import Conv2dNormActivation

    def stem(channels: int, width: int, norm: type[nn.Module], _: type[nn.Module]) -> nn.Module:
        return Conv2dNormActivation(channels, width, 7, 2, norm_layer=norm, activation_layer=nn.ReLU)

    parameters = BlockParams(
        depths=list(depths),
        widths=list(widths),
        group_widths=[width // 8 for width in widths],
        bottleneck_multipliers=[0.25] * len(depths),
        strides=[2] * len(depths),
        se_ratio=0.25,
    )
    network = RegNet(parameters, num_classes, stem_width=96, stem_type=stem, activation=nn.SiLU)
    for stage in network.trunk_output:
        for block in stage:
            block.f.a[1] = nn.Identity()
            block.f.se.activation = nn.ReLU()
    return network
