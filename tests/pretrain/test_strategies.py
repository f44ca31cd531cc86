import torch
import torch.nn.functional as F

from rt_detectron.attacks import PGD, ThreatModel
from rt_detectron.checkpoint.architectures import IMAGENET_MEAN, IMAGENET_STD, build_classifier
from rt_detectron.modeling.classifier import Classifier
from rt_detectron.pretrain.strategies import Pretraining


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
    names = Classifier("resnet18", num_classes=5).state_dict()
    assert set(names) == {f"network.{name}" for name in build_classifier("resnet18", 5).state_dict()}


def make(attack=None):
    torch.manual_seed(0)
    return Pretraining(Classifier("resnet18", num_classes=3), attack)


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
    attack = PGD(ThreatModel("l2", 1.0), steps=2)
    loss = make(attack).train()((images, labels))["loss"]
    reference = make().train()
    adversarial = attack(reference.classifier, images.float() / 255, labels)
    assert torch.allclose(loss, F.cross_entropy(reference.classifier(adversarial), labels))
    assert loss > make().train()((images, labels))["loss"]


def test_eval_mode_gives_the_clean_logits():
    images, labels = batch()
    model = make(PGD(ThreatModel("l2", 1.0), steps=2)).eval()
    assert torch.equal(model((images, labels)), model.classifier(images.float() / 255))
