"""What a measurement is of: if any of it differs, the number may, and it is measured again."""

import functools
import hashlib
import json
import os
from collections.abc import Sequence
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from torch import nn

from rt_detectron.utils.files import file_sha256, text_sha256
from rt_detectron.utils.versions import VERSION

# Keys that change no number: of training, of files, and of evaluations, which state their own settings. All
# other keys count, those of projects of the user's own included.
_WITHOUT_EFFECT = (
    "OUTPUT_DIR",
    "VERSION",
    "VIS_PERIOD",
    "SEED",  # of the training; attacks and corruptions state the one they use
    "SOLVER",
    "DATALOADER",
    "DATASETS.TRAIN",
    "DATASETS.PROPOSAL_FILES_TRAIN",
    "MODEL.WEIGHTS",  # what the network holds counts, not the file that it came from
    "TEST.ATTACK",
    "TEST.CORRUPTION",
    "TEST.NATURAL",
    "TEST.PICTURES",
    "TEST.EVAL_PERIOD",
    "TEST.EXPECTED_RESULTS",
    "TEST.BEST_METRIC",
)
_FILES = ("file_name", "sem_seg_file_name", "pan_seg_file_name")


def detector_identity(cfg: CfgNode, model: nn.Module, dicts: Sequence[dict]) -> dict[str, str]:
    """SHA-256 of a detector's weights, its test set and the config keys that matter, and our version.

    Of the test set's images only the names and sizes count: reading them all would take as long as
    evaluating them.
    """
    return {
        "weights_sha256": weights_sha256(model),
        "data_sha256": _data_sha256(cfg.DATASETS.TEST[0], dicts),
        "config_sha256": _config_sha256(cfg),
        "rt_detectron": VERSION,
    }


def weights_sha256(model: nn.Module) -> str:
    """SHA-256 of all tensors of a network, with their names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        # As bytes, since numpy does not know bfloat16.
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _data_sha256(name: str, dicts: Sequence[dict]) -> str:
    images = [{**each, **_files(each)} for each in dicts]
    text = json.dumps(images, sort_keys=True, default=str)
    files = (MetadataCatalog.get(name).get(key) for key in ("json_file", "panoptic_json"))
    return text_sha256(text + "".join(file_sha256(file) for file in files if file))  # which evaluators read


def _files(record: dict) -> dict[str, Any]:
    """Names and sizes of an image's file and those of its segmentation."""
    files = {key: record[key] for key in _FILES if key in record}
    names = {key: os.path.basename(path) for key, path in files.items()}
    return {**names, **{key.replace("file_name", "bytes"): _size(path) for key, path in files.items()}}


def _size(path: str) -> int | None:
    return os.path.getsize(path) if os.path.isfile(path) else None  # images may be kept elsewhere


def _config_sha256(cfg: CfgNode) -> str:
    cfg = cfg.clone()
    cfg.defrost()
    for key in _WITHOUT_EFFECT:
        *path, last = key.split(".")
        functools.reduce(getattr, path, cfg).pop(last, None)
    return text_sha256(cfg.dump())
