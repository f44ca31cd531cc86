import re

import pytest

from rt_detectron.engine.lazy_config import build, read_lazy_config
from rt_detectron.utils.errors import InputError

CONFIG = "configs/pretrain/resnet18_l2_eps0_5_cifar10.py"


def read(*overrides):
    return read_lazy_config(CONFIG, list(overrides), ("train",), "configs/pretrain/")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.epochs=nan", "train.epochs is nan; it must be a finite number, as 30 is"),
        ("train.epochs=[]", "train.epochs is []; it must be a finite number"),
        (
            "dataloader.train.num_workers=true",
            "dataloader.train.num_workers is True; it must be a finite number",
        ),
        ("train.sync_bn=1", "train.sync_bn is 1; it must be true or false"),
        ("threat_model.norm=2", "threat_model.norm is 2; it must be a text, as 'l2' is"),
        ("model.classifier.arch=[]", "model.classifier.arch is []; it must be a text"),
        ("train.output_dir=''", "train.output_dir is ''; it must be the name of a folder"),
        ("train.device=gpu", "train.device is 'gpu'; it must be cpu, cuda or cuda:N"),
    ],
)
def test_values_of_another_type_are_named(override, words):
    with pytest.raises(InputError, match=re.escape(words)):
        read(override)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.py", "train = {}\nmodel = L(3)", "a.py, line 2: NameError: name 'L' is not defined)"),
        ("a.py", "train = {}\ntrain.seed.x = 3", "a.py, line 2: AttributeError: 'dict' object has no"),
        ("a.yaml", "3", "a.yaml: not a LazyConfig file ("),
        ("a.yaml", "[train]", "a.yaml: not for this tool, it lacks train"),
        ("a.yaml", "train: *nothing", "a.yaml: not a LazyConfig file (found undefined alias"),
        ("a.txt", "train: {}", "a.txt has to be a python or yaml file"),
    ],
)
def test_a_file_that_cannot_be_read_is_one_line(tmp_path, name, content, words):
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=re.escape(words)) as error:
        read_lazy_config(str(tmp_path / name), [], ("train",), "configs/pretrain/")
    assert "\n" not in str(error.value)


def test_what_recipes_allow_is_left_alone():
    cfg = read(
        "train.epochs=0.5", "evaluator.max_attacked=null", "train.amp=bf16", "optimizer.lr=1", "+train.new=x"
    )
    assert (cfg.train.epochs, cfg.evaluator.max_attacked, cfg.train.amp) == (0.5, None, "bf16")


def test_what_cannot_be_built_names_its_key():
    with pytest.raises(InputError, match=r"^cannot build threat_model .*: check threat_model in"):
        build({"_target_": "rt_detectron.attacks.ThreatModel", "nrom": "l2"}, "threat_model")
