import re
from pathlib import Path

import pytest
import torch
from detectron2.config import LazyConfig, instantiate

from rt_detectron.pretrain.recipe import load_pretrain_config
from rt_detectron.pretrain.strategies import Free, Standard
from rt_detectron.utils.errors import InputError

RECIPES = sorted(Path("configs/pretrain").glob("*.py"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_shipped_recipes_load_build_and_can_be_saved(path, tmp_path):
    cfg = load_pretrain_config(str(path), [])
    assert cfg.model.classifier.arch in path.stem or "demo" in path.stem
    cfg.model.classifier.num_classes = 2
    with torch.device("meta"):
        model = instantiate(cfg.model)
    threat_model = model.strategy.threat_model
    if threat_model is not None and "demo" not in path.stem:
        assert f"{threat_model.norm}_eps{threat_model.eps:g}".replace(".", "_") in path.stem
    assert (threat_model is None) == ("eps0" in path.stem.replace("eps0_5", "") or "standard" in path.stem)
    scheduler = instantiate(cfg.lr_multiplier)
    assert scheduler(1.0) < scheduler(0.5) <= 1
    LazyConfig.save(cfg, str(tmp_path / "config.yaml"))  # what a training leaves to resume with
    saved = load_pretrain_config(str(tmp_path / "config.yaml"), [])
    assert saved.train == cfg.train
    assert instantiate(saved.dataloader.train.dataset.transform).transforms


def test_overrides_apply():
    cfg = load_pretrain_config(
        "configs/pretrain/resnet50_l2_eps3.py", ["threat_model.eps=0.5", "train.epochs=2"]
    )
    assert cfg.model.strategy.attack.threat_model.eps == 0.5
    assert cfg.evaluator.attack.threat_model.eps == 0.5
    assert cfg.train.epochs == 2


def test_overrides_reach_into_lists():
    first = "dataloader.train.dataset.transform.transforms.0"
    cfg = load_pretrain_config("configs/pretrain/resnet50_l2_eps3.py", [f"{first}.size=100"])
    assert cfg.dataloader.train.dataset.transform.transforms[0].size == 100
    with pytest.raises(InputError, match="unknown configuration key"):
        load_pretrain_config("configs/pretrain/resnet50_l2_eps3.py", [f"{first[:-1]}9.size=100"])


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
        ("configs/pretrain/resnet50_l2_eps3.py", ["train.epochs=[1"], "train.epochs=\\[1: "),
        ("configs/robust_r50_eps3.yaml", [], "lacks model, dataloader"),
        ("", [], "no such file"),
    ],
)
def test_bad_input_is_one_line(path, overrides, words):
    with pytest.raises(InputError, match=words) as error:
        load_pretrain_config(path, overrides)
    assert "\n" not in str(error.value)


def documented_overrides() -> list[str]:
    """Those between backticks and in commands of the guide, except for paths and what stands for one."""
    text = Path("docs/pretrain-imagenet.md").read_text()
    return sorted(set(re.findall(r"\b(?:model|train|dataloader|threat_model)[.\w]+=[\w.]+(?![\w/:])", text)))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_take_the_overrides_that_the_guide_names(path):
    strategy = load_pretrain_config(str(path), []).model.strategy
    overrides = documented_overrides()
    assert "model.strategy.schedule.clean=0.3" in overrides
    assert "train.cudnn_benchmark=true" in overrides
    if strategy._target_ is Standard:
        overrides = [override for override in overrides if ".schedule." not in override]
    if strategy._target_ is Free:
        overrides.remove("model.strategy.schedule.grows=images")
    for override in overrides:
        cfg = load_pretrain_config(str(path), ["train.device=cpu", override])
        instantiate(cfg.model.strategy)


def test_the_imagenet_loader_takes_the_keys_that_the_guide_names():
    keys = [
        "batch_transform=null",
        "prefetch_factor=4",
        "dataset.transform.transforms.0.scaled_decoding=false",
    ]
    cfg = load_pretrain_config(
        "configs/pretrain/resnet50_l2_eps3.py", [f"dataloader.train.{key}" for key in keys]
    )
    assert cfg.dataloader.train.batch_transform is None
    assert cfg.dataloader.train.device == cfg.train.device
    assert not instantiate(cfg.dataloader.train.dataset.transform).transforms[0].scaled_decoding
    cfg = load_pretrain_config("configs/pretrain/resnet50_l2_eps3.py", [])
    assert instantiate(cfg.dataloader.train.batch_transform).jitter == [0.1, 0.1, 0.1]
    small = load_pretrain_config("configs/pretrain/resnet18_l2_eps0_5_cifar10.py", [])
    assert small.dataloader.train.batch_transform is None  # CIFAR-10 has no colour noise


def test_a_file_with_a_syntax_error_is_one_line(tmp_path):
    (tmp_path / "broken.py").write_text("train = dict(\n")
    with pytest.raises(InputError, match=r"broken.py: not a LazyConfig file") as error:
        load_pretrain_config(str(tmp_path / "broken.py"), [])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("gpu", "device", "warnings"), [(False, "cpu", 1), (True, "cuda", 0)])
def test_without_a_gpu_the_cpu_serves(monkeypatch, caplog, gpu, device, warnings):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    cfg = load_pretrain_config("configs/pretrain/demo_l2.py", ["train.amp=bf16"])
    assert (cfg.train.device, cfg.train.amp) == (device, "bf16")
    assert len([line for line in caplog.messages if "No GPU found" in line]) == warnings


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.amp=true", "train.amp is True; it must be bf16, fp16 or null"),
        ("train.amp=fp16", "train.amp=fp16 is for GPUs"),
        ("train.attack_amp=fp16", "train.attack_amp=fp16 is for GPUs"),
        ("train.compile=fast", "train.compile is 'fast'; it must be null or a backend of torch.compile"),
        ("train.seed=-1", "train.seed is -1; it must be a whole number >= 0"),
        ("train.epochs=many", "train.epochs is 'many'; it must be a finite number"),
        ("train.accumulate=0", "train.accumulate is 0; it must be a whole number > 0"),
        ("train.ema=1", "train.ema is 1; it must be a number from 0"),
        ("train.sync_bn=1", "train.sync_bn is 1; it must be true or false"),
    ],
)
def test_values_that_make_no_sense_are_one_line(override, words):
    with pytest.raises(InputError, match=words):
        load_pretrain_config("configs/pretrain/demo_l2.py", ["train.device=cpu", override])


@pytest.mark.parametrize("key", ["strategy", "resolution"])
@pytest.mark.parametrize("value", ["abc", "0"])
def test_a_value_in_place_of_an_object_is_one_line(key, value):
    cfg = load_pretrain_config("configs/pretrain/demo_l2.py", [f"model.{key}={value}"])
    with torch.device("meta"), pytest.raises(InputError, match=rf"model\.{key} is .*; it must be"):
        instantiate(cfg.model)
