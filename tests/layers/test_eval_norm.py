import copy

import pytest
import torch
from detectron2.layers import Conv2d, ShapeSpec
from detectron2.modeling import build_backbone

from rt_detectron.layers.eval_norm import EvalBatchNorm2d, keep_statistics
from rt_detectron.layers.frozen_norm import FrozenNormConv2d, fold_frozen_norms
from rt_detectron.utils.errors import InputError


def test_statistics_stay_and_scale_and_shift_train():
    torch.manual_seed(0)
    norm = torch.nn.BatchNorm2d(6)
    for name, low in (("weight", 0.5), ("bias", -1), ("running_mean", -1), ("running_var", 0.5)):
        getattr(norm, name).data.uniform_(low, 1.5)
    plain = torch.nn.Sequential(Conv2d(4, 6, 3, bias=False, norm=norm)).eval()
    kept = keep_statistics(copy.deepcopy(plain)).train()
    folded = fold_frozen_norms(copy.deepcopy(kept)).train()
    assert type(folded[0]) is FrozenNormConv2d
    found = []
    for network in (plain, kept, folded):
        output = network(torch.randn(2, 4, 9, 7, generator=torch.Generator().manual_seed(1)))
        output.square().sum().backward()
        found.append([output, *(parameter.grad for parameter in network.parameters())])
    for other in found[1:]:
        for ours, reference in zip(other, found[0], strict=True):
            torch.testing.assert_close(ours, reference, rtol=1e-4, atol=1e-4)
    assert torch.equal(kept[0].norm.running_mean, plain[0].norm.running_mean)
    assert kept.state_dict().keys() == plain.state_dict().keys()


@pytest.mark.parametrize("arch", ["resnet18", "mobilenet"])
def test_a_backbone_has_it_above_its_frozen_stages(make_cfg, arch):
    cfg = make_cfg(arch, NORM="EvalBN")
    if arch == "mobilenet":
        cfg.MODEL.BACKBONE.NAME = "build_robust_torchvision_fpn_backbone"
    with torch.device("meta"):
        backbone = build_backbone(cfg, ShapeSpec(channels=3)).train()
    norms = [module for module in backbone.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    assert norms
    assert all(type(norm) is EvalBatchNorm2d and not norm.training for norm in norms)
    assert all(norm.weight.requires_grad for norm in norms)


def test_a_c4_head_does_not_take_it(make_cfg):
    with pytest.raises(InputError, match=r"EvalBN: .* takes FrozenBN or BN"):
        build_backbone(make_cfg("resnet50", "c4", NORM="EvalBN"), ShapeSpec(channels=3))
