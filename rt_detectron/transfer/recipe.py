"""Transfer recipes: LazyConfig files under configs/transfer."""

from rt_detectron.engine.lazy_config import read_lazy_config
from rt_detectron.pretrain.recipe import check_train, check_values
from rt_detectron.utils.errors import InputError

METHODS = ("fixed_feature", "last_layer", "full_network")
SOLVERS = ("sgd", "logistic_regression")
KEYS = ("transfer", "dataset", "dataloader", "optimizer", "lr_multiplier", "train")
SHORT = ("weights", "arch")  # on the command line without "transfer."


def load_transfer_config(path: str, overrides: list[str]):
    """The recipe at ``path`` with ``key=value`` overrides.

    Where there is no GPU, train.device becomes "cpu", with a warning.

    Raises:
        InputError: as :func:`read_lazy_config`, and for an invalid value.
    """
    overrides = [
        f"transfer.{override}" if override.partition("=")[0] in SHORT else override for override in overrides
    ]
    cfg = read_lazy_config(path, overrides, KEYS, "configs/transfer/")
    if not cfg.transfer.weights:
        raise InputError(
            "no weights: add weights=NAME, of docs/MODEL_ZOO.md, or weights=FILE, a classifier or backbone"
        )
    check_values(cfg.transfer, "transfer", {"method": _one_of(*METHODS)})
    check_train(cfg.train)
    check_values(cfg.optimizer, "optimizer", {"lr": (_is_positive, "a number > 0")})
    count = (lambda x: type(x) is int and x > 0, "a whole number > 0")
    whole = (lambda x: type(x) is int and x >= 0, "a whole number >= 0")
    flag = (lambda x: type(x) is bool, "true or false")
    check_values(cfg.dataloader, "dataloader", {"total_batch_size": count, "num_workers": whole})
    few = (lambda x: x is None or count[0](x), "a whole number > 0, or null")
    dataset_rules = {
        "resize": count,
        "image_size": count,
        "per_class": few,
        "download": flag,
        "held_out": flag,
    }
    check_values(cfg.dataset, "dataset", dataset_rules)
    is_cached = cfg.transfer.method == "fixed_feature"
    if ("features" in cfg) != is_cached:
        config = "fixed_feature" if is_cached else "full_network"
        raise InputError(
            f"transfer.method={cfg.transfer.method} needs --config-file configs/transfer/{config}.py"
        )
    if is_cached:
        feature_rules = {"batch_size": count, "flip": flag, "amp": _one_of("fp16", None)}
        check_values(cfg.features, "features", feature_rules)
        inverse = (lambda x: x and all(map(_is_positive, x)), "a list of numbers > 0")
        check_values(cfg.head, "head", {"solver": _one_of(*SOLVERS), "C": inverse})
    return cfg


def _is_positive(value) -> bool:
    return type(value) in (int, float) and 0 < value < float("inf")


def _one_of(*values):
    return values.__contains__, " or ".join("null" if value is None else value for value in values)
