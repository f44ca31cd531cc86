import json
import math

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, balanced_accuracy_score, recall_score

from rt_detectron.transfer.evaluation import TransferEvaluator, accuracies


class Birds:
    """A test set as far as its evaluation looks at it."""

    classes = ("wren", "owl", "kite")
    metric = "mean_per_class"


@pytest.fixture
def drawn():
    """Labels of three classes that are not equally frequent, and predictions of which most are right."""
    rng = np.random.default_rng(0)
    labels = rng.choice(3, 200, p=[0.7, 0.2, 0.1])
    return labels, np.where(rng.random(200) < 0.3, 0, labels)


@pytest.mark.parametrize("metric", ["top1", "mean_per_class"])
def test_accuracies_are_those_of_scikit_learn(drawn, metric):
    labels, predicted = drawn
    found = accuracies(labels.tolist(), predicted.tolist(), Birds.classes, metric)
    expected = {
        "top1": 100 * accuracy_score(labels, predicted),
        "mean_per_class": 100 * balanced_accuracy_score(labels, predicted),
        **dict(
            zip(
                ("accuracy-wren", "accuracy-owl", "accuracy-kite"),
                100 * recall_score(labels, predicted, average=None),
                strict=True,
            )
        ),
    }
    assert found == pytest.approx(expected | {"accuracy": expected[metric]})
    assert abs(expected["top1"] - expected["mean_per_class"]) > 0.5  # else the two could be swapped


def test_a_class_without_test_images_has_no_accuracy_and_no_say():
    found = accuracies([0, 0, 2], [0, 1, 2], Birds.classes, "mean_per_class")
    assert math.isnan(found["accuracy-owl"])
    assert found["mean_per_class"] == 75


def test_predictions_are_written_in_the_order_of_the_images(tmp_path):
    evaluator = TransferEvaluator(Birds, str(tmp_path))
    logits = torch.eye(3)[[0, 2, 1, 1]]
    evaluator.process((None, torch.tensor([0, 1]), ("a.jpg", "b.jpg")), logits[:2])
    evaluator.process((None, torch.tensor([1, 2]), ("c.jpg", "d.jpg")), logits[2:])
    results = evaluator.evaluate()["accuracy"]
    assert (results["top1"], results["accuracy"]) == (50, 50)
    assert json.loads((tmp_path / "predictions.json").read_text()) == {
        "keys": ["a.jpg", "b.jpg", "c.jpg", "d.jpg"],
        "labels": [0, 1, 1, 2],
        "predicted": [0, 2, 1, 1],
    }
