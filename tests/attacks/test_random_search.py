import pytest
import torch

from rt_detectron.attacks import PGD, ThreatModel, build_detector_attack
from rt_detectron.attacks.random_search import RandomSearch


@pytest.mark.parametrize("ball", [ThreatModel("linf", 8), ThreatModel("l2", 2.0)], ids=lambda ball: ball.norm)
def test_it_raises_the_objective_by_forward_passes_alone(make_detector, picture, ball):
    model = make_detector("fpn")
    attack = build_detector_attack("A_cls", PGD(ball, steps=1))
    passes = []
    model.backbone.register_forward_hook(lambda *_: passes.append(torch.is_grad_enabled()))
    before = torch.get_rng_state()
    few, many = (RandomSearch(attack, queries)(model, [picture])[0]["image"] for queries in (1, 12))
    assert passes == [False] * 13
    assert torch.equal(torch.get_rng_state(), before)
    delta = (many - picture["image"]) / 255
    size = delta.norm() if ball.norm == "l2" else delta.abs().max()
    assert 0.5 * ball.radius < size <= ball.radius * (1 + 1e-4)
    assert many.min() >= 0
    assert many.max() <= 255
    black = {**picture, "image": torch.zeros_like(picture["image"])}
    assert RandomSearch(attack, 2)(model, [black])[0]["image"].max() > 0
    values = [attack.value(model, [{**picture, "image": image}])[0] for image in (few, many)]
    assert values[1] > values[0]
