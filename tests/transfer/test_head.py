import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from detectron2.utils.events import EventStorage
from sklearn.linear_model import LogisticRegression

from rt_detectron.transfer.features import Features
from rt_detectron.transfer.head import HeadTrainer, fit_logistic_regression, fresh_linear
from rt_detectron.utils.errors import InputError
from rt_detectron.utils.seeds import seeded_generator


def drawn(classes: int, images: int = 150, views: int = 2) -> Features:
    """Features of 8 dimensions, about a centre for each class."""
    generator = torch.Generator().manual_seed(classes)
    labels = torch.arange(images) % classes
    centres = torch.randn(classes, 8, generator=generator)
    noise = torch.randn(views, images, 8, generator=generator)
    return Features(centres[labels] + noise, labels, [str(i) for i in range(images)])


def trained(features: Features, epochs: int, **optimizer) -> torch.nn.Linear:
    head = fresh_linear(torch.nn.Linear(8, 3), seed=5)
    sgd = torch.optim.SGD(head.parameters(), **optimizer)
    HeadTrainer(head, features, sgd, batch_size=32, seed=5).train(0, epochs)
    return head


def test_training_is_the_plain_loop():
    features = drawn(3)
    options = {"lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4}
    head = trained(features, 4, **options)

    torch.manual_seed(5)
    expected = torch.nn.Linear(8, 3)
    optimizer = torch.optim.SGD(expected.parameters(), **options)
    for epoch in range(4):
        generator = seeded_generator(5, epoch)
        order = torch.randperm(150, generator=generator)
        view = torch.randint(2, (150,), generator=generator)
        for start in range(0, 128, 32):  # 22 images are left out
            batch = order[start : start + 32]
            images = torch.stack([features.views[view[place], image] for place, image in enumerate(order)])
            loss = F.cross_entropy(expected(images[start : start + 32]), features.labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    torch.testing.assert_close(head.weight, expected.weight)
    torch.testing.assert_close(head.bias, expected.bias)


def test_both_views_are_seen_and_the_seed_decides():
    features = drawn(3)
    mirrored = Features(features.views.flip(0), features.labels, features.keys)
    first, again, other = (trained(found, 1, lr=0.1) for found in (features, features, mirrored))
    assert torch.equal(first.weight, again.weight)
    assert not torch.equal(first.weight, other.weight)


def test_a_diverged_training_says_so():
    features = drawn(3)
    features.views *= 1e30
    head = torch.nn.Linear(8, 3)
    trainer = HeadTrainer(head, features, torch.optim.SGD(head.parameters(), lr=1e30), 32, 0)
    with EventStorage():
        trainer.run_step()
    assert trainer.has_diverged()


def test_too_few_images_for_a_batch():
    head = torch.nn.Linear(8, 3)
    with pytest.raises(InputError, match="total_batch_size 64 exceeds the 9 training images"):
        HeadTrainer(head, drawn(3, 9), torch.optim.SGD(head.parameters()), 64, 0)


@pytest.mark.parametrize("classes", [2, 3])
def test_logistic_regression_is_scikit_learns(classes):
    features = drawn(classes)
    x, y = features.views[0], features.labels
    head = torch.nn.Linear(8, classes)
    c, iterations = fit_logistic_regression(head, x, y, [0.1], "accuracy", seed=0)
    expected = LogisticRegression(C=0.1, max_iter=1000).fit(x.numpy(), y.numpy())
    assert (c, iterations) == (0.1, expected.n_iter_.max())
    with torch.no_grad():
        found = head(x).softmax(1)
    np.testing.assert_allclose(found, expected.predict_proba(x.numpy()), atol=1e-5)


def test_the_penalty_is_chosen_by_held_out_images():
    features = drawn(3, 300)
    noise = torch.randn(300, 200, generator=torch.Generator().manual_seed(0))
    x = torch.cat([features.views[0], noise], 1)  # learnt by heart if nothing keeps the weights small
    head = torch.nn.Linear(208, 3)
    chosen, _ = fit_logistic_regression(head, x, features.labels, [1e-9, 0.01, 1e4], "accuracy", seed=0)
    assert chosen == 0.01


def test_classes_that_cannot_be_fitted_are_named():
    features = drawn(3)
    few = torch.cat([features.labels[:-1] % 2, torch.tensor([2])])
    with pytest.raises(InputError, match=r"cannot choose head\.C: .*give a single one"):
        fit_logistic_regression(torch.nn.Linear(8, 3), features.views[0], few, [0.1, 1.0], "accuracy", 0)
    with pytest.raises(InputError, match="1 classes have no training images"):
        fit_logistic_regression(
            torch.nn.Linear(8, 4), features.views[0], features.labels, [1.0], "accuracy", 0
        )


def test_a_missing_scikit_learn_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.linear_model", None)
    with pytest.raises(InputError, match='pip install "scikit-learn'):
        fit_logistic_regression(
            torch.nn.Linear(8, 3), torch.zeros(1, 8), torch.zeros(1), [1.0], "accuracy", 0
        )
