"""The shipped configs by name, with the interface of detectron2.model_zoo.

>>> from rt_detectron import model_zoo
>>> cfg = model_zoo.get_config("robust_r50_eps3.yaml")
"""

import torch
from detectron2.config import CfgNode, LazyConfig, instantiate
from detectron2.modeling import build_model

from rt_detectron.checkpoint.checkpointer import RobustCheckpointer
from rt_detectron.detection import load_detector_config
from rt_detectron.utils.errors import InputError, did_you_mean
from rt_detectron.utils.files import shipped

__all__ = ["get", "get_config", "get_config_file"]


def get_config_file(config_path: str) -> str:
    """The path of a shipped config.

    Args:
        config_path: below ``configs/``: "robust_r50_eps3.yaml", "lazy/mask_rcnn_robust_r50_eps3.py", ...

    Raises:
        InputError: if there is none of that name, with the nearest names.
    """
    folder = shipped("configs")
    path = folder / config_path
    if not path.is_file():
        known = [
            str(path.relative_to(folder)) for path in folder.rglob("*") if path.suffix in (".py", ".yaml")
        ]
        raise InputError(f"there is no shipped config {config_path}{did_you_mean(config_path, known)}")
    return str(path)


def get_config(config_path: str, trained: bool = False) -> CfgNode:
    """A shipped config: Detectron2's and our keys for a ``.yaml``, a LazyConfig for a ``.py``.

    Args:
        config_path: as for :func:`get_config_file`.
        trained: there are no trained detectors to download; its weights are the pretrained backbone's.

    Raises:
        InputError: for an unknown name, and where ``trained`` is asked for.
    """
    path = get_config_file(config_path)
    if trained:
        raise InputError(f"{config_path}: no trained detector is published; train one by tools/train_net.py")
    if path.endswith(".py"):
        return LazyConfig.load(path)
    cfg = load_detector_config(path, []).clone()
    cfg.defrost()
    return cfg


def get(config_path: str, trained: bool = False, device: str | None = None) -> torch.nn.Module:
    """A detector by a shipped config, its backbone pretrained, in train mode.

    Args:
        config_path: as for :func:`get_config`.
        trained: as for :func:`get_config`.
        device: "cpu", "cuda"; None takes the config's.

    Raises:
        InputError: as :func:`get_config`, and for weights that cannot be had.
    """
    cfg = get_config(config_path, trained)
    if isinstance(cfg, CfgNode):
        if device is not None:
            cfg.MODEL.DEVICE = device
        model = build_model(cfg)
        RobustCheckpointer(model).load(cfg.MODEL.WEIGHTS)
        return model
    return instantiate(cfg.model).to(device or cfg.train.device)
