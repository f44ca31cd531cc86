import json

import pytest
import torch
from detectron2.config import LazyConfig

from rt_detectron.checkpoint.architectures import build_classifier
from rt_detectron.errors import InputError
from rt_detectron.pretrain.trainer import build_model, do_eval, do_train, load_config


def metrics(cfg):
    with open(f"{cfg.train.output_dir}/metrics.json") as file:
        return [json.loads(line) for line in file]


def classifier_file(cfg):
    return torch.load(f"{cfg.train.output_dir}/classifier.pth", weights_only=True)


def test_training_learns_and_writes_what_the_next_tool_needs(digits_cfg):
    digits_cfg.train.epochs = 6
    digits_cfg.train.log_period = 2
    do_train(digits_cfg)
    log = metrics(digits_cfg)
    assert log[-1]["accuracy/clean"] >= 90
    assert log[-1]["accuracy/pgd2"] <= log[-1]["accuracy/clean"]
    assert log[-1]["total_loss"] < log[0]["total_loss"]
    saved = classifier_file(digits_cfg)
    build_classifier("resnet18", 2).load_state_dict(saved["model"])  # torchvision's names, all of them
    assert saved["rt_detectron"] == {
        "arch": "resnet18",
        "norm": "l2",
        "eps": 0.5,
        "input_format": "RGB",
        "pixel_mean": [123.675, 116.28, 103.53],
        "pixel_std": [58.395, 57.12, 57.375],
        "stride_in_1x1": False,
        "source": "rt_detectron pretraining",
    }


def test_standard_training_says_eps_0(digits_cfg):
    digits_cfg.model.attack = None
    digits_cfg.train.epochs = 0.25
    do_train(digits_cfg)
    assert classifier_file(digits_cfg)["rt_detectron"]["norm"] is None
    assert classifier_file(digits_cfg)["rt_detectron"]["eps"] == 0.0


def test_the_seed_decides_the_outcome(digits_cfg, tmp_path):
    outcomes = []
    for run, seed in enumerate((1, 1, 2)):
        torch.manual_seed(seed)  # what default_setup does with train.seed
        digits_cfg.train.update(epochs=0.5, seed=seed, output_dir=str(tmp_path / f"run{run}"))
        do_train(digits_cfg)
        outcomes.append(classifier_file(digits_cfg)["model"]["fc.weight"])
    assert torch.equal(outcomes[0], outcomes[1])
    assert not torch.equal(outcomes[0], outcomes[2])


def test_resume_goes_on_where_it_stopped(digits_cfg):
    digits_cfg.train.update(epochs=2, checkpoint_epochs=0.5)

    def stop_at(cfg, iteration):
        from detectron2.engine import SimpleTrainer

        original = SimpleTrainer.run_step

        def run_step(self):
            if self.iter == iteration:
                raise KeyboardInterrupt
            original(self)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(SimpleTrainer, "run_step", run_step)
            with pytest.raises(KeyboardInterrupt):
                do_train(cfg)

    stop_at(digits_cfg, 5)
    do_train(digits_cfg, resume=True)
    iterations = [line["iteration"] for line in metrics(digits_cfg)]
    assert iterations[-1] == 7
    state = torch.load(f"{digits_cfg.train.output_dir}/model_final.pth", weights_only=True)
    # 8 iterations in all, momentum and schedule carried over: a fresh start would have counted 4 or 12.
    assert state["iteration"] == 7
    assert state["model"]["network.bn1.num_batches_tracked"] == 8


def test_resume_after_the_end_writes_the_classifier_again(digits_cfg):
    digits_cfg.train.epochs = 0.5
    do_train(digits_cfg)
    first = classifier_file(digits_cfg)["model"]["fc.weight"]
    do_train(digits_cfg, resume=True)
    assert torch.equal(classifier_file(digits_cfg)["model"]["fc.weight"], first)


def test_shards_train_too(digits_cfg, digit_shards):
    small = LazyConfig.load("configs/pretrain/common/small.py").dataloader
    for split, samples in (("train", 64), ("test", 40)):
        digits_cfg.dataloader[split].dataset = small[split].dataset
        digits_cfg.dataloader[split].dataset.transform = digits_cfg.dataloader.test.dataset.transform
        digits_cfg.dataloader[split].dataset.num_samples = samples
        digits_cfg.dataloader[split].dataset.num_classes = 2
    digits_cfg.dataloader.train.dataset.urls = f"{digit_shards}/train-*.tar"
    digits_cfg.dataloader.test.dataset.urls = f"{digit_shards}/val-*.tar"
    digits_cfg.train.epochs = 0.5
    do_train(digits_cfg)
    assert metrics(digits_cfg)[-1]["accuracy/images"] == 40


def test_evaluation_alone(digits_cfg):
    results = do_eval(digits_cfg, build_model(digits_cfg))["accuracy"]
    assert set(results) == {"clean", "pgd2", "images", "attacked_images"}


class TestLoadConfig:
    def test_overrides_apply(self):
        cfg = load_config("configs/pretrain/resnet50_l2_eps3.py", ["threat_model.eps=0.5", "train.epochs=2"])
        assert cfg.model.attack.threat_model.eps == 0.5
        assert cfg.evaluator.attack.threat_model.eps == 0.5
        assert cfg.train.epochs == 2

    @pytest.mark.parametrize(
        ("path", "overrides", "words"),
        [
            ("configs/nowhere.py", [], "no such file"),
            (
                "configs/pretrain/resnet50_l2_eps3.py",
                ["train.epoch=2"],
                "unknown configuration key 'train.epoch'",
            ),
            ("configs/pretrain/resnet50_l2_eps3.py", ["train.epochs"], "not of the form key=value"),
        ],
    )
    def test_bad_input_is_one_line(self, path, overrides, words):
        with pytest.raises(InputError, match=words):
            load_config(path, overrides)
