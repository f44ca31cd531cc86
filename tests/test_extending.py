"""Each extension of docs/architecture.md, made in as many files as it says."""

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from detectron2.config import LazyCall as L
from detectron2.modeling import BACKBONE_REGISTRY
from torch import nn
from torchvision import models

from rt_detectron import load_backbone, load_classifier
from rt_detectron.attacks import PGD, ThreatModel, register_attack, registry
from rt_detectron.checkpoint.architectures import ARCHITECTURES, TORCHVISION, Architecture, Family
from rt_detectron.checkpoint.convert import convert_checkpoint
from rt_detectron.modeling.backbone.fpn import register_pyramids
from rt_detectron.modeling.backbone.torchvision import build_robust_torchvision_backbone
from rt_detectron.pretrain.evaluation import evaluate_classifier
from rt_detectron.pretrain.export import write_classifier
from rt_detectron.pretrain.schedules import EpsSchedule
from rt_detectron.pretrain.strategies import Adversarial, Standard
from rt_detectron.pretrain.trainer import build_model, do_train
from rt_detectron.utils.errors import InputError
from rt_detectron.utils.modes import eval_mode


class TestBackbone:
    """A network of a known family is an entry of the table; a new family is that and a builder."""

    @pytest.fixture
    def network(self):
        torch.manual_seed(0)
        return models.efficientnet_b0(num_classes=3).eval()

    def architecture(self, family: Family) -> Architecture:
        blocks = {"stem": 1, "res2": 2, "res3": 3, "res4": 5, "res5": 8}
        return Architecture(
            "efficientnet",
            family,
            lambda num_classes: models.efficientnet_b0(num_classes=num_classes),
            stem="features.0.0",
            head="classifier.",
            taps={stage: f"features.{block}" for stage, block in blocks.items()},
        )

    def check(self, network, folder):
        torch.save(network.state_dict(), folder / "efficientnet.pth")
        convert_checkpoint(str(folder / "efficientnet.pth"), str(folder / "efficientnet.pkl"))
        images = torch.rand(1, 3, 64, 96)
        backbone = load_backbone(str(folder / "efficientnet.pkl")).eval()
        assert backbone.metadata.arch == "efficientnet"
        with torch.no_grad():
            expected = network.features(images)
            torch.testing.assert_close(backbone(images)["res5"], expected, rtol=1e-4, atol=1e-5)
        pyramid = load_backbone(str(folder / "efficientnet.pkl"), detector="fpn").eval()
        assert {name: feature.shape[3] for name, feature in pyramid(images).items()} == {
            "p2": 24,
            "p3": 12,
            "p4": 6,
            "p5": 3,
            "p6": 2,
        }
        retinanet = load_backbone(str(folder / "efficientnet.pkl"), detector="retinanet")
        assert list(retinanet.output_shape()) == ["p3", "p4", "p5", "p6", "p7"]
        classifier = load_classifier(str(folder / "efficientnet.pth"))
        assert (classifier.arch, classifier.num_classes) == ("efficientnet", 3)

    def test_a_network_of_a_known_family(self, network, tmp_path, monkeypatch):
        monkeypatch.setitem(ARCHITECTURES, "efficientnet", self.architecture(TORCHVISION))
        self.check(network, tmp_path)

    def test_a_new_family(self, network, tmp_path, monkeypatch):
        def build_robust_toy_backbone(cfg, input_shape):
            made.append(cfg.MODEL.ROBUST.ARCH)
            return build_robust_torchvision_backbone(cfg, input_shape)

        made: list[str] = []
        toy = Family("toy", "toy", lambda architecture, names: {name: f"trunk.{name}" for name in names})
        architecture = self.architecture(toy)
        # The toy's builder is torchvision's, which would send this network to its own family.
        monkeypatch.setattr(Architecture, "check_family", lambda *_: None)
        monkeypatch.setitem(ARCHITECTURES, "efficientnet", architecture)
        monkeypatch.setattr(BACKBONE_REGISTRY, "_obj_map", dict(BACKBONE_REGISTRY._obj_map))
        BACKBONE_REGISTRY.register(build_robust_toy_backbone)
        register_pyramids(build_robust_toy_backbone, "a toy")
        self.check(network, tmp_path)
        assert made == ["efficientnet"] * 3


class Blackout:
    """Attacks by turning the lights off, as far as eps allows; it knows no ``threat_model``."""

    name = "blackout"

    def __call__(self, model, images, labels):
        return (images - 0.5).clamp(0, 1)


@dataclass(frozen=True)
class SignGradient:
    """FGSM (Goodfellow et al. 2015): what a new file in rt_detectron/attacks would hold."""

    threat_model: ThreatModel

    name = "fgsm"
    gradient_based = True

    def __call__(self, model, images, labels):
        images = images.detach().requires_grad_(True)
        with eval_mode(model), torch.enable_grad():
            (grad,) = torch.autograd.grad(F.cross_entropy(model(images), labels), images)
        return (images + self.threat_model.step(grad, self.threat_model.radius)).clamp(0, 1).detach()


class TestClassifierAttack:
    """One file: the attack's own, with one decorator."""

    @pytest.fixture(autouse=True)
    def registered(self, monkeypatch):
        monkeypatch.setattr(registry, "_ATTACKS", dict(registry._ATTACKS))

        @register_attack("fgsm", "fgsm")
        def sign_gradient(threat_model, seed):
            return SignGradient(threat_model)

        @register_attack("blackout", "blackout")
        def blackout(threat_model, seed):
            return Blackout()

    def test_it_is_evaluated_by_its_name(self, digits_cfg, tmp_path):
        path = str(tmp_path / "classifier.pth")
        torch.manual_seed(0)
        write_classifier(build_model(digits_cfg), path)
        (tmp_path / "out").mkdir()
        found = evaluate_classifier(digits_cfg, path, ["fgsm", "blackout", "pgd1"], images=20)
        assert list(found["accuracy"]) == ["clean", "fgsm", "blackout", "pgd1", "worst case"]
        assert found["gradient_based"] == ["fgsm", "pgd1"]
        assert "| blackout | " in (tmp_path / "out" / "evaluation.md").read_text()

    def test_it_is_trained_against(self, digits_cfg, tmp_path):
        digits_cfg.train.epochs = 0.5
        threat_model = digits_cfg.model.strategy.attack.threat_model
        digits_cfg.model.strategy = L(Adversarial)(attack=L(SignGradient)(threat_model=threat_model))
        digits_cfg.evaluator.attack = L(Blackout)()
        do_train(digits_cfg)
        card = (tmp_path / "out" / "model_card.md").read_text()
        assert "trained against l2 eps 0.5 (strategy Adversarial)" in card
        assert "\n| blackout | " in card

    def test_without_a_threat_model_the_weights_say_that_eps_is_unknown(self, digits_cfg, tmp_path):
        digits_cfg.train.epochs = 0.5
        digits_cfg.model.strategy = L(Adversarial)(attack=L(Blackout)())
        do_train(digits_cfg)
        assert "trained against blackout" in (tmp_path / "out" / "model_card.md").read_text()
        metadata = torch.load(tmp_path / "out" / "classifier.pth", weights_only=True)["rt_detectron"]
        assert (metadata["norm"], metadata["eps"]) == (None, None)

    def test_it_follows_a_schedule_if_it_has_a_threat_model(self):
        warmup = EpsSchedule(warmup=0.5)
        weaker = Adversarial(SignGradient(ThreatModel("l2", 1.0)), warmup).attack_now(0.25)
        assert weaker.threat_model.radius == 0.5
        with pytest.raises(InputError, match="changes eps, but blackout has no threat_model to scale"):
            Adversarial(Blackout(), warmup)
        growing = Adversarial(Blackout(), EpsSchedule(warmup=0.5, grows="images"))  # eps stays
        images = torch.ones(4, 3, 2, 2)
        attacked = growing.perturb(nn.Identity(), images, torch.zeros(4), progress=0.25)
        assert attacked.mean((1, 2, 3)).tolist() == [0.5, 0.5, 1.0, 1.0]


class Mixed(Standard):
    """Half of the loss on clean images, half on attacked ones (Goodfellow et al. 2015, equation 2)."""

    def __init__(self, attack: PGD):
        self.attack = attack
        self.threat_model = attack.threat_model

    def perturb(self, model, images, labels, progress):
        return self.attack(model, images, labels)

    def losses(self, classifier, images, adversarial, labels):
        return {
            "loss_clean": F.cross_entropy(classifier(images), labels) / 2,
            "loss_adversarial": F.cross_entropy(classifier(adversarial), labels) / 2,
        }


class TestStrategy:
    """One file: the strategy's own, which a recipe names."""

    def test_it_trains_by_a_recipe(self, digits_cfg, tmp_path):
        digits_cfg.train.update(epochs=0.5, log_period=1)
        digits_cfg.model.strategy = L(Mixed)(attack=digits_cfg.model.strategy.attack)
        do_train(digits_cfg)
        assert "loss_adversarial" in (tmp_path / "out" / "metrics.json").read_text()
        assert "(strategy Mixed)" in (tmp_path / "out" / "model_card.md").read_text()
        digits_cfg.train.epochs = 1
        do_train(digits_cfg, resume=True)
