import copy
import logging

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from torch import nn

from rt_detectron.engine.steps import EXPLOSION, WINDOW, DetectorTrainer, build_trainer, fast
from rt_detectron.layers.frozen_norm import FrozenNormConv2d
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
            if trainer.has_broken():
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
    assert not trained([1.0] * WINDOW + [high] * (WINDOW // 2 - 1) + [1.0] * WINDOW).has_broken()
    assert not trained([1.0] * WINDOW + [0.9 * EXPLOSION] * 2 * WINDOW).has_broken()
    with caplog.at_level(logging.ERROR):
        trainer = trained([1.0] * WINDOW + [high] * 2 * WINDOW)
    assert WINDOW * 1.5 <= trainer.iter + 1 <= WINDOW * 1.5 + 2
    assert caplog.text.count("Diverged") == 1


def test_weights_that_are_not_finite_are_seen_before_they_are_saved():
    trainer = trained([1.0])
    trainer.model.weight.data.fill_(float("inf"))
    assert not trainer.has_broken()
    assert trainer.has_broken(wait=True)
    assert trainer.has_broken()


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
