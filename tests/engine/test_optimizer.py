import copy

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.solver import build_optimizer as detectron2_build_optimizer

from rt_detectron.engine.optimizer import backbone_factor, build_optimizer
from rt_detectron.utils.errors import InputError


def solver(cfg, **keys):
    cfg.merge_from_list([part for key, value in keys.items() for part in (f"SOLVER.{key}", value)])
    return cfg


def rates(model, optimizer):
    rate = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    return {name: rate[id(p)] for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(
    ("arch", "detector", "builder"),
    [
        ("resnet18", "fpn", None),
        ("resnet18", "retinanet", None),
        ("resnet50", "c4", None),
        ("mobilenet", "fpn", "build_robust_torchvision_fpn_backbone"),
    ],
)
def test_the_pretrained_network_and_nothing_else_has_its_own_rate(make_cfg, arch, detector, builder):
    cfg = solver(make_cfg(arch, detector), BASE_LR=0.5, BACKBONE_MULTIPLIER=0.1)
    cfg.MODEL.BACKBONE.NAME = builder or cfg.MODEL.BACKBONE.NAME
    with torch.device("meta"):
        cfg.MODEL.DEVICE = "meta"
        model = build_model(cfg)
    found = rates(model, build_optimizer(cfg, model))
    low = {name for name, rate in found.items() if rate == pytest.approx(0.05)}
    assert all(rate == 0.5 for name, rate in found.items() if name not in low)
    backbone = {n for n in found if n.startswith("backbone.") and not n.startswith("backbone.fpn_")}
    backbone = {n for n in backbone if "top_block" not in n}
    assert low == backbone | {n for n in found if n.startswith("roi_heads.res5.")}
    assert low


@pytest.mark.parametrize("clip", ["", "value", "norm"])
def test_without_a_multiplier_it_steps_as_detectron2s(make_cfg, clip):
    keys = {"BASE_LR": 0.1, "WEIGHT_DECAY_NORM": 0.01, "CLIP_GRADIENTS.ENABLED": bool(clip)}
    cfg = solver(make_cfg("resnet18"), **keys, **({"CLIP_GRADIENTS.CLIP_TYPE": clip} if clip else {}))
    cfg.SOLVER.CLIP_GRADIENTS.CLIP_VALUE = 0.3
    models = [build_model(cfg)]
    models.append(copy.deepcopy(models[0]))
    optimizers = [build_optimizer(cfg, models[0]), detectron2_build_optimizer(cfg, models[1])]
    for step in range(3):
        for model, optimizer in zip(models, optimizers, strict=True):
            generator = torch.Generator().manual_seed(step)
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.grad = torch.rand(parameter.shape, generator=generator)
            optimizer.step()
    for (name, ours), reference in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-5, atol=1e-6, msg=name)


def test_mixed_precision_has_its_gradients_unscaled_ahead_of_the_clipping(make_cfg):
    cfg = solver(make_cfg("resnet18"), **{"AMP.ENABLED": True, "CLIP_GRADIENTS.ENABLED": True})
    optimizer = build_optimizer(cfg, torch.nn.Linear(2, 2))
    assert not getattr(optimizer, "_step_supports_amp_scaling", False)  # so GradScaler unscales


@pytest.mark.parametrize("multiplier", [0, -1, float("inf"), float("nan")])
def test_a_multiplier_that_cannot_be_is_refused(multiplier):
    with pytest.raises(InputError, match=r"SOLVER.BACKBONE_MULTIPLIER is .*; it must be > 0"):
        backbone_factor(multiplier)


def test_bias_factor_and_multiplier_exclude_each_other(make_cfg):
    cfg = solver(make_cfg("resnet18"), BACKBONE_MULTIPLIER=0.1, BIAS_LR_FACTOR=2.0)
    with pytest.raises(InputError, match=r"SOLVER.BIAS_LR_FACTOR: set one of the two to 1"):
        build_optimizer(cfg, torch.nn.Linear(2, 2))
