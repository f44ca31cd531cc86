from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from detectron2.utils.events import EventStorage
from torchvision.transforms import v2

from rt_detectron.attacks import PGD, ThreatModel
from rt_detectron.checkpoint.architectures import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    build_classifier,
    get_architecture,
)
from rt_detectron.modeling.classifier import Classifier
from rt_detectron.pretrain.model import Pretraining
from rt_detectron.pretrain.schedules import EpsSchedule, Resolution
from rt_detectron.pretrain.strategies import POOL, Adversarial, Fast, Free, Standard, Trades
from rt_detectron.utils.errors import InputError

L2 = ThreatModel("l2", 1.0)


def test_classifier_is_the_network_behind_its_normalisation(photograph):
    classifier = Classifier("resnet18", num_classes=5).eval()
    images = photograph[None].float() / 255
    normalised = (photograph[None] - torch.tensor(IMAGENET_MEAN).view(3, 1, 1)) / torch.tensor(
        IMAGENET_STD
    ).view(3, 1, 1)
    plain = build_classifier("resnet18", 5).eval()  # torchvision's, in the ordinary memory format
    plain.load_state_dict(classifier.network.state_dict())
    assert torch.allclose(classifier(images), plain(normalised), atol=1e-4)


def test_state_dict_is_the_networks_alone():
    names = {f"network.{name}" for name in build_classifier("resnet18", 5).state_dict()}
    assert set(Classifier("resnet18", num_classes=5).state_dict()) == names
    model = make(Adversarial(PGD(L2, steps=1)))
    model.train()(batch())  # builds the attacked model
    assert set(model.classifier.state_dict()) == names
    assert len(list(model.parameters())) == len(list(model.classifier.parameters()))


def make(strategy=None):
    torch.manual_seed(0)
    return Pretraining(Classifier("resnet18", num_classes=3), strategy or Standard())


def batch():
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (6, 3, 32, 32), generator=generator, dtype=torch.uint8), torch.arange(6) % 3


def test_standard_loss_is_cross_entropy_on_the_images():
    images, labels = batch()
    loss = make().train()((images, labels))["loss"]
    reference = make().train()
    assert torch.allclose(loss, F.cross_entropy(reference.classifier(images.float() / 255), labels))


def test_adversarial_loss_is_cross_entropy_on_what_the_attack_makes():
    images, labels = batch()
    attack = PGD(L2, steps=2)
    loss = make(Adversarial(attack)).train()((images, labels))["loss"]
    reference = make().train()
    adversarial = attack(reference.classifier, images.float() / 255, labels)
    expected = F.cross_entropy(reference.classifier(adversarial), labels)
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-4)
    assert loss > make().train()((images, labels))["loss"]


def test_the_attacked_model_follows_the_optimiser():
    model = make(Adversarial(PGD(L2, steps=1))).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    images = batch()[0].float() / 255
    for _ in range(2):
        optimizer.zero_grad()
        model(batch())["loss"].backward()
        optimizer.step()
    with torch.no_grad():
        expected = model.classifier.eval()(images)
        torch.testing.assert_close(model.attacked.now()(images), expected, rtol=1e-4, atol=1e-4)


def test_eval_mode_gives_the_clean_logits():
    images, labels = batch()
    model = make(Adversarial(PGD(L2, steps=2))).eval()
    assert torch.equal(model((images, labels)), model.classifier(images.float() / 255))


@pytest.mark.parametrize(
    "strategy",
    [
        Adversarial(PGD(ThreatModel("l2", 0.0), steps=1)),
        Fast(ThreatModel("linf", 0.0)),
        Free(ThreatModel("linf", 0.0)),
        Adversarial(PGD(L2, steps=1), EpsSchedule(warmup=1.0)),  # at progress 0
        Adversarial(PGD(L2, steps=1), EpsSchedule(clean=0.5)),
        Fast(L2, EpsSchedule(clean=0.5, grows="images")),
    ],
    ids=["adversarial", "fast", "free", "warm-up", "clean", "no images"],
)
def test_without_eps_all_are_standard_training(strategy):
    assert torch.allclose(make(strategy).train()(batch())["loss"], make().train()(batch())["loss"], atol=1e-5)


def test_trades_is_its_equation():
    images, labels = batch()
    images = images.double() / 255  # in float32, rounding decides where a ReLU is 0, and so where a step goes
    attack = PGD(L2, steps=2, random_start=True)
    model = make(Trades(attack, beta=3.0)).double().train()
    torch.manual_seed(1)
    losses = model((images, labels))

    reference = make().double().train().classifier
    clean = reference.eval()(images).softmax(1).detach()
    torch.manual_seed(1)
    divergence = lambda logits, p: (p * (p.log() - logits.log_softmax(1))).sum(1)  # noqa: E731
    adversarial = attack(reference, images, clean, loss=divergence)
    reference.train()
    logits, attacked = reference(images), reference(adversarial)
    p = logits.softmax(1)
    torch.testing.assert_close(losses["loss_clean"], F.cross_entropy(logits, labels), rtol=1e-9, atol=0)
    expected = 3.0 * (p * (p.log() - attacked.log_softmax(1))).sum(1).mean()
    torch.testing.assert_close(losses["loss_robust"], expected, rtol=1e-7, atol=0)


@pytest.mark.parametrize(("norm", "eps"), [("linf", 8.0), ("l2", 1.0)])
def test_free_is_the_published_loop(norm, eps):
    """Algorithm 1 of Shafahi et al., written out, against the strategy in an ordinary training loop.

    In double precision, since a few steps on a few random images make much of rounding.
    """
    images, labels = batch()[0].double() / 255, batch()[1]
    batches = [(images, labels), (images.flip(0), labels)]
    threat_model = ThreatModel(norm, eps)
    model = make(Free(threat_model, replays=2)).double().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for item in (item for item in batches for _ in range(2)):
        optimizer.zero_grad()
        model(item)["loss"].backward()
        optimizer.step()

    reference = make().double().train().classifier
    optimizer = torch.optim.SGD(reference.parameters(), lr=0.01)
    delta = torch.zeros_like(images)
    for images, labels in batches:
        for _ in range(2):
            leaf = (images + delta).clamp(0, 1).requires_grad_(True)
            optimizer.zero_grad()
            F.cross_entropy(reference(leaf), labels).backward()
            optimizer.step()
            radius, grad = threat_model.radius, leaf.grad
            if norm == "linf":
                delta = (delta + radius * grad.sign()).clamp(-radius, radius)
            else:
                delta = delta + radius * grad / grad.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
                delta *= (radius / delta.flatten(1).norm(dim=1).view(-1, 1, 1, 1)).clamp(max=1)
    start = make().double().classifier.state_dict()
    found, expected = model.classifier.state_dict(), reference.state_dict()
    for name in ("network.conv1.weight", "network.fc.weight", "network.layer4.1.bn2.running_var"):
        moved = expected[name] - start[name]
        assert float((found[name] - expected[name]).norm() / moved.norm()) < 1e-6, name


def test_free_goes_on_where_it_was_saved():
    first = make(Free(ThreatModel("linf", 8.0))).train()
    first(batch())["loss"].backward()
    second = make(Free(ThreatModel("linf", 8.0))).train()
    second.classifier.load_state_dict(first.classifier.state_dict())
    second.strategy.load_state_of_process([first.strategy.state_of_process()])
    assert torch.equal(first(batch())["loss"], second(batch())["loss"])
    Free(L2).load_state_of_process([Free(L2).state_of_process()])  # before the first step


def test_free_goes_on_in_any_number_of_processes(monkeypatch):
    perturbation = torch.rand(6, 3, 2, 2, generator=torch.Generator().manual_seed(0))

    def in_processes(number: int, states: list[dict]) -> list[dict]:
        """What each of them has, once it has taken over the states."""
        monkeypatch.setattr("detectron2.utils.comm.get_world_size", lambda: number)
        found = []
        for rank in range(number):
            monkeypatch.setattr("detectron2.utils.comm.get_rank", lambda rank=rank: rank)
            strategy = Free(L2)
            strategy.load_state_of_process(states)
            found.append(strategy.state_of_process())
        return found

    states = in_processes(3, in_processes(2, [{"perturbation": perturbation, "grad": -perturbation}]))
    for rank, state in enumerate(states):
        assert torch.equal(state["perturbation"], perturbation[rank::3])
        assert torch.equal(state["grad"], -perturbation[rank::3])


class Turned(torch.nn.Module):
    """Takes an image for class 0 if it is positive: what an attack turns over, it gets wrong."""

    def forward(self, images):
        score = images.mean((1, 2, 3))
        return torch.stack([score, -score], 1)


def warnings_of_a_run(fast: Fast, monkeypatch, caplog, one_step, five_steps, steps=150, images=40) -> int:
    """How often ``fast`` warns in a training in which the attacks of one and of five steps are withstood with
    these probabilities, functions of the progress. The second turns over what the first does, and more.
    """

    def attack(self, model, images, labels):
        if self.steps == 1:
            attack.luck = torch.rand(len(images))
        withstood = attack.luck < (one_step if self.steps == 1 else five_steps)(attack.progress)
        return torch.where(withstood.view(-1, 1, 1, 1), images, -images)

    monkeypatch.setattr(PGD, "__call__", attack)
    caplog.clear()
    with EventStorage() as storage:
        for step in range(steps):
            attack.progress = step / steps
            batch = torch.full((images, 3, 1, 1), 0.5)
            fast.perturb(Turned(), batch, torch.zeros(images, dtype=torch.int64), attack.progress)
    assert "fast_accuracy" in storage.latest()
    return sum("catastrophic overfitting" in record.message for record in caplog.records)


def learning(progress: float) -> float:
    return 0.1 + 0.6 * progress**0.5


@pytest.mark.parametrize("grows", ["images", "eps"])
def test_healthy_runs_raise_no_alarm_and_overfitted_ones_do(grows, monkeypatch, caplog):
    """Also while a growing part of the batch is attacked, at first of a single image."""

    def alarms(five_steps, pool=None) -> int:
        if pool:
            monkeypatch.setattr("rt_detectron.pretrain.strategies.POOL", pool)
        found = 0
        for seed in range(20):
            torch.manual_seed(seed)
            fast = Fast(ThreatModel("linf", 8.0), EpsSchedule(warmup=1.0, grows=grows), check_every=1)
            found += warnings_of_a_run(fast, monkeypatch, caplog, learning, five_steps) > 0
        return found

    healthy = lambda progress: 0.75 * learning(progress)  # noqa: E731
    assert alarms(healthy) == 0
    assert alarms(lambda progress: healthy(progress) if progress < 0.7 else 0.05) == 20
    if grows == "images":
        assert alarms(healthy, pool=1) >= 5  # judged by each batch alone


def test_the_check_changes_nothing_and_warns_again_after_a_recovery(caplog):
    losses = []
    for check_every in (1, 1000):
        model = make(Fast(ThreatModel("linf", 8.0), check_every=check_every)).train()
        torch.manual_seed(1)
        with EventStorage():
            losses.append(model(batch())["loss"])
    assert torch.equal(*losses)

    strategy = Fast(ThreatModel("linf", 8.0))
    strong, weak = torch.tensor([[1.0, 0.0]] * POOL), torch.tensor([[0.0, 1.0]] * POOL)
    labels = torch.zeros(POOL, dtype=torch.int64)
    with EventStorage():
        for several in (weak, weak, weak, strong, weak, weak):
            strategy._check_overfitting(torch.nn.Identity(), strong, several, labels)
    assert sum("catastrophic overfitting" in record.message for record in caplog.records) == 2


def test_without_a_random_start_it_goes_eps_along_the_gradient():
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 4 * 4, 5))
    images, labels = 0.3 + 0.4 * torch.rand(2, 3, 4, 4), torch.tensor([0, 3])
    found = Fast(ThreatModel("l2", 0.1), random_start=False).perturb(network, images, labels, 0.5)
    images.requires_grad_(True)
    (grad,) = torch.autograd.grad(F.cross_entropy(network(images), labels), images)
    expected = images + 0.1 * grad / grad.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    torch.testing.assert_close(found, expected.detach(), rtol=1e-5, atol=1e-6)


def test_a_resumed_check_has_the_images_it_had():
    strategy, other = Fast(L2), Fast(L2)
    logits, labels = torch.eye(2), torch.zeros(2, dtype=torch.int64)
    strategy._check_overfitting(torch.nn.Identity(), logits, -logits, labels)
    assert strategy.pooled == [2, 1, 1]
    other.load_state_dict(strategy.state_dict())
    assert other.pooled == [2, 1, 1]
    other.load_state_dict({"seen": 3, "suspicions": 1})  # of an older version
    assert (other.pooled, other.seen) == ([0, 0, 0], 3)


def test_free_recovers_from_an_overflow():
    model = make(Free(ThreatModel("l2", 1.0), replays=2)).train()
    model(batch())["loss"].backward()
    model.strategy.perturbation.grad[0, 0, 0, 0] = float("inf")
    model.strategy.perturbation.grad[1] = float("nan")
    loss = model(batch())["loss"]
    assert torch.isfinite(loss)
    assert torch.isfinite(model.strategy.perturbation).all()


@pytest.mark.parametrize(
    "build", [Adversarial, Trades, lambda attack: Fast(attack.threat_model, check_every=1)]
)
@pytest.mark.parametrize("is_folded", [True, False])
def test_an_attack_in_mixed_precision_takes_no_gradient_from_the_weights(build, is_folded, monkeypatch):
    """autocast keeps the weights that it has cast; those cast without gradients must not be used again."""
    if not is_folded:
        monkeypatch.setattr("rt_detectron.pretrain.model.fold", lambda classifier: classifier)
    attack = PGD(L2, steps=1, random_start=True)
    model, seen = make(build(attack)).train(), []
    losses = model.strategy.losses
    model.strategy.losses = lambda *inputs: seen.append(inputs[1:]) or losses(*inputs)
    with EventStorage(), torch.autocast("cpu", torch.bfloat16):
        found = sum(model(batch()).values())
    found.backward()
    reference = make().train().classifier
    with torch.autocast("cpu", torch.bfloat16):
        expected = sum(losses(reference, *seen[0]).values())
    expected.backward()
    assert torch.equal(found, expected)
    for (name, ours), theirs in zip(model.classifier.named_parameters(), reference.parameters(), strict=True):
        assert ours.grad is not None, name
        torch.testing.assert_close(ours.grad, theirs.grad, msg=name)


def test_the_attack_alone_in_half_precision():
    def step(dtype):
        model, seen = make(Adversarial(PGD(L2, steps=2))).train(), []
        model.attack_dtype = dtype
        perturb, losses = model.strategy.perturb, model.strategy.losses

        def attack(*inputs):
            seen.append(model.attacked.now()(inputs[1]).dtype)
            return perturb(*inputs)

        def loss(*inputs):
            seen.append(inputs)
            return losses(*inputs)

        model.strategy.perturb, model.strategy.losses = attack, loss
        found = sum(model(batch()).values())
        found.backward()
        return model, seen, found

    model, (dtype, (_, images, adversarial, labels)), found = step(torch.bfloat16)
    assert (dtype, adversarial.dtype, found.dtype) == (torch.bfloat16, torch.float32, torch.float32)
    reference = make().train().classifier
    expected = sum(Standard().losses(reference, images, adversarial, labels).values())
    expected.backward()
    assert torch.equal(found, expected)
    for ours, theirs in zip(model.classifier.parameters(), reference.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)
    _, (dtype, (_, _, exact, _)), _ = step(None)
    assert dtype == torch.float32
    moved, whole = (x - images for x in (adversarial, exact))
    assert torch.cosine_similarity(moved.flatten(), whole.flatten(), dim=0) > 0.95


@pytest.mark.parametrize("keywords", [{"best": True}, {"restarts": 2}, {"best": True, "restarts": 2}])
def test_trades_with_the_strongest_of_several(keywords):
    """Its labels are probabilities."""
    losses = make(Trades(PGD(L2, steps=2, random_start=True, **keywords))).train()(batch())
    assert losses["loss_robust"] > 0


def test_an_attack_leaves_the_classifier_in_train_mode():
    torch.manual_seed(0)
    model = Pretraining(
        Classifier("densenet", num_classes=3), Trades(PGD(L2, steps=1, random_start=True))
    ).train()
    model(batch())
    assert all(module.training for module in model.classifier.modules())


def test_images_grow_with_the_training():
    resolution = Resolution(start=16, until=0.5, multiple=8)
    assert [resolution.side(32, progress) for progress in (0.0, 0.1, 0.2, 0.3, 0.49, 0.5, 0.9)] == [
        *(16, 16, 24, 24, 32, 32, 32)
    ]
    assert resolution.side(12, 0.0) == 12  # smaller than the start
    images = torch.rand(2, 3, 32, 48)
    small = resolution(images, 0.0)
    expected = v2.functional.resize(images, [16, 24], antialias=True)
    torch.testing.assert_close(small, expected)
    assert resolution(images, 0.5) is images

    seen = []
    model = make(Free(ThreatModel("l2", 1.0), replays=2)).train()
    model.resolution = resolution
    model.classifier.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[2:]))
    for progress in (0.0, 0.2, 0.5):  # the perturbation that is kept has to follow
        model.progress = progress
        model(batch())["loss"].backward()
    assert seen == [(16, 16), (24, 24), (32, 32)]
    assert model.eval()(batch()).shape == (6, 3)
    assert seen[-1] == (32, 32)


def test_eps_grows_over_the_warm_up_and_is_then_all_of_it():
    schedule = EpsSchedule(warmup=0.5)
    assert [schedule(progress) for progress in (0.0, 0.25, 0.5, 0.9)] == [0.0, 0.5, 1.0, 1.0]
    assert EpsSchedule()(0.0) == 1.0
    later = EpsSchedule(clean=0.25, warmup=0.5)
    assert [later(progress) for progress in (0.0, 0.2, 0.5, 0.75, 0.9)] == [0.0, 0.0, 0.5, 1.0, 1.0]
    torch.manual_seed(0)
    drawn = [EpsSchedule(warmup=0.5, random=True)(0.25) for _ in range(200)]
    assert 0 <= min(drawn) < 0.05 < 0.45 < max(drawn) <= 0.5
    attack = Adversarial(PGD(ThreatModel("linf", 8.0), steps=2), schedule).attack_now(0.25)
    assert attack.threat_model.radius == pytest.approx(4 / 255)
    assert attack.step_size == pytest.approx(2.5 * 4 / 255 / 2)


@pytest.mark.parametrize("build", [lambda s: Adversarial(PGD(L2, steps=2), s), lambda s: Fast(L2, s)])
def test_attacked_images_grow_over_the_warm_up_each_with_all_of_eps(build):
    images, labels = batch()
    images = images.float() / 255
    schedule = EpsSchedule(clean=0.2, warmup=0.4, grows="images")
    classifier = make().classifier.eval()
    for progress, attacked in ((0.1, 0), (0.2, 0), (0.4, 3), (0.6, 6), (0.9, 6)):
        assert schedule.attacked(6, progress) == attacked
        strategy = build(schedule)
        torch.manual_seed(1)
        perturbed = strategy.perturb(classifier, images, labels, progress)
        torch.manual_seed(1)
        alone = strategy.attack(classifier, images[:attacked], labels[:attacked]) if attacked else images[:0]
        assert torch.equal(perturbed, torch.cat([alone, images[attacked:]]))
    assert (alone - images).flatten(1).norm(dim=1).min() > 0.5


def test_trades_takes_the_predictions_of_the_attacked_images_only():
    images, labels = batch()
    schedule = EpsSchedule(warmup=0.5, grows="images")
    model = make(Trades(PGD(L2, steps=1, random_start=True), schedule=schedule)).train()
    seen = []
    model.classifier.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    model.strategy.perturb(model.classifier, images / 255, labels, 0.25)
    assert seen == [3, 3]  # the predictions, and the attack's one step


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: EpsSchedule(warmup=2), "0 to 1"),
        (lambda: EpsSchedule(grows="img"), "grows is 'img'; it must be 'eps' or 'images'"),
        (lambda: Free(L2, schedule=EpsSchedule(grows="images")), "grows must be 'eps'"),
        (lambda: EpsSchedule("a"), "clean is 'a'"),
        (lambda: Resolution(start=0, until=0.5), "start is 0"),
        (lambda: Resolution(start=128, until=2), "until is 2"),
        (lambda: Resolution(start=128, until=0.5, multiple="8"), "multiple is '8'"),
        (lambda: Adversarial(None), "Adversarial: attack is None; it must be an attack, such as PGD"),
        (lambda: Fast("linf"), "it must be a ThreatModel"),
        (lambda: Free(None), "it must be a ThreatModel"),
        (lambda: Free(ThreatModel("l1", 3.0)), "l2 or linf"),
        (lambda: Free(L2, replays=True), "replays is True"),
        (lambda: Trades(PGD(L2, steps=1, random_start=True), beta="6"), "beta is '6'"),
        (lambda: Free(L2, replays=0), "replays is 0"),
        (lambda: Fast(L2, check_every=0), "check_every is 0"),
        (lambda: Trades(PGD(L2, steps=1)), "random_start=True"),
        (lambda: Trades(PGD(L2, steps=1, random_start=True), beta=-1), "beta is -1"),
    ],
)
def test_bad_input_is_one_line(build, message):
    with pytest.raises(InputError, match=message):
        build()


def two_patterns(images: int, seed: int):
    """Images of two classes: above a faint pattern, always right but within reach of the attacks; below a
    strong one, out of reach but right in 85 % of the images only."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(images) % 2
    sign = (2 * labels - 1).view(-1, 1, 1, 1)
    right = torch.where(torch.rand(images, 1, 1, 1, generator=generator) < 0.85, 1.0, -1.0)
    faint = torch.where(torch.rand(3, 8, 16, generator=torch.Generator().manual_seed(0)) < 0.5, -1.0, 1.0)
    pictures = torch.full((images, 3, 16, 16), 0.5)
    pictures[:, :, :8] += 2 / 255 * sign * faint
    pictures[:, :, 8:] += 0.1 * sign * right
    return pictures + 0.002 * torch.randn(pictures.shape, generator=generator), labels


def accuracies_after_training(strategy, ball: ThreatModel) -> list[float]:
    """Of a linear classifier on other images, clean and under an attack of its own."""
    build = lambda num_classes: torch.nn.Sequential(  # noqa: E731
        torch.nn.Flatten(), torch.nn.Linear(3 * 16 * 16, num_classes)
    )
    torch.manual_seed(0)
    architecture = replace(get_architecture("resnet18"), build=build, head="1.")
    model = Pretraining(Classifier(architecture, num_classes=2), strategy).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    with EventStorage():
        for step in range(60):
            optimizer.zero_grad()
            sum(model(two_patterns(32, step // strategy.replays)).values()).backward()
            optimizer.step()
    images, labels = two_patterns(200, seed=1000)
    adversarial = PGD(ball, steps=10)(model.classifier, images, labels)
    return [(model.classifier(x).argmax(1) == labels).float().mean().item() for x in (images, adversarial)]


@pytest.mark.parametrize(
    ("strategy", "ball"),
    [
        (lambda ball: Adversarial(PGD(ball, steps=2)), ThreatModel("l2", 0.5)),
        (Fast, ThreatModel("linf", 6.0)),
        (lambda ball: Free(ball, replays=2), ThreatModel("linf", 6.0)),
        (lambda ball: Trades(PGD(ball, steps=2, random_start=True)), ThreatModel("l2", 0.5)),
        (lambda ball: Adversarial(PGD(ball, steps=3)), ThreatModel("l1", 9.0)),
    ],
    ids=["pgd", "fast", "free", "trades", "l1"],
)
def test_each_learns_to_withstand_what_a_standard_network_does_not(strategy, ball):
    clean, attacked = accuracies_after_training(strategy(ball), ball)
    standard_clean, standard_attacked = accuracies_after_training(Standard(), ball)
    assert attacked > 0.75
    assert standard_attacked < 0.25
    assert clean < 0.9 < 0.95 < standard_clean  # the price: it does not use the faint pattern
