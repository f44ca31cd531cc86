import pytest
from detectron2.evaluation import inference_on_dataset

from rt_detectron.attacks import PGD, ThreatModel
from rt_detectron.pretrain.evaluation import AccuracyEvaluator


def test_counts_equal_the_plain_loop(model_and_batches):
    model, batches = model_and_batches
    attack = PGD(ThreatModel("linf", 1.0), steps=1)
    results = inference_on_dataset(model, batches, AccuracyEvaluator(model, attack))["accuracy"]
    withstood = 0
    for images, labels in batches:
        withstood += (
            (model.classifier(attack(model.classifier, images, labels)).argmax(1) == labels).sum().item()
        )
    assert results["clean"] == 75.0
    assert results["pgd1"] == pytest.approx(100 * withstood / 20)
    assert results["pgd1"] < 75.0


def test_max_attacked_takes_the_first_images(model_and_batches):
    model, batches = model_and_batches
    harmless = PGD(ThreatModel("l2", 0.0), steps=1)
    results = inference_on_dataset(model, batches, AccuracyEvaluator(model, harmless, max_attacked=10))[
        "accuracy"
    ]
    assert results["images"] == 20
    assert results["attacked_images"] == 10
    assert results["pgd1"] == 50.0  # the first five are wrong, the next five right


def test_a_large_eps_leaves_nothing(model_and_batches):
    model, batches = model_and_batches
    attack = PGD(ThreatModel("l2", 10.0), steps=10)
    assert inference_on_dataset(model, batches, AccuracyEvaluator(model, attack))["accuracy"]["pgd10"] == 0.0
