import pytest
import torch
from detectron2.config import instantiate

from rt_detectron.transfer.recipe import load_transfer_config
from rt_detectron.utils.errors import InputError


@pytest.mark.parametrize("method", ["fixed_feature", "full_network"])
def test_the_shipped_recipes_are_the_publications(method):
    cfg = load_transfer_config(f"configs/transfer/{method}.py", ["weights=resnet18_l2_eps3"])
    assert (cfg.train.epochs, cfg.dataloader.total_batch_size) == (150, 64)
    optimizer = cfg.optimizer
    assert optimizer._target_ in (torch.optim.SGD, "torch.optim.sgd.SGD", "torch.optim.SGD")
    assert (optimizer.lr, optimizer.momentum, optimizer.weight_decay) == (0.01, 0.9, 5e-4)
    schedule = instantiate(cfg.lr_multiplier)
    epochs = (0, 49, 50, 99, 100, 149)
    assert [schedule(epoch / 150) for epoch in epochs] == [1.0, 1.0, 0.1, 0.1, 0.01, 0.01]
    resize, crop = instantiate(cfg.dataset.test_transform).transforms
    assert (resize.size, crop.size) == ([256], (224, 224))
    if method == "full_network":
        crop, _ = instantiate(cfg.dataset.train_transform).transforms
        assert crop.size == (224, 224)


def test_sizes_follow_from_two_keys():
    overrides = ["weights=x.pth", "dataset.image_size=32", "dataset.resize=36", "arch=resnet18"]
    cfg = load_transfer_config("configs/transfer/full_network.py", overrides)
    assert instantiate(cfg.dataset.train_transform).transforms[0].size == (32, 32)
    resize, crop = instantiate(cfg.dataset.test_transform).transforms
    assert (resize.size, crop.size) == ([36], (32, 32))
    assert (cfg.transfer.weights, cfg.transfer.arch) == ("x.pth", "resnet18")


@pytest.mark.parametrize(
    ("method", "override", "words"),
    [
        ("full_network", "weights=''", "no weights: add weights=NAME"),
        ("full_network", "optimizer.lr=0", "optimizer.lr is 0; it must be a number > 0"),
        ("full_network", "optimizer.lr=.inf", "optimizer.lr is"),
        ("full_network", "train.epochs=0", "train.epochs is 0"),
        ("full_network", "train.amp=fp16", "train.amp=fp16 is for GPUs"),
        ("full_network", "dataset.image_size=-1", "dataset.image_size is -1; it must be a whole number > 0"),
        ("full_network", "dataset.held_out=1", "dataset.held_out is 1; it must be true or false"),
        ("full_network", "dataset.nam=pets", "unknown configuration key 'dataset.nam'"),
        ("full_network", "head.solver=sgd", "unknown configuration key 'head.solver'"),
        ("full_network", "transfer.method=half", "transfer.method is 'half'; it must be fixed_feature or"),
        (
            "full_network",
            "transfer.method=fixed_feature",
            "needs --config-file configs/transfer/fixed",
        ),
        ("fixed_feature", "transfer.method=last_layer", "needs --config-file configs/transfer/full_network"),
        ("fixed_feature", "head.solver=svm", "head.solver is 'svm'; it must be sgd or logistic_regression"),
        ("fixed_feature", "head.C=[1,0]", "it must be a list of numbers > 0"),
        ("fixed_feature", "features.amp=bf16", "features.amp is 'bf16'; it must be fp16 or null"),
        ("fixed_feature", "dataloader.total_batch_size=0", "dataloader.total_batch_size is 0"),
    ],
)
def test_values_that_make_no_sense_are_one_line(method, override, words):
    with pytest.raises(InputError, match=r"^[^\n]+$") as error:
        load_transfer_config(f"configs/transfer/{method}.py", ["weights=x.pth", "train.device=cpu", override])
    assert words in str(error.value)
