"""What docs/architecture.md says of adding things, done once each."""

import pytest
import torch
from detectron2.modeling import BACKBONE_REGISTRY
from torchvision import models

from rt_detectron import load_backbone, load_classifier
from rt_detectron.checkpoint.architectures import ARCHITECTURES, TORCHVISION, Architecture, Family
from rt_detectron.checkpoint.convert import convert_checkpoint
from rt_detectron.modeling.backbone.fpn import register_pyramids
from rt_detectron.modeling.backbone.torchvision import build_robust_torchvision_backbone


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
