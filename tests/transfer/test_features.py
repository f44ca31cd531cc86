import copy
import os
import threading
import time

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2 as T

from rt_detectron.checkpoint.architectures import get_architecture
from rt_detectron.modeling.classifier import Classifier
from rt_detectron.modeling.load import load_classifier
from rt_detectron.transfer.datasets import classification_dataset
from rt_detectron.transfer.features import compute_features
from rt_detectron.utils.arrays import write_arrays
from rt_detectron.utils.errors import InputError

MEAN = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
STD = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)


@pytest.fixture
def photographs(photograph, tmp_path):
    """``photographs()``: two training images of 64 pixels, one of each of two classes, anew from disk."""
    for split in ("train", "test"):
        for i in range(2):
            path = tmp_path / "set" / split / str(i) / "photo.png"
            path.parent.mkdir(parents=True)
            Image.fromarray(photograph[:, :64, 60 * i : 60 * i + 64].permute(1, 2, 0).numpy()).save(path)

    def dataset(size=64):
        return classification_dataset("folder", "train", str(tmp_path / "set"), transform=T.CenterCrop(size))

    return dataset


def compute(classifier, dataset, **options):
    return compute_features(classifier, dataset, num_workers=0, **options)


@pytest.mark.parametrize(
    "arch",
    ["resnet18", "densenet", "mnasnet", "mobilenet", "shufflenet", "vgg16_bn"],
)
def test_features_are_what_enters_the_last_layer_of_torchvisions_network(
    arch, random_classifier, photographs
):
    network = random_classifier(arch)
    classifier = Classifier("resnet18", 5)
    classifier.architecture = get_architecture(arch)
    classifier.network = copy.deepcopy(network).to(memory_format=torch.channels_last)
    linears = [module for module in network.modules() if isinstance(module, torch.nn.Linear)]
    entered = []
    linears[-1].register_forward_pre_hook(lambda _, inputs: entered.append(inputs[0]))
    dataset = photographs()
    images = torch.stack([dataset[i][0] for i in range(2)]) / 255
    with torch.no_grad():
        for view in (images, images.flip(3)):
            network((view - MEAN) / STD)
    found = compute(classifier, dataset, flip=True)
    for view, expected in zip(found.views, entered, strict=True):
        torch.testing.assert_close(view, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
    assert found.labels.tolist() == [0, 1]
    assert found.keys == dataset.keys
    # The layer is back in its place.
    assert classifier(images).shape == (2, 5)


def test_the_cache_is_hit_by_the_same_and_missed_by_anything_else(
    classifier_file, photographs, cache, tmp_path, monkeypatch
):
    passes = []
    forward = "rt_detectron.transfer.features.FeatureExtractor.forward"
    monkeypatch.setattr(forward, lambda self, batch: passes.append(1) or torch.ones(len(batch[1]), 1, 4))
    classifier = load_classifier(classifier_file, num_classes=2)

    def is_computed(**options):
        before = len(passes)
        compute(options.pop("classifier", classifier), options.pop("dataset", photographs()), **options)
        return len(passes) > before

    assert is_computed()
    assert not is_computed()
    assert not is_computed(classifier=load_classifier(classifier_file, num_classes=7))  # another last layer
    assert is_computed(flip=True)
    assert is_computed(dataset=photographs(32))
    with torch.no_grad():
        classifier.network.conv5[1].running_mean[0] += 1
    assert is_computed()
    classifier.pixel_std = [1.0, 1.0, 1.0]
    assert is_computed()
    assert not is_computed()
    photo = tmp_path / "set" / "train" / "0" / "photo.png"
    os.utime(photo, (1, 1))  # as if it had been replaced by one of the same size
    assert is_computed()
    photo.rename(photo.with_name("picture.png"))
    assert is_computed()
    assert len(list(cache.glob("*.npz"))) == len(passes)


def test_who_comes_second_waits_for_the_first(classifier_file, photographs, cache, monkeypatch):
    classifiers = [load_classifier(classifier_file, num_classes=2) for _ in range(2)]
    passes, inside = [], threading.Event()

    def forward(self, batch):
        passes.append(1)
        inside.set()
        time.sleep(0.5)
        return torch.ones(len(batch[1]), 1, 4)

    monkeypatch.setattr("rt_detectron.transfer.features.FeatureExtractor.forward", forward)
    first = threading.Thread(target=compute, args=(classifiers[0], photographs()))
    first.start()
    assert inside.wait(30)
    found = compute(classifiers[1], photographs())
    first.join()
    assert len(passes) == 1
    assert found.views.shape == (1, 2, 4)


def test_a_damaged_cache_is_one_line(classifier_file, photographs, cache):
    classifier = load_classifier(classifier_file, num_classes=2)
    compute(classifier, photographs())
    (path,) = cache.glob("*.npz")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"is damaged .*delete it"):
        compute(classifier, photographs())


def test_a_cache_without_all_arrays_is_one_line(classifier_file, photographs, cache):
    classifier = load_classifier(classifier_file, num_classes=2)
    compute(classifier, photographs())
    (path,) = cache.glob("*.npz")
    write_arrays(path, {"features": np.zeros((2, 1, 4), np.float16)})
    with pytest.raises(InputError, match=r"is damaged \(no 'labels'\): delete it"):
        compute(classifier, photographs())


def test_a_cache_that_cannot_be_written_is_one_line(classifier_file, photographs, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("RT_DETECTRON_CACHE", str(tmp_path / "file"))
    with pytest.raises(InputError, match="set RT_DETECTRON_CACHE to a folder that can be written"):
        compute(load_classifier(classifier_file, num_classes=2), photographs())


def test_features_that_are_not_finite_are_not_kept(classifier_file, photographs, cache):
    classifier = load_classifier(classifier_file, num_classes=2)
    with torch.no_grad():
        classifier.network.conv5[1].bias.fill_(np.inf)
    with pytest.raises(InputError, match="the features are not finite"):
        compute(classifier, photographs())
    assert not list(cache.glob("*.npz"))
