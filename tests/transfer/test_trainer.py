import json
import shutil

import pytest
import torch
import torch.nn.functional as F
from detectron2.config import LazyConfig

from rt_detectron.checkpoint.architectures import build_classifier
from rt_detectron.data.loader import TrainLoader
from rt_detectron.layers.small_maps import SmallMapConv2d
from rt_detectron.modeling.load import load_classifier
from rt_detectron.pretrain.trainer import ClassifierTrainer
from rt_detectron.transfer.head import HeadTrainer, fresh_linear
from rt_detectron.transfer.trainer import build_datasets, do_transfer, is_finished
from rt_detectron.utils.errors import InputError


def results(cfg, file="results.json"):
    with open(f"{cfg.train.output_dir}/{file}") as opened:
        return json.load(opened)


def checkpoint(cfg):
    return torch.load(f"{cfg.train.output_dir}/model_final.pth", weights_only=True)


def predict(cfg):
    """What the exported classifier says of the test images."""
    classifier = load_classifier(f"{cfg.train.output_dir}/classifier.pth")
    _, test = build_datasets(cfg)
    images = torch.stack([test[i][0] for i in range(len(test))]).float() / 255
    with torch.no_grad():
        return classifier(images).argmax(1).tolist()


@pytest.mark.parametrize(("method", "epochs"), [("fixed_feature", 60), ("full_network", 6)])
def test_a_transfer_learns_and_says_what_it_did(method, epochs, make_cfg, classifier_file):
    cfg = make_cfg(method, f"train.epochs={epochs}", "train.seed=3", "train.export=true")
    do_transfer(cfg)
    found = results(cfg)
    with open(f"{cfg.train.output_dir}/metrics.json") as file:
        lines = [json.loads(line) for line in file]
    assert found["metrics"]["accuracy"]["accuracy"] == found["metrics"]["accuracy"]["top1"]
    if method == "fixed_feature":  # a full network needs more steps until its batch norms have settled
        assert found["metrics"]["accuracy"]["top1"] > 80
        assert lines[-2]["total_loss"] < lines[0]["total_loss"] / 2
    assert {"mean_per_class", "accuracy-0", "accuracy-1"} < set(found["metrics"]["accuracy"])
    assert (found["iterations"], found["seed"]) == (epochs * 4, 3)  # 64 images in batches of 16
    assert found["weights"] == classifier_file
    assert {key: found["source"][key] for key in ("arch", "norm", "eps")} == {
        "arch": "shufflenet",
        "norm": "l2",
        "eps": 3.0,
    }
    (dataset,) = found["datasets"]
    assert (dataset["name"], dataset["images"], dataset["metric"]) == ("folder", 40, "top1")
    predictions = results(cfg, "predictions.json")
    _, test = build_datasets(cfg)
    assert (predictions["keys"], predictions["labels"]) == (test.keys, test.labels)
    right = sum(a == b for a, b in zip(predictions["labels"], predictions["predicted"], strict=True))
    assert 100 * right / 40 == pytest.approx(found["metrics"]["accuracy"]["top1"])
    assert predict(cfg) == predictions["predicted"]
    assert (lines[0]["lr"], lines[-2]["lr"]) == pytest.approx((1e-2, 1e-4))


def test_a_fixed_network_stays_as_it_is_and_a_full_one_does_not(make_cfg, classifier_file):
    before = torch.load(classifier_file, weights_only=True)
    for method, stays in (("fixed_feature", True), ("full_network", False)):
        cfg = make_cfg(method, "train.epochs=1", "train.export=true")
        do_transfer(cfg)
        after = torch.load(f"{cfg.train.output_dir}/classifier.pth", weights_only=True)["model"]
        for name in ("conv1.0.weight", "conv5.1.running_var"):
            assert torch.equal(before[name], after[name]) == stays, name
        shutil.rmtree(cfg.train.output_dir)


def test_the_last_layer_alone_trains_with_batch_norm_in_train_mode(make_cfg, classifier_file):
    """Against a plain loop."""
    cfg = make_cfg("full_network", "transfer.method=last_layer", "train.epochs=3", "train.export=true")
    do_transfer(cfg)
    found = torch.load(f"{cfg.train.output_dir}/classifier.pth", weights_only=True)["model"]

    train, _ = build_datasets(cfg)
    classifier = load_classifier(classifier_file, num_classes=2).train()
    before = {name: tensor.clone() for name, tensor in classifier.network.state_dict().items()}
    layer = fresh_linear(classifier.network.fc, cfg.train.seed)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
    batches = TrainLoader(train, 16, num_workers=0, seed=cfg.train.seed).batches()
    for step, (images, labels, _) in zip(range(12), batches, strict=False):
        optimizer.param_groups[0]["lr"] = 0.01 * 0.1 ** (step // 4)
        optimizer.zero_grad()
        F.cross_entropy(classifier(images / 255), labels).backward()
        optimizer.step()
    for name, expected in classifier.network.state_dict().items():
        torch.testing.assert_close(found[name], expected, rtol=1e-4, atol=1e-5)
        moves = name.startswith("fc.") or "running_" in name or name.endswith("tracked")
        assert torch.equal(found[name], before[name]) != moves, name
    assert predict(cfg) == results(cfg, "predictions.json")["predicted"]


def test_names_that_are_no_utf8_do_no_harm(make_cfg, digit_folders, tmp_path):
    root = tmp_path / "caf\udce9"
    shutil.copytree(digit_folders, root)
    for split in ("train", "val"):
        (root / split / "0").rename(root / split / "\udcff")
    cfg = make_cfg("fixed_feature", "train.epochs=1")
    cfg.dataset.root = str(root)
    do_transfer(cfg)
    assert results(cfg)["metrics"]["accuracy"]["accuracy-\\xff"] is not None
    assert "val/\\xff/" in results(cfg, "predictions.json")["keys"][-1]


def test_a_grid_costs_one_pass(make_cfg, no_forward_pass):
    do_transfer(make_cfg("fixed_feature", "train.epochs=1"))
    no_forward_pass()
    for override in ("optimizer.lr=0.001", "train.seed=1", "head.solver=logistic_regression"):
        do_transfer(make_cfg("fixed_feature", "train.epochs=1", override))
    assert results(make_cfg("fixed_feature"))["C"] > 0


def test_held_out_images_are_training_images(make_cfg):
    cfg = make_cfg("fixed_feature", "train.epochs=1", "dataset.held_out=true")
    do_transfer(cfg)
    train, _ = build_datasets(make_cfg("fixed_feature"))
    assert set(results(cfg, "predictions.json")["keys"]) < set(train.keys)
    assert results(cfg)["datasets"][0]["images"] == round(0.2 * len(train))


@pytest.mark.parametrize(
    ("method", "trainer"), [("fixed_feature", HeadTrainer), ("full_network", ClassifierTrainer)]
)
def test_an_interrupted_transfer_goes_on_bit_by_bit(method, trainer, make_cfg, tmp_path, monkeypatch):
    epochs = "train.epochs=3"
    whole = make_cfg(method, epochs, f"train.output_dir={tmp_path}/whole")
    (tmp_path / "whole").mkdir()
    do_transfer(whole)
    cfg = make_cfg(method, epochs)
    run_step, steps = trainer.run_step, []

    def interrupted(self):
        steps.append(self.iter)
        if len(steps) == (3 if method == "fixed_feature" else 6):
            raise KeyboardInterrupt
        run_step(self)

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "run_step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            do_transfer(cfg)
    assert not is_finished(cfg, resume=True)
    with pytest.raises(InputError, match="holds a training: add --resume"):
        is_finished(cfg, resume=False)
    do_transfer(cfg, resume=True)
    expected, found = checkpoint(whole)["model"], checkpoint(cfg)["model"]
    for name, tensor in expected.items():
        assert torch.equal(tensor, found[name]), name
    assert results(whole)["config_sha256"] == results(cfg)["config_sha256"]
    assert results(whole, "predictions.json") == results(cfg, "predictions.json")


def test_a_finished_transfer_is_not_run_again(make_cfg, tmp_path):
    cfg = make_cfg("fixed_feature", "train.epochs=1")
    do_transfer(cfg)
    assert is_finished(cfg, resume=True)
    with pytest.raises(InputError, match="holds results: add --resume"):
        is_finished(cfg, resume=False)
    with pytest.raises(InputError, match="the results of another configuration"):
        is_finished(make_cfg("fixed_feature", "train.epochs=1", "optimizer.lr=0.001"), resume=True)
    (tmp_path / "out" / "results.json").write_text("{")
    with pytest.raises(InputError, match="the results of another configuration"):
        is_finished(cfg, resume=True)


def test_a_backbone_is_transferred_too(make_cfg, backbone_file):
    do_transfer(make_cfg("fixed_feature", f"weights={backbone_file}", "train.epochs=1"))


def test_a_diverging_transfer_stops_with_one_line(make_cfg):
    with pytest.raises(InputError, match=r"the loss is not finite .*a smaller optimizer\.lr"):
        do_transfer(make_cfg("fixed_feature", "optimizer.lr=1e30"))


def test_unfit_input_is_one_line(make_cfg, tmp_path, digit_folders):
    torch.save(build_classifier("mnasnet", 5).state_dict(), tmp_path / "mnasnet.pth")
    shutil.copytree(digit_folders, tmp_path / "digits")
    shutil.rmtree(tmp_path / "digits" / "val" / "1")
    for override, words in (
        ("weights=resnet18_l2_eps33", "the zoo has no resnet18_l2_eps33"),
        ("weights=nowhere.pth", "cannot read nowhere.pth"),
        (f"weights={tmp_path}/mnasnet.pth", "do not fit resnet18"),
        (f"dataset.root={tmp_path}/nowhere", "datasets/README.md"),
        (f"dataset.root={tmp_path}/digits", "'1'"),
        ("dataset.name=peds", "did you mean pets?"),
        ("dataset.classes=[7]", "no class 7"),
        ("dataloader.total_batch_size=65", "exceeds the 64 training images"),
    ):
        overrides = [override, "arch=resnet18"] if "mnasnet" in override else [override]
        with pytest.raises(InputError, match=r"^[^\n]+$") as error:
            do_transfer(make_cfg("fixed_feature", *overrides))
        assert words in str(error.value)


def test_the_configuration_is_written_with_the_weights(make_cfg):
    cfg = make_cfg("full_network")
    LazyConfig.save(cfg, f"{cfg.train.output_dir}/config.yaml")
    saved = LazyConfig.load(f"{cfg.train.output_dir}/config.yaml")
    assert saved.transfer.weights == cfg.transfer.weights


def test_a_full_network_trains_with_the_fast_kernels_of_cpus(make_cfg, monkeypatch):
    seen = []
    monkeypatch.setattr(
        "rt_detectron.transfer.trainer.train_classifier", lambda _, model, *__, **___: seen.append(model)
    )
    do_transfer(make_cfg("full_network"))
    kinds = {type(module) for module in seen[0].modules() if isinstance(module, torch.nn.Conv2d)}
    assert kinds == {SmallMapConv2d}
