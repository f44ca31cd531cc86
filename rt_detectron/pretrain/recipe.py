"""Pretraining recipes: LazyConfig files under configs/pretrain."""

import torch

from rt_detectron.engine.lazy_config import read_lazy_config
from rt_detectron.utils.errors import InputError

KEYS = ("model", "dataloader", "optimizer", "lr_multiplier", "evaluator", "train")  # of a recipe


def load_pretrain_config(path: str, overrides: list[str]):
    """The recipe at ``path`` with ``key=value`` overrides.

    Where there is no GPU, train.device becomes "cpu", with a warning.

    Raises:
        InputError: as :func:`read_lazy_config`, and for an invalid value of ``train``.
    """
    cfg = read_lazy_config(path, overrides, KEYS, "configs/pretrain/")
    check_train(cfg.train)
    return cfg


def check_train(train) -> None:
    """Raise :class:`InputError` for an invalid value in ``train``."""
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
        "attack_amp": (lambda x: x in (None, "bf16", "fp16"), "bf16, fp16 or null"),
        "compile": (
            lambda x: x is None or x in torch.compiler.list_backends(exclude_tags=()),
            "null or a backend of torch.compile, such as inductor",
        ),
        "cudnn_benchmark": (lambda x: type(x) is bool, "true or false"),
        "sync_bn": (lambda x: type(x) is bool, "true or false"),
    }
    check_values(train, "train", {key: rule for key, rule in rules.items() if key in train})
    for key in ("amp", "attack_amp"):
        if train.get(key) == "fp16" and torch.device(train.device).type == "cpu":
            raise InputError(f"train.{key}=fp16 is for GPUs: on the CPU use bf16 or null")


def check_values(node, name: str, rules: dict) -> None:
    """Raise :class:`InputError` for the first value of ``node`` that breaks its rule.

    Args:
        node: a part of a configuration.
        name: its name there.
        rules: {key: (a check of the value, what it must be)}.
    """
    for key, (is_right, expected) in rules.items():
        if not is_right(node[key]):
            raise InputError(f"{name}.{key} is {node[key]!r}; it must be {expected}")
