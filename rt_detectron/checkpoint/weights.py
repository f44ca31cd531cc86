"""The guard before anything is built or loaded: what MODEL.WEIGHTS say of themselves, against the config."""

import os

import torch
from detectron2.config import CfgNode

from rt_detectron.checkpoint import zoo
from rt_detectron.checkpoint.formats import read_pickle
from rt_detectron.checkpoint.metadata import Metadata
from rt_detectron.checkpoint.preprocessing import compare
from rt_detectron.utils.errors import InputError


def check_config(cfg: CfgNode, stride_in_1x1: bool | None = None) -> None:
    """Compare a config with what its MODEL.WEIGHTS were trained on, as far as that is known before loading.

    The backbone builders ask it, so that they stop under any detector, trainer and checkpointer.

    Args:
        stride_in_1x1: where the builder puts the stride of bottlenecks, whatever MODEL.RESNETS.STRIDE_IN_1X1
            says: Detectron2's default for it is no network's of ours. None without bottlenecks.

    Raises:
        InputError: listing exactly the config lines to set.
    """
    try:
        metadata = weights_metadata(cfg.MODEL.WEIGHTS)
    except InputError:  # loading tells what is wrong with the weights, if it comes to that
        return
    if metadata is not None:
        if stride_in_1x1 not in (None, metadata.stride_in_1x1):
            raise InputError(
                f"the weights ({metadata.source}) have the stride of bottlenecks in the "
                f"{'1x1' if metadata.stride_in_1x1 else '3x3'} convolution, which {cfg.MODEL.BACKBONE.NAME} "
                "does not build: set MODEL.BACKBONE.NAME to Detectron2's builder, such as "
                f"build_resnet_fpn_backbone, and MODEL.RESNETS.STRIDE_IN_1X1 {metadata.stride_in_1x1}"
            )
        keys = {"PIXEL_MEAN": cfg.MODEL.PIXEL_MEAN, "PIXEL_STD": cfg.MODEL.PIXEL_STD}
        found = {f"MODEL.{key}": list(value) for key, value in keys.items()}
        compare({"INPUT.FORMAT": cfg.INPUT.FORMAT, **found}, metadata)


def weights_metadata(weights: str) -> Metadata | None:
    """What ``weights``, a file or a ``robust://`` name, say of themselves; nothing is downloaded.

    Returns:
        None for a file without metadata or one that is not there, for other kinds of paths, and for "".

    Raises:
        InputError: for an unknown name and a file that cannot be read.
    """
    path = weights.split("?")[0]
    if path.startswith(zoo.PREFIX):
        return zoo.metadata(zoo.name_in(path))
    if not os.path.isfile(path):
        return None
    if path.endswith(".pkl"):
        content = read_pickle(path)
    else:
        try:
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except Exception as error:  # whatever torch does not read has no metadata of ours
            raise InputError(f"{path} is damaged or not a checkpoint ({type(error).__name__})") from None
    stored = content.get("rt_detectron") if isinstance(content, dict) else None
    return None if stored is None else Metadata.from_dict(stored, path)
