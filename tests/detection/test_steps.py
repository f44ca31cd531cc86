import copy
import logging
import re

import pytest
import torch
from detectron2.layers import ROIAlign
from detectron2.modeling import build_model
from detectron2.modeling.backbone.vit import get_vit_lr_decay_rate
from detectron2.solver import build_optimizer as detectron2_build_optimizer
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from torch import nn

from rt_detectron.detection.steps import (
    EXPLOSION,
    WINDOW,
    DetectorTrainer,
    _clip_each_norm,
    backbone_factor,
    build_optimizer,
    build_trainer,
    clipped_optimizer,
    fast,
)
from rt_detectron.engine.base_trainer import LossesOnTheWay
from rt_detectron.layers.frozen_norm import FrozenNormConv2d
from rt_detectron.layers.roi_align import RowsROIAlign
from rt_detectron.utils.errors import InputError


class Losses(nn.Module):
    """A detector whose losses are the batches themselves."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, batch):
        return {"loss_a": self.weight * batch, "loss_b": self.weight * 0}


def trained(losses: list[float]) -> DetectorTrainer:
    """After steps with these losses, or up to the one that broke it."""
    model = Losses()
    trainer = build_trainer(model, losses, torch.optim.SGD(model.parameters(), lr=0))
    with EventStorage() as storage:
        for trainer.iter in range(len(losses)):
            storage.iter = trainer.iter
            trainer.run_step()
            if trainer.has_diverged():
                break
    return trainer


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_is_noted_and_changes_nothing(loss, caplog):
    trainer = trained([1.0, loss, 1.0])
    assert trainer.iter == 1
    assert trainer.model.weight.item() == 1.0
    assert "Diverged: Loss became infinite or NaN at iteration=1" in caplog.text


def test_an_exploding_loss_is_noted_once_it_lasts(caplog):
    high = 1.1 * EXPLOSION
    assert not trained([1.0] * WINDOW + [high] * (WINDOW // 2 - 1) + [1.0] * WINDOW).has_diverged()
    assert not trained([1.0] * WINDOW + [0.9 * EXPLOSION] * 2 * WINDOW).has_diverged()
    with caplog.at_level(logging.ERROR):
        trainer = trained([1.0] * WINDOW + [high] * 2 * WINDOW)
    assert WINDOW * 1.5 <= trainer.iter + 1 <= WINDOW * 1.5 + 2
    assert caplog.text.count("Diverged") == 1


def test_losses_are_written_at_once_and_none_is_lost():
    """Every 20 steps, and before anything is saved."""
    model = Losses()
    losses = [float(i) for i in range(30)]
    trainer = build_trainer(model, losses, torch.optim.SGD(model.parameters(), lr=0), log_period=40)
    assert trainer.gather_metric_period == 20
    with EventStorage() as storage:
        for trainer.iter in range(30):
            storage.iter = trainer.iter
            trainer.run_step()
            written = storage.histories()["loss_a"].values() if trainer.iter >= 19 else []
            assert len(written) == 20 * ((trainer.iter + 1) // 20)
        assert not trainer.has_diverged(wait=True)
        assert storage.histories()["total_loss"].values() == [(loss, i) for i, loss in enumerate(losses)]
        assert len(storage.histories()["data_time"].values()) == 30


def test_a_loss_that_comes_late_is_seen_before_anything_is_saved(monkeypatch):
    """As from a GPU, which the host does not wait for."""
    arrived = LossesOnTheWay.arrived
    monkeypatch.setattr(LossesOnTheWay, "arrived", lambda self, wait=False: arrived(self) if wait else ())
    model = Losses()
    optimizer = torch.optim.SGD(model.parameters(), lr=0)
    trainer = build_trainer(model, [1.0, float("nan"), 1.0], optimizer, log_period=20)
    with EventStorage():
        for trainer.iter in range(3):
            trainer.run_step()
            assert not trainer.has_diverged()
        assert trainer.has_diverged(wait=True)


def test_weights_that_are_not_finite_are_seen_before_they_are_saved():
    trainer = trained([1.0])
    trainer.model.weight.data.fill_(float("inf"))
    assert not trainer.has_diverged()
    assert trainer.has_diverged(wait=True)
    assert trainer.has_diverged()


def test_sync_bn_says_where_it_cannot_run(monkeypatch):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.SyncBatchNorm(4))
    monkeypatch.setattr(comm, "get_world_size", lambda: 2)
    with pytest.raises(InputError, match=r"SyncBN needs GPUs: .*set NORM naiveSyncBN, BN or FrozenBN"):
        build_trainer(model, [], torch.optim.SGD(model.parameters(), lr=0.1))


def batch(photograph):
    instances = Instances((96, 128))
    instances.gt_boxes = Boxes(torch.tensor([[10.0, 10.0, 60.0, 80.0], [50.0, 20.0, 120.0, 90.0]]))
    instances.gt_classes = torch.tensor([0, 2])
    masks = torch.zeros(2, 96, 128, dtype=torch.bool)
    masks[:, 20:70, 30:100] = True
    instances.gt_masks = BitMasks(masks)
    return [{"image": photograph, "instances": instances}]


@pytest.mark.parametrize("detector", ["fpn", "retinanet"])
def test_fast_computes_the_same_losses_and_gradients(make_cfg, photograph, detector):
    cfg = make_cfg("resnet18", detector)
    cfg.INPUT.MASK_FORMAT = "bitmask"
    torch.manual_seed(0)
    plain = build_model(cfg)
    for name, buffer in plain.named_buffers():
        if name.endswith(("norm.weight", "norm.bias")):
            buffer.add_(0.1 * torch.rand_like(buffer))
    ours = fast(copy.deepcopy(plain))
    aligns = [type(module) for module in ours.modules() if isinstance(module, ROIAlign)]
    assert aligns == [RowsROIAlign] * (8 if detector == "fpn" else 0)
    assert sum(type(module) is FrozenNormConv2d for module in ours.modules()) == 20
    found = []
    for model in (plain, ours):
        torch.manual_seed(1)  # for the sampling of proposals
        with EventStorage():
            losses = model(batch(photograph))
        sum(losses.values()).backward()
        found.append(
            ({k: v.item() for k, v in losses.items()}, {k: p.grad for k, p in model.named_parameters()})
        )
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-4)
    for name, grad in found[0][1].items():
        if grad is None:
            assert found[1][1][name] is None
        else:
            difference = (found[1][1][name] - grad).norm() / grad.norm().clamp_min(1e-6)
            assert difference < 1e-2, name  # what rounding grows to from loss to stem
    assert ours.state_dict().keys() == plain.state_dict().keys()
    assert ours.backbone(torch.zeros(1, 3, 64, 64))


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


def test_the_norm_of_all_gradients_is_clipped(make_cfg):
    keys = {"ENABLED": True, "CLIP_TYPE": "full_model", "CLIP_VALUE": 1.0}
    cfg = solver(make_cfg("resnet18"), **{f"CLIP_GRADIENTS.{key}": value for key, value in keys.items()})
    network = torch.nn.Linear(2, 1)
    for optimizer in (build_optimizer(cfg, network), clipped_optimizer("SGD", 1.0, network.parameters())):
        network.weight.grad, network.bias.grad = torch.tensor([[3.0, 0.0]]), torch.tensor([4.0])
        optimizer.step()
        torch.testing.assert_close(network.weight.grad, torch.tensor([[0.6, 0.0]]))
        torch.testing.assert_close(network.bias.grad, torch.tensor([0.8]))


def test_a_fused_optimiser_would_clip_scaled_gradients():
    with pytest.raises(InputError, match="clipped_optimizer: leave out fused"):
        clipped_optimizer("AdamW", 1.0, [torch.nn.Parameter(torch.zeros(2))], fused=True)


def test_clipping_on_an_accelerator_waits_for_nothing():
    """A tensor on the meta device has no values, so reading one, as .item() does, raises."""
    parameters = [torch.nn.Parameter(torch.zeros(shape, device="meta")) for shape in ((3, 2), (4,))]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    _clip_each_norm(iter(parameters), max_norm=1.0, norm_type=2.0)
    with pytest.raises(RuntimeError, match="meta"):
        parameters[0].grad.sum().item()


def test_mixed_precision_has_its_gradients_unscaled_ahead_of_the_clipping(make_cfg):
    cfg = solver(make_cfg("resnet18"), **{"AMP.ENABLED": True, "CLIP_GRADIENTS.ENABLED": True})
    optimizer = build_optimizer(cfg, torch.nn.Linear(2, 2))
    assert not getattr(optimizer, "_step_supports_amp_scaling", False)  # so GradScaler unscales


def rates_of(arch: str, builder: str, make_cfg, **keys) -> dict[str, float]:
    """The learning rates under AdamW, with a base of 1."""
    pytest.importorskip("timm")
    cfg = solver(make_cfg(arch), BASE_LR=1.0, OPTIMIZER="ADAMW", **keys)
    cfg.MODEL.BACKBONE.NAME, cfg.MODEL.BACKBONE.FREEZE_AT = builder, 0
    cfg.MODEL.DEVICE = "meta"
    with torch.device("meta"):
        model = build_model(cfg)
    optimizer = build_optimizer(cfg, model)
    assert isinstance(optimizer, torch.optim.AdamW)
    return rates(model, optimizer)


def test_layer_decay_is_vitdets(make_cfg):
    found = rates_of("timm/vit_tiny_patch16_224", "build_robust_timm_sfp_backbone", make_cfg, LAYER_DECAY=0.7)
    for name, rate in found.items():
        if not name.endswith("cls_token"):  # ViTDet's has none
            assert rate == pytest.approx(get_vit_lr_decay_rate(name, 0.7, 12)), name
    assert found["backbone.net.trunk.model.cls_token"] == pytest.approx(0.7**13)
    assert found["backbone.simfp_2.0.weight"] == found["roi_heads.box_head.fc1.weight"] == 1


def test_layer_decay_counts_the_blocks_of_all_stages(make_cfg):
    found = rates_of(
        "timm/convnext_atto",
        "build_robust_timm_fpn_backbone",
        make_cfg,
        LAYER_DECAY=0.5,
        BACKBONE_MULTIPLIER=0.1,
    )  # 2, 2, 6, 2 blocks
    trunk = "backbone.bottom_up.trunk."
    expected = {"stem_0.weight": 13, "stages_0.blocks.1.gamma": 11, "stages_1.downsample.0.weight": 10}
    expected |= {"stages_1.blocks.0.gamma": 10, "stages_2.blocks.5.gamma": 3, "stages_3.blocks.1.gamma": 1}
    for name, steps in expected.items():
        assert found[trunk + name] == pytest.approx(0.1 * 0.5**steps), name
    assert found["backbone.fpn_lateral2.weight"] == 1


def test_adamw_is_torchs_without_decay_of_norms(make_cfg):
    cfg = solver(make_cfg("resnet18"), BASE_LR=0.01, OPTIMIZER="ADAMW", WEIGHT_DECAY=0.1)
    model = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3))
    reference = copy.deepcopy(model)
    ours = build_optimizer(cfg, model)
    plain = torch.optim.AdamW(
        [{"params": reference[0].parameters()}, {"params": reference[1].parameters(), "weight_decay": 0.0}],
        lr=0.01,
        weight_decay=0.1,
    )
    for network, optimizer in ((model, ours), (reference, plain)):
        for _ in range(3):
            optimizer.zero_grad()
            network(torch.arange(6.0).view(2, 3)).square().sum().backward()
            optimizer.step()
    for found, expected in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"OPTIMIZER": "ADAM"}, "SOLVER.OPTIMIZER is 'ADAM'; it must be SGD or ADAMW"),
        ({"LAYER_DECAY": 0.0}, "SOLVER.LAYER_DECAY is 0.0; it must be > 0 and at most 1"),
        ({"LAYER_DECAY": 0.7}, "SOLVER.LAYER_DECAY is for ViT, Swin, ConvNeXt"),
    ],
)
def test_optimisers_that_cannot_be(keys, words, make_cfg):
    with pytest.raises(InputError, match=re.escape(words)):
        build_optimizer(solver(make_cfg("resnet18"), **keys), nn.Linear(2, 2))


@pytest.mark.parametrize("multiplier", [0, -1, float("inf"), float("nan")])
def test_a_multiplier_that_cannot_be_is_refused(multiplier):
    with pytest.raises(InputError, match=r"SOLVER.BACKBONE_MULTIPLIER is .*; it must be > 0"):
        backbone_factor(multiplier)


def test_bias_factor_and_multiplier_exclude_each_other(make_cfg):
    cfg = solver(make_cfg("resnet18"), BACKBONE_MULTIPLIER=0.1, BIAS_LR_FACTOR=2.0)
    with pytest.raises(InputError, match=r"SOLVER.BIAS_LR_FACTOR works without .*: set it to 1"):
        build_optimizer(cfg, torch.nn.Linear(2, 2))
