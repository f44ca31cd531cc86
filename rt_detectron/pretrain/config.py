"""Pretraining recipes: LazyConfig files under configs/pretrain."""

import logging
import os

import torch
from detectron2.config import LazyConfig
from detectron2.utils import comm
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from rt_detectron.errors import InputError, one_line

logger = logging.getLogger(__name__)

KEYS = ("model", "dataloader", "optimizer", "lr_multiplier", "evaluator", "train")  # of a recipe


def load_config(path: str, overrides: list[str]):
    """The LazyConfig at ``path`` with ``key=value`` overrides.

    Where there is no GPU, train.device becomes "cpu", with a warning.

    Raises:
        InputError: for a missing or broken file, an unknown key, an override that cannot be parsed, or a
            value of ``train`` that makes no sense.
    """
    if not os.path.isfile(path):
        raise InputError(
            f"--config-file {path or '(none)'}: no such file; configs/pretrain/ holds the recipes"
        )
    try:
        cfg = LazyConfig.load(path)
    except (SyntaxError, ImportError, AssertionError, YAMLError) as error:
        raise InputError(f"--config-file {path}: not a LazyConfig file ({one_line(error)[:200]})") from None
    missing = [key for key in KEYS if key not in cfg]
    if missing:
        raise InputError(
            f"--config-file {path}: no pretraining recipe, it lacks {', '.join(missing)}; "
            "configs/pretrain/ holds the recipes"
        )
    for override in overrides:
        key, equals, _ = override.partition("=")
        if not equals:
            raise InputError(f"{override!r} is not of the form key=value, e.g. train.epochs=10")
        if not _has_key(cfg, key):
            raise InputError(f"unknown configuration key {key!r}; {path} shows the keys")
    try:
        cfg = LazyConfig.apply_overrides(cfg, overrides)
    except (HydraException, OmegaConfBaseException) as error:
        raise InputError(f"{' '.join(overrides)}: {one_line(error)[:200]}") from None
    if cfg.train.device == "cuda" and not torch.cuda.is_available():
        if comm.is_main_process():
            logger.warning("No GPU found: running on the CPU (train.device=cpu)")
        cfg.train.device = "cpu"
    _check(cfg.train)
    return cfg


def _check(train) -> None:
    whole, number = (lambda x: type(x) is int), (lambda x: type(x) in (int, float))
    rules = {
        "seed": (lambda x: whole(x) and x >= 0, "a whole number >= 0"),
        "epochs": (lambda x: number(x) and x > 0, "a number > 0"),
        "eval_epochs": (lambda x: number(x) and x > 0, "a number > 0"),
        "checkpoint_epochs": (lambda x: number(x) and x > 0, "a number > 0"),
        "log_period": (lambda x: whole(x) and x > 0, "a whole number > 0"),
        "accumulate": (lambda x: whole(x) and x > 0, "a whole number > 0"),
        "ema": (lambda x: number(x) and 0 <= x < 1, "a number from 0 (none) to below 1"),
        "amp": (lambda x: x in (None, "bf16", "fp16"), "bf16, fp16 or null"),
        "sync_bn": (lambda x: type(x) is bool, "true or false"),
    }
    for key, (is_right, expected) in rules.items():
        if not is_right(train[key]):
            raise InputError(f"train.{key} is {train[key]!r}; it must be {expected}")
    if train.amp == "fp16" and torch.device(train.device).type == "cpu":
        raise InputError("train.amp=fp16 is for GPUs: on the CPU use bf16 or null")


def _has_key(cfg, key: str) -> bool:
    for part in key.split("."):
        if OmegaConf.is_list(cfg) and part.isdigit() and int(part) < len(cfg):
            cfg = cfg[int(part)]
        elif OmegaConf.is_dict(cfg) and part in cfg:
            cfg = cfg[part]
        else:
            return False
    return True
