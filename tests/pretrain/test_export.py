import pickle

import pytest
import torch
import yaml
from detectron2.config import LazyCall as L
from detectron2.modeling import BACKBONE_REGISTRY

from rt_detectron.checkpoint.architectures import ARCHITECTURES, get_architecture
from rt_detectron.modeling.classifier import Classifier
from rt_detectron.pretrain.export import model_card
from rt_detectron.pretrain.model import Pretraining
from rt_detectron.pretrain.strategies import Standard
from rt_detectron.pretrain.trainer import do_train
from rt_detectron.utils.files import file_sha256


def test_a_training_leaves_a_backbone_and_a_card_about_it(digits_cfg):
    digits_cfg.train.update(epochs=0.5, ema=0.9)
    do_train(digits_cfg)
    folder = digits_cfg.train.output_dir
    with open(f"{folder}/backbone.pkl", "rb") as file:
        metadata = pickle.load(file)["rt_detectron"]
    assert (metadata["arch"], metadata["norm"], metadata["eps"]) == ("resnet18", "l2", 0.5)
    with open(f"{folder}/model_card.md") as file:
        card = file.read()
    assert "resnet18 with 2 classes, trained against l2 eps 0.5 (strategy Adversarial)" in card
    assert "| 40 |\n| pgd2, l2 eps 0.5 | " in card
    assert "| 20 |" in card
    for name in ("classifier.pth", "backbone.pkl"):
        assert f"| `{name}` | `{file_sha256(f'{folder}/{name}')}` |" in card
    assert "0.5 epochs in batches of 16, seed 0, weights averaged with decay 0.9" in card
    assert "| torch | " in card
    config = yaml.unsafe_load(card.split("```yaml\n")[-1].split("```")[0])
    assert config["train"] == dict(digits_cfg.train)


def test_the_card_of_a_standard_training(digits_cfg):
    digits_cfg.model.strategy = L(Standard)()
    digits_cfg.train.epochs = 0.25
    do_train(digits_cfg)
    with open(f"{digits_cfg.train.output_dir}/model_card.md") as file:
        assert "trained without an adversary" in file.read()


@pytest.mark.parametrize("arch", [*ARCHITECTURES, "timm/convnext_atto"])
def test_the_card_names_the_builder_of_every_network(arch, digits_cfg):
    with torch.device("meta"):
        model = Pretraining(Classifier(arch, num_classes=2), Standard())
    card = model_card(digits_cfg, model, {}, [])
    expected = get_architecture(arch).builder("fpn")
    assert f"NAME: {expected}\n" in card
    assert expected in BACKBONE_REGISTRY
    assert f"ARCH: {arch}\n" in card
