"""Each extension of docs/architecture.md, made in as many files as it says."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from detectron2.config import LazyCall as L
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.modeling import BACKBONE_REGISTRY
from torch import nn
from torchvision import models

from rt_detectron import load_backbone, load_classifier
from rt_detectron.attacks import (
    PGD,
    DetectorAttack,
    LossAttack,
    ThreatModel,
    build_detector_attack,
    detection,
    register_attack,
    register_detector_attack,
    registry,
)
from rt_detectron.checkpoint.architectures import ARCHITECTURES, TORCHVISION, Architecture, Family
from rt_detectron.checkpoint.convert import convert_checkpoint
from rt_detectron.data import check_datasets
from rt_detectron.evaluation.robustness import (
    evaluate_robustness,
    evaluation,
    keys_help,
    robustness_evaluations,
    robustness_table,
)
from rt_detectron.evaluation.robustness.evaluation import Evaluation, Row, register_evaluation
from rt_detectron.evaluation.robustness.test_set import annotated_test_mapper
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


@pytest.fixture
def quick_cfg(learned, tmp_path):
    """The config of the tiny detector that learned its test set, with an output folder of its own."""
    cfg = learned[0].clone()
    cfg.defrost()
    cfg.OUTPUT_DIR = str(tmp_path)
    cfg.TEST.ATTACK.MAX_IMAGES = 2
    cfg.TEST.ATTACK.CHECK_IMAGES = 0
    return cfg


class TestDetectorAttack:
    """A class with a name: the config takes it, and results and the table call it by that name."""

    @pytest.fixture
    def brightest(self, monkeypatch):
        monkeypatch.setitem(detection.DETECTOR_ATTACKS, "brightest", None)  # so that it is removed again

        @register_detector_attack
        class Brightest(DetectorAttack):
            """Makes every pixel as bright as the threat model allows."""

            name = "brightest"

            def __call__(self, model, inputs):
                change = 255 * self.pgd.threat_model.radius
                return [{**each, "image": (each["image"] + change).clamp(0, 255)} for each in inputs]

        return Brightest

    def test_it_is_evaluated_by_its_name(self, learned, quick_cfg, brightest):
        quick_cfg.TEST.ATTACK.LINF_EPS = (8,)
        quick_cfg.TEST.ATTACK.LOSSES = ("brightest", "all")
        quick_cfg.TEST.ATTACK.STEPS = 1
        quick_cfg.TEST.PICTURES = 1
        content = evaluate_robustness(quick_cfg, learned[1])
        assert [entry["loss"] for entry in content["attack"]] == ["brightest", "all", "worst"]
        assert content["pictures"][0]["file"].startswith("robustness/measured/attack-linf-8-brightest-")
        (line,) = [
            line
            for line in robustness_table(content).splitlines()
            if line.startswith("Linf eps 8, brightest")
        ]
        ap = content["attack"][0]["metrics"]["bbox"]["AP"]
        assert line.split()[:5] == ["Linf", "eps", "8,", "brightest", "2"]
        assert f"{ap:.2f}" in line

    def test_another_objective_is_a_class_with_its_terms(self, learned, monkeypatch):
        monkeypatch.setitem(detection.DETECTOR_ATTACKS, "proposals", None)

        @register_detector_attack
        class Proposals(LossAttack):
            name, terms = "proposals", ("rpn",)

        cfg, model = learned
        mapper = annotated_test_mapper(cfg)
        images = [mapper(image) for image in DatasetCatalog.get(cfg.DATASETS.TEST[0])[:1]]
        attack = build_detector_attack("proposals", PGD(ThreatModel("linf", 4), steps=1))
        (attacked,) = attack(model, images)
        assert (attacked["image"] - images[0]["image"]).abs().max() == pytest.approx(4, abs=1e-3)
        other = build_detector_attack("all", attack.pgd)(model, images)[0]
        assert not torch.equal(attacked["image"], other["image"])


class TestEvaluation:
    """A registered class: results, table and --help have it, and the config asks for it by its keys."""

    @pytest.fixture
    def rotation(self, monkeypatch):
        monkeypatch.setitem(evaluation.EVALUATIONS, "rotation", None)

        @register_evaluation
        class Rotation(Evaluation):
            name = "rotation"
            keys: ClassVar[dict[str, str]] = {"TEST.ROTATION True": "AP on images turned upside down"}

            def __init__(self, requested):
                self.requested = requested

            @classmethod
            def from_config(cls, cfg):
                return cls(cfg.TEST.ROTATION)

            @property
            def is_requested(self):
                return self.requested

            def measure(self, session):
                if not self.requested:
                    return None
                images = session.images()
                clean = session.clean(images)
                turned = session.measure("rotation", images, clean=clean, perturb=turn, change="turned")
                return {"images": len(images.dicts), "metrics": turned.metrics}

            @staticmethod
            def rows(results):
                if results:
                    yield Row("turned", results["images"], results["metrics"])

        def turn(model, inputs):
            return [{**each, "image": each["image"].flip((1, 2))} for each in inputs]

    def test_it_is_in_results_table_and_help(self, learned, quick_cfg, rotation):
        quick_cfg.TEST.ROTATION = True
        content = evaluate_robustness(quick_cfg, learned[1])
        found = content["rotation"]["metrics"]["bbox"]["AP"]
        assert found < content["clean"]["metrics"]["bbox"]["AP"]
        assert list(content)[:6] == ["clean", "attack", "corruption", "natural", "rotation", "pictures"]
        lines = robustness_table(content).splitlines()
        assert lines[-1].split()[:3] == ["turned", "6", f"{found:.2f}"]
        assert "TEST.ROTATION True" in keys_help()

    def test_it_is_named_where_nothing_is_requested(self, quick_cfg, rotation):
        quick_cfg.TEST.ROTATION = False
        with pytest.raises(InputError, match=r"nothing to evaluate: set .* or TEST\.ROTATION True"):
            robustness_evaluations(quick_cfg)


class TestDataset:
    """A detection set of one's own is registered as with Detectron2 alone, and derived sets come with it."""

    @pytest.fixture
    def own(self, tiny_datasets):
        folder = tiny_datasets / "demo" / "detection"
        name = "my_own_set"
        annotations = folder / "annotations" / "instances_val.json"
        register_coco_instances(name, {}, str(annotations), str(folder / "val"))
        yield name
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)

    def test_it_is_evaluated(self, learned, quick_cfg, own):
        check_datasets([own])
        quick_cfg.DATASETS.TEST = (own,)
        quick_cfg.TEST.CORRUPTION.NAMES = ("contrast",)
        quick_cfg.TEST.CORRUPTION.SEVERITIES = (1,)
        content = evaluate_robustness(quick_cfg, learned[1])
        assert content["datasets"][0]["name"] == own
        assert content["clean"]["images"] == content["corruption"]["images"] == 4
