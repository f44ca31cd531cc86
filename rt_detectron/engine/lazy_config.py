"""Reading and writing LazyConfig files, Detectron2's configuration in Python."""

import copy
import logging
import math
import os
import tempfile
import traceback

import torch
from detectron2.config import LazyConfig, instantiate
from detectron2.utils import comm
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from rt_detectron.utils.errors import InputError, building, one_line
from rt_detectron.utils.files import find_config, text_sha256

logger = logging.getLogger(__name__)


def read_lazy_config(path: str, overrides: list[str], keys: tuple[str, ...], folder: str):
    """The LazyConfig at ``path`` with ``key=value`` overrides.

    Where there is no GPU, train.device becomes "cpu", with a warning.

    Args:
        path: of a ``.py`` or ``.yaml`` file.
        overrides: in Hydra's grammar: of keys that the file has, or ``+key=value`` for new ones.
        keys: top-level keys that it must have, "train" among them.
        folder: of the shipped files, for messages.

    Raises:
        InputError: for a missing or broken file, an unknown key, or an override that cannot be parsed.
    """
    path = find_config(path)
    if not os.path.isfile(path):
        raise InputError(f"--config-file {path or '(none)'}: no such file; {folder} holds the shipped ones")
    try:
        cfg = LazyConfig.load(path)
    except Exception as error:  # the file is a program
        raise InputError(
            f"--config-file {path}: not a LazyConfig file ({_where(error)}{one_line(error)[:200]})"
        ) from None
    missing = [key for key in keys if not OmegaConf.is_dict(cfg) or key not in cfg]
    if missing:
        raise InputError(
            f"--config-file {path}: not for this tool, it lacks {', '.join(missing)}; "
            f"{folder} holds the shipped ones"
        )
    for override in overrides:
        key, equals, _ = override.partition("=")
        if not equals:
            raise InputError(f"{override!r} is not of the form key=value, e.g. train.output_dir=output")
        if not key.startswith("+") and not _has_key(cfg, key):
            raise InputError(f"unknown configuration key {key!r}; {path} shows the keys")
    shipped = cfg
    try:
        cfg = LazyConfig.apply_overrides(copy.deepcopy(shipped), overrides)
    except (HydraException, OmegaConfBaseException) as error:
        raise InputError(f"{' '.join(overrides)}: {one_line(error)[:200]}") from None
    for override in overrides:
        key = override.partition("=")[0]
        if not key.startswith(("+", "~")):
            _check_value(key, _value(shipped, key), _value(cfg, key))
    _check_train(cfg.train)
    if cfg.train.device == "cuda" and not torch.cuda.is_available():
        if comm.is_main_process():
            logger.warning("No GPU found: running on the CPU (train.device=cpu)")
        cfg.train.device = "cpu"
        if OmegaConf.select(cfg, "train.amp.enabled"):  # Detectron2's AMP is for GPUs only
            logger.warning("Mixed precision is off (train.amp.enabled=False): it needs a GPU")
            cfg.train.amp.enabled = False
    return cfg


def _where(error: Exception) -> str:
    """The line of a configuration in Python that raised ``error``, and its type; "" for other files."""
    lines = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.name == "<module>"]
    return f"{lines[-1].filename}, line {lines[-1].lineno}: {type(error).__name__}: " if lines else ""


def _value(cfg, key: str):
    return OmegaConf.select(cfg, key, throw_on_resolution_failure=False)


def _check_value(key: str, shipped, given) -> None:
    """A number must stay one, a text a text (or several names or urls), a list a list.

    Only null, which recipes use for "none" or "all", is left to whoever reads the key.
    """
    if shipped is None or given is None:
        return
    if isinstance(shipped, bool):
        is_right, expected = isinstance(given, bool), "true or false"
    elif isinstance(shipped, int | float):
        is_number = isinstance(given, int | float) and not isinstance(given, bool)
        is_right, expected = is_number and math.isfinite(given), "a finite number"
    elif isinstance(shipped, str):
        several = OmegaConf.is_list(given) and key.endswith(("names", "urls"))
        is_right, expected = all(isinstance(text, str) for text in (given if several else [given])), "a text"
    elif OmegaConf.is_list(shipped):
        is_right, expected = OmegaConf.is_list(given), "a list"
    else:
        return
    if not is_right:
        raise InputError(f"{key} is {given!r}; it must be {expected}, as {shipped!r} is")


def _check_train(train) -> None:
    """What every tool reads first, and other libraries would refuse less clearly."""
    if not isinstance(train.output_dir, str) or not train.output_dir:
        raise InputError(f"train.output_dir is {train.output_dir!r}; it must be the name of a folder")
    try:
        torch.device(train.device)
    except (RuntimeError, TypeError):
        raise InputError(f"train.device is {train.device!r}; it must be cpu, cuda or cuda:N") from None


def build(node, key: str):
    """What ``node`` describes, as Detectron2's ``instantiate``.

    Args:
        node: of a LazyConfig.
        key: its name there, such as "dataloader.train", for messages.

    Raises:
        InputError: if it cannot be built, naming the key.
    """
    with building(key, key):
        return instantiate(node)


def _has_key(cfg, key: str) -> bool:
    for part in key.split("."):
        if OmegaConf.is_list(cfg) and part.isdigit() and int(part) < len(cfg):
            cfg = cfg[int(part)]
        elif OmegaConf.is_dict(cfg) and part in cfg:
            cfg = cfg[part]
        else:
            return False
    return True


def as_yaml(cfg) -> str:
    """``cfg`` as Detectron2 writes it to config.yaml."""
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "config.yaml")
        LazyConfig.save(cfg, path)
        if not os.path.exists(path):
            return "# This configuration cannot be written as YAML; see config.yaml.pkl."
        with open(path) as file:
            return file.read()


def save_lazy_config(cfg, folder: str) -> None:
    """Write ``config.yaml`` as Detectron2 does, in the first process.

    Call it once nothing can be refused any more: until then the folder may hold another run's config.
    """
    if not comm.is_main_process():
        return
    os.makedirs(folder, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".config") as temporary:
        LazyConfig.save(cfg, os.path.join(temporary, "config.yaml"))
        for name in os.listdir(temporary):  # what YAML cannot hold comes as a .pkl
            os.replace(os.path.join(temporary, name), os.path.join(folder, name))


def lazy_config_sha256(cfg) -> str:
    """SHA-256 of a configuration, whatever its output folder."""
    cfg = copy.deepcopy(cfg)
    cfg.train.output_dir = ""
    return text_sha256(as_yaml(cfg))
