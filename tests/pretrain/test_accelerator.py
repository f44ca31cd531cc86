"""No training step waits for the accelerator, and all that it computes with is there."""

import copy

import pytest
import torch
from accelerator import Accelerator
from detectron2.utils.events import EventStorage
from pretraining_variants import tiny_classifier

from rt_detectron.attacks import APGD, PGD, ThreatModel
from rt_detectron.pretrain.label_free import LabelFree
from rt_detectron.pretrain.model import Pretraining
from rt_detectron.pretrain.schedules import EpsSchedule, Resolution
from rt_detectron.pretrain.strategies import Adversarial, Fast, Free, Standard, Trades
from rt_detectron.pretrain.trainer import ClassifierTrainer

L1, L2, LINF = ThreatModel("l1", 10.0), ThreatModel("l2", 1.0), ThreatModel("linf", 8.0)


def pgd(**keys) -> PGD:
    return PGD(L2, steps=2, random_start=True, **keys)


STRATEGIES = {
    "standard": Standard(),
    "adversarial": Adversarial(pgd()),
    "l1": Adversarial(PGD(L1, steps=2, random_start=True)),
    "linf": Adversarial(PGD(LINF, steps=2)),
    "best of several": Adversarial(pgd(best=True, restarts=2)),
    "apgd": Adversarial(APGD(L2, steps=3)),
    "eps at random": Adversarial(pgd(), EpsSchedule(random=True)),
    "a part of the images": Adversarial(pgd(), EpsSchedule(warmup=1.0, grows="images")),
    "fast": Fast(LINF),
    "free": Free(L2, replays=2),
    "trades": Trades(pgd()),
    "label-free": LabelFree(pgd()),
}


def kinds(of: type) -> set[type]:
    return {of}.union(*map(kinds, of.__subclasses__()))


def test_every_strategy_of_the_package_is_here():
    ours = {kind for kind in kinds(Standard) if kind.__module__.startswith("rt_detectron.")}
    assert ours == {type(strategy) for strategy in STRATEGIES.values()}


def make(strategy: Standard) -> Pretraining:
    torch.manual_seed(0)
    model = Pretraining(
        tiny_classifier(3), copy.deepcopy(strategy), Resolution(start=8, until=0.6, multiple=4)
    )
    return model


class Batches:
    """A training loader."""

    batch_size = 4

    def __init__(self, dtype):
        images = torch.randint(0, 256, (4, 3, 16, 16), generator=torch.Generator().manual_seed(0))
        images = images.to(torch.uint8) if dtype == torch.uint8 else images / 255
        self.batch = images, torch.arange(4) % 3, [""] * 4

    def batches(self, start):
        while True:
            yield self.batch


def train(model: Pretraining, dtype=torch.uint8) -> dict[str, torch.Tensor]:
    """The weights after two steps."""
    model.strategy.begin(model.classifier, True)
    model.progress = 0.5
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, foreach=True)
    trainer = ClassifierTrainer(
        model, Batches(dtype), optimizer, accumulate=1 + (model.strategy.replays == 1)
    )
    trainer.gather_metric_period = 100
    trainer.start_iter = 0
    for trainer.iter in range(2):
        torch.manual_seed(trainer.iter)
        with EventStorage():
            trainer.run_step()
    return model.classifier.state_dict()


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_step_never_waits(name):
    strategy, dtype = STRATEGIES[name], torch.float32 if name == "adversarial" else torch.uint8
    expected = train(make(strategy), dtype)
    with Accelerator() as accelerator:
        model = accelerator.put(make(strategy))
        found = train(model, dtype)
        assert accelerator.waits == []
    assert found["network.fc.weight"].device.type == "meta"
    for name, tensor in found.items():  # and it is the step that it is elsewhere
        torch.testing.assert_close(tensor.numbers, expected[name], rtol=1e-4, atol=1e-5, msg=name)


class Planted(Adversarial):
    """Does something more to the images."""

    def __init__(self, plant):
        super().__init__(pgd())
        self.plant = plant

    def perturb(self, model, images, labels, progress):
        self.plant(images)
        return super().perturb(model, images, labels, progress)


@pytest.mark.parametrize(
    ("plant", "wait"),
    [
        (lambda images: images.mean().item(), "_local_scalar_dense"),
        (lambda images: images.mean() if images.max() > 2 else images.sum(), "_local_scalar_dense"),
        (lambda images: images[images > 0.5], "index by a mask"),
        (lambda images: images.clone().masked_fill_(images > 2, 0).nonzero(), "nonzero"),
        (lambda images: images.cpu(), "_to_copy to the host"),
        (lambda images: images + torch.ones(3, 1, 1, device=images.device), None),
        (lambda images: images + torch.ones(1).to(images.device), "_to_copy to the accelerator"),
        (lambda images: images[torch.tensor([0, 1])], "index by indices of the host"),
    ],
)
def test_what_would_wait_is_found(plant, wait):
    with Accelerator() as accelerator:
        train(accelerator.put(make(Planted(plant))))
        assert {line.split(", ")[0] for line in accelerator.waits} == ({wait} if wait else set())
        assert all(__file__ in line for line in accelerator.waits)


@pytest.mark.parametrize(
    "plant",
    [
        lambda images: images + torch.ones(3, 1, 1),
        lambda images: (
            images + torch.tensor([1.0], device=images.device)
        ),  # copied from the host, which waits
    ],
)
def test_numbers_of_the_host_are_found(plant):
    with Accelerator() as accelerator, pytest.raises(RuntimeError, match="tensors of two devices"):
        train(accelerator.put(make(Planted(plant))))
