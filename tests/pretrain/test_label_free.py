import copy

import pytest
import torch
from detectron2.config import LazyCall as L
from torch import nn

from rt_detectron import load_classifier
from rt_detectron.attacks import PGD, ThreatModel
from rt_detectron.attacks.autoattack import AutoAttack
from rt_detectron.checkpoint.convert import convert_checkpoint, read_network
from rt_detectron.modeling.classifier import Classifier
from rt_detectron.pretrain.label_free import LabelFree
from rt_detectron.pretrain.model import Pretraining
from rt_detectron.pretrain.schedules import EpsSchedule
from rt_detectron.pretrain.trainer import ClassifierTrainer, build_model, do_train
from rt_detectron.utils.errors import InputError

L2 = ThreatModel("l2", 1.0)


@pytest.fixture
def label_free_cfg(digits_cfg, tmp_path, random_classifier):
    """Starts from a ResNet-18 for five classes; the digits are of two."""
    path = str(tmp_path / "original.pth")
    torch.save(random_classifier("resnet18").state_dict(), path)
    attack = L(PGD)(threat_model="${threat_model}", steps=1, random_start=True)
    digits_cfg.model.strategy = L(LabelFree)(attack=attack)
    digits_cfg.train.init_checkpoint = path
    digits_cfg.train.epochs = 1
    digits_cfg.optimizer.lr = 0.002
    return digits_cfg


def trained(cfg) -> dict:
    return torch.load(f"{cfg.train.output_dir}/classifier.pth", weights_only=True)["model"]


def features_of(classifier: Classifier) -> nn.Module:
    """The reference: the network with its last layer cut off."""
    model = copy.deepcopy(classifier).eval()
    model.network.fc = nn.Identity()
    return model


def test_attack_and_loss_are_those_of_a_plain_loop():
    torch.manual_seed(0)
    classifier = Classifier("resnet18", num_classes=3)
    original = features_of(classifier)
    strategy = LabelFree(PGD(L2, steps=3, random_start=True), EpsSchedule(warmup=1.0, grows="images"))
    strategy.begin(classifier, has_head=True)
    with torch.no_grad():  # the training has gone on
        for weight in classifier.parameters():
            weight.add_(0.02 * torch.randn_like(weight) * weight.std(correction=0))
    network = features_of(classifier)
    images = torch.rand(4, 3, 32, 32)
    torch.manual_seed(1)
    model = Pretraining(classifier, strategy).train()
    model.progress = 0.5  # half of the images are attacked
    found = model((images, torch.zeros(4, dtype=torch.long)))

    target = original(images).detach()
    torch.manual_seed(1)
    attacked = images[:2] + L2.random_start(images[:2])
    attacked = attacked.clamp(0, 1)
    for _ in range(3):
        attacked.requires_grad_(True)
        (network(attacked) - target[:2]).square().sum().backward()
        step = attacked.grad / attacked.grad.flatten(1).norm(dim=1).view(-1, 1, 1, 1) * (2.5 / 3)
        moved = attacked.detach() + step - images[:2]
        norms = moved.flatten(1).norm(dim=1).clamp(min=1).view(-1, 1, 1, 1)
        attacked = (images[:2] + moved / norms).clamp(0, 1)
    expected = (network.train()(torch.cat([attacked, images[2:]])) - target).square().sum(1).mean()
    assert set(found) == {"loss_features"}
    assert torch.allclose(found["loss_features"], expected, rtol=1e-3)


def test_an_attack_in_half_precision_does_not_round_the_target():
    torch.manual_seed(0)
    classifier = Classifier("resnet18", num_classes=3)
    original = copy.deepcopy(classifier).eval()
    strategy = LabelFree(PGD(L2, steps=1, random_start=True))
    strategy.begin(classifier, has_head=True)
    model = Pretraining(classifier, strategy).train()
    model.attack_dtype = torch.bfloat16
    images, labels = torch.rand(4, 3, 32, 32), torch.zeros(4, dtype=torch.long)
    model((images, labels))
    with torch.no_grad():
        same = strategy.losses(original, images, images, labels)
    assert float(same["loss_features"]) < 1e-6


def test_features_withstand_the_attack_and_eps_0_does_not_bring_that(label_free_cfg):
    label_free_cfg.train.epochs = 3
    original = features_of(load_classifier(label_free_cfg.train.init_checkpoint))
    images = torch.rand(16, 3, 16, 16, generator=torch.Generator().manual_seed(0))

    def moved_by_an_attack(eps: float) -> float:
        """How far an attack gets from the original's clean features after a training with ``eps``."""
        label_free_cfg.threat_model.eps = eps
        label_free_cfg.train.output_dir += f"-{eps}"
        do_train(label_free_cfg)
        path = f"{label_free_cfg.train.output_dir}/classifier.pth"
        network = features_of(load_classifier(path, num_classes=2))
        clean = original(images).detach()
        attack = PGD(L2, steps=5, random_start=True)
        torch.manual_seed(0)
        adversarial = attack(network, images, clean, loss=lambda x, y: (x - y).square().sum(1))
        return (network(adversarial) - clean).square().sum(1).mean().item()

    assert moved_by_an_attack(1.0) < 0.8 * moved_by_an_attack(0.0)


def test_a_head_that_was_not_trained_is_left_out(label_free_cfg, tmp_path, caplog):
    label_free_cfg.train.epochs = 0.25
    with caplog.at_level("INFO", "rt_detectron"):
        do_train(label_free_cfg)
    assert "has 5 classes: the last linear layer, fc, starts afresh with 2 classes" in caplog.text
    assert not [name for name in trained(label_free_cfg) if name.startswith("fc.")]
    with open(f"{label_free_cfg.train.output_dir}/model_card.md") as card:
        assert "not evaluated: the last linear layer was not trained" in card.read()
    with pytest.raises(InputError, match="without the classifier's last layer"):
        load_classifier(f"{label_free_cfg.train.output_dir}/classifier.pth")

    # A backbone's file serves as well as a classifier's.
    first = trained(label_free_cfg)
    label_free_cfg.train.init_checkpoint = str(tmp_path / "original.pkl")
    convert_checkpoint(str(tmp_path / "original.pth"), label_free_cfg.train.init_checkpoint)
    label_free_cfg.train.output_dir += "-again"
    do_train(label_free_cfg)
    for name, tensor in trained(label_free_cfg).items():
        if not name.endswith("num_batches_tracked"):
            assert torch.allclose(tensor, first[name], atol=1e-5), name


def test_the_originals_head_is_kept(label_free_cfg):
    original = load_classifier(label_free_cfg.train.init_checkpoint, num_classes=2)
    torch.save(original.network.state_dict(), label_free_cfg.train.init_checkpoint)
    label_free_cfg.train.epochs = 0.5
    label_free_cfg.optimizer.weight_decay = 0.1
    do_train(label_free_cfg)
    found = trained(label_free_cfg)
    assert torch.equal(found["fc.weight"], original.network.fc.weight)
    assert not torch.equal(found["conv1.weight"], original.network.conv1.weight)


def test_a_resumed_training_knows_the_original(label_free_cfg, tmp_path, monkeypatch):
    do_train(label_free_cfg)
    expected = trained(label_free_cfg)
    label_free_cfg.train.update(output_dir=str(tmp_path / "resumed"), checkpoint_epochs=0.5)
    run_step = ClassifierTrainer.run_step

    def stop_at_2(self):
        if self.iter == 2:
            raise KeyboardInterrupt
        run_step(self)

    with monkeypatch.context() as patch:
        patch.setattr(ClassifierTrainer, "run_step", stop_at_2)
        with pytest.raises(KeyboardInterrupt):
            do_train(label_free_cfg)
    (tmp_path / "original.pth").unlink()  # it is in the checkpoint
    do_train(label_free_cfg, resume=True)
    found = trained(label_free_cfg)
    assert list(found) == list(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_what_it_needs_is_one_line(label_free_cfg):
    label_free_cfg.train.init_checkpoint = ""
    with pytest.raises(InputError, match=r"LabelFree keeps a network's features: set train.init_checkpoint"):
        do_train(label_free_cfg)
    label_free_cfg.model.strategy.attack.random_start = False
    with pytest.raises(InputError, match="random_start=True"):
        build_model(label_free_cfg)
    with pytest.raises(InputError, match="must be a PGD"):
        LabelFree(AutoAttack(L2))


def test_metadata_say_what_it_withstands(label_free_cfg):
    label_free_cfg.train.epochs = 0.25
    do_train(label_free_cfg)
    metadata = read_network(f"{label_free_cfg.train.output_dir}/backbone.pkl").metadata
    assert (metadata.norm, metadata.eps) == ("l2", 0.5)
