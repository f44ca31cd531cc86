import sys

import pytest
import torch
from torch import nn

from rt_detectron.attacks import PGD, AutoAttack, ThreatModel
from rt_detectron.attacks.autoattack import _warn_once
from rt_detectron.utils.errors import InputError

pytest.importorskip("pyautoattack", reason='the extra "autoattack" is not installed')


def network(classes: int = 5) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, classes))


@pytest.fixture
def batch():
    images = torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        return images, network()(images).argmax(1)  # all are right


@pytest.mark.parametrize(
    ("norm", "eps"),
    [
        ("linf", 1.0),
        pytest.param("l2", 0.05, marks=pytest.mark.slow),
        pytest.param("l1", 0.5, marks=pytest.mark.slow),
    ],
)
def test_stays_in_the_ball_and_turns_over_what_pgd_does(batch, norm, eps):
    images, labels = batch
    model, threat_model = network().train(), ThreatModel(norm, eps)
    adversarial = AutoAttack(threat_model)(model, images, labels)
    order = {"l1": 1, "l2": 2, "linf": float("inf")}[norm]
    size = torch.linalg.vector_norm((adversarial - images).flatten(1), order, dim=1)
    assert (size <= threat_model.radius * (1 + 1e-4)).all()
    assert adversarial.min() >= 0
    assert adversarial.max() <= 1
    assert model.training
    by_pgd = PGD(threat_model, steps=20)(model, images, labels)
    with torch.no_grad():
        right, right_by_pgd = ((model(x).argmax(1) == labels).sum() for x in (adversarial, by_pgd))
    assert right <= right_by_pgd < len(labels)


@pytest.mark.parametrize("classes", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_of_few_classes_it_is_the_rest_of_the_ensemble(batch, classes, caplog):
    images, model = batch[0][:3], network(classes)
    with torch.no_grad():
        labels = model(images).argmax(1)
    _warn_once.cache_clear()
    adversarial = AutoAttack(ThreatModel("linf", 8.0))(model, images, labels)
    assert f"without targeted APGD-DLR, which needs 4 classes, not {classes}" in caplog.text
    assert AutoAttack(ThreatModel("linf", 8.0)).caveat(4) == ""
    assert (adversarial - images).abs().max() <= 8.001 / 255
    with torch.no_grad():
        assert (model(adversarial).argmax(1) == labels).float().mean() < 0.6


def test_what_it_cannot_attack_is_one_line(batch):
    images, labels = batch
    with pytest.raises(InputError, match="a single class"):
        AutoAttack(ThreatModel("l2", 0.5))(network(1), images, labels)
    with pytest.raises(InputError, match="images range from"):
        AutoAttack(ThreatModel("l2", 0.5))(network(), 255 * images, labels)


def test_eps_0_changes_nothing(batch):
    assert torch.equal(AutoAttack(ThreatModel("linf", 0.0))(network(), *batch), batch[0])


def test_without_the_package_it_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "pyautoattack", None)
    with pytest.raises(InputError, match='pip install "pyautoattack'):
        AutoAttack(ThreatModel("l2", 0.5))
