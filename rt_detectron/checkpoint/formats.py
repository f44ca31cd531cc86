"""Read and write weights in all supported file formats. Reading never runs code in a file."""

import json
import os
import pickle
import warnings
import zipfile
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from rt_detectron.checkpoint.architectures import Architecture, get_architecture
from rt_detectron.checkpoint.metadata import Metadata
from rt_detectron.checkpoint.unpickling import ArraysOnlyUnpickler, Placeholder, refused_name, tensors_only
from rt_detectron.utils.errors import InputError, optional_import
from rt_detectron.utils.files import replaced_atomically

# How many times its own size a .pkl may take: protocol 2 spells bytes as text, and copies them twice.
MEMORY = 4
DEPTH = 6  # of dicts in dicts; state dicts are found two or three deep


@dataclass
class WeightsFile:
    """What a file of weights holds, before anybody has asked which network that is.

    Attributes:
        path: of the file.
        state_dicts: tensors on the CPU by name, by where in the file they are: "state_dict_ema",
            "checkpoint.model", or "" for the file itself.
        settings: every other text, number and list of numbers in it, by where it is: "args.model".
        metadata: of a file that has it.
    """

    path: str
    state_dicts: dict[str, dict[str, Tensor]]
    settings: dict[str, object] = field(default_factory=dict)
    metadata: Metadata | None = None


def read_weights(path: str | os.PathLike) -> WeightsFile:
    """Read a ``.ckpt``, ``.pth``, ``.pt``, ``.pth.tar`` or other file of torch.save, a ``.safetensors``, or a
    backbone ``.pkl`` converted before.

    Raises:
        InputError: naming the file, if there is none, it is none of these, is damaged, or asks for far
            more memory than it has bytes.
    """
    path = file_name(path)
    check_file(path)
    if path.endswith(".safetensors"):
        content = _read_safetensors(path)
    else:
        content = read_pickle(path) if path.endswith(".pkl") else _read_torch(path)
    if not isinstance(content, dict):
        raise InputError(f"{path} holds no state dict: save model.state_dict() instead of the model")
    metadata = Metadata.from_dict(content["rt_detectron"], path) if "rt_detectron" in content else None
    file = WeightsFile(path, {}, {}, metadata)
    _sort_in(content, "", file, set())
    if path.endswith(".pkl"):
        file.state_dicts = {"": _classifier_names(file.state_dicts.get("model", {}), metadata, path)}
    if not any(file.state_dicts.values()):
        whole = any(value is Placeholder for value in content.values())
        raise InputError(
            f"{path} holds a whole model: save model.state_dict() instead"
            if whole
            else f"{path} holds no tensors: give a file of weights"
        )
    return file


def file_name(path: object) -> str:
    """``path`` as text. Raises :class:`InputError` for what is neither text nor a path, such as a list."""
    if isinstance(path, str | os.PathLike) and isinstance(name := os.fspath(path), str):
        return name
    raise InputError(f"{path!r:.100} is no file name: give one file of weights")


def _sort_in(content: dict, place: str, file: WeightsFile, seen: set[int], depth: int = 0) -> None:
    """Put the tensors and settings in ``content``, which is at ``place``, into ``file``."""
    if id(content) in seen or depth > DEPTH:  # dicts may hold themselves
        return
    seen.add(id(content))
    for name, value in content.items():
        if not isinstance(name, str) or (name == "rt_detectron" and not place):
            continue
        where = f"{place}.{name}" if place else name
        if isinstance(value, dict):
            _sort_in(value, where, file, seen, depth + 1)
        elif isinstance(value, Tensor | np.ndarray):
            file.state_dicts.setdefault(place, {})[name] = _tensor(value, where, file.path)
        elif isinstance(value, str | int | float | list | tuple):
            file.settings[where] = value


def _tensor(value: Tensor | np.ndarray, name: str, path: str) -> Tensor:
    try:
        tensor = torch.as_tensor(value).detach()
    except (TypeError, ValueError):
        raise InputError(f"{path}: {name} is an array of {value.dtype}, which weights never are") from None
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_complex() or tensor.is_meta:
        raise InputError(f"{path}: {name} is no ordinary tensor (sparse, quantised or without data)")
    # A file may ask for one number repeated a billion times, which copies would then really hold.
    if tensor.numel() * tensor.element_size() > os.path.getsize(path):
        size = f"{list(tensor.shape)} needs more bytes than the whole file has"
        raise InputError(f"{path} is damaged or not a checkpoint ({name} {size}): download or write it again")
    return tensor


def file_architecture(metadata: Metadata, path: str) -> Architecture:
    """The network that the file ``path`` says it holds. Raises :class:`InputError` naming both."""
    try:
        return get_architecture(metadata.arch)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def _classifier_names(tensors: dict[str, Tensor], metadata: Metadata | None, path: str) -> dict[str, Tensor]:
    """The tensors of a backbone's file under the names that they have in the classifier."""
    if metadata is None:
        raise InputError(
            f"{path} was not written by rt_detectron, so the network in it is not known: give the checkpoint "
            "that it was made from"
        )
    architecture = file_architecture(metadata, path)
    names = {in_backbone: name for name, in_backbone in architecture.backbone_names.items()}
    unknown = [name for name in tensors if name not in names]
    if unknown:
        raise InputError(f"{path} is no backbone {architecture.name}: it holds {unknown[0]}")
    return {names[name]: tensor for name, tensor in tensors.items()}


def backbone_metadata(path: str) -> Metadata:
    """What a backbone's ``.pkl`` says of itself.

    Raises:
        InputError: as :func:`read_pickle`, and for a file that rt_detectron has not written.
    """
    content = read_pickle(path)
    if not isinstance(content, dict) or "rt_detectron" not in content:
        raise InputError(
            f"{path} was not written by rt_detectron: convert it with tools/convert_checkpoint.py"
        )
    return Metadata.from_dict(content["rt_detectron"], path)


def read_pickle(path: str):
    """Read a ``.pkl`` of plain containers and numpy arrays, as Detectron2's model zoo has them.

    Raises:
        InputError: if it holds anything else, is damaged or cannot be read.
    """
    check_file(path)
    with open(path, "rb") as file:
        try:
            return ArraysOnlyUnpickler(file, MEMORY * os.path.getsize(path) + (1 << 20)).load()
        except Exception as error:  # broad, as in _read_torch
            raise InputError(unreadable(path, error)) from None


def check_file(path: str) -> None:
    """Raise :class:`InputError` for a file that is not there, is empty, or stands in for the real one."""
    if os.path.isdir(path):
        raise InputError(f"{path} is a folder: give the checkpoint file inside it")
    try:
        with open(path, "rb") as file:
            head = file.read(512).lstrip()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    if not head:
        raise InputError(f"{path} is empty: download or write it again")
    if head.startswith(b"<"):
        raise InputError(
            f"{path} is a web page, not a checkpoint: the download link is wrong or needs a login"
        )
    if head.startswith(b"version https://git-lfs"):
        raise InputError(f"{path} is a Git LFS pointer, not the checkpoint: run `git lfs pull`")


def _read_safetensors(path: str) -> dict:
    safetensors = optional_import("safetensors", "safetensors>=0.4", f"reading {path}")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            header = dict(file.metadata() or {})
            content = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no dict)
            if "rt_detectron" in header:
                content["rt_detectron"] = json.loads(header.pop("rt_detectron"))
    except Exception as error:  # broad, as in _read_torch
        raise InputError(unreadable(path, error)) from None
    return {**content, "__metadata__": header}


def check_archive(path: str) -> None:
    """Raise :class:`InputError` if a record of torch's zip format does not match its checksum.

    torch.load does not check them, so a flipped bit in a weight would go unnoticed. Files in torch's older
    format have no checksums.
    """
    if not zipfile.is_zipfile(path):
        return
    try:
        with zipfile.ZipFile(path) as archive:
            _check_sizes(archive, path)
            damaged = archive.testzip()
    except InputError:
        raise
    except Exception as error:  # broad, as in _read_torch
        raise InputError(unreadable(path, error)) from None
    if damaged is not None:
        raise InputError(f"{path} is damaged ({damaged} has a wrong checksum): download or write it again")


def _check_sizes(archive: zipfile.ZipFile, path: str) -> None:
    """torch compresses nothing: records that inflate, or that share their bytes, are none of its own."""
    records = archive.infolist()
    inflates = any(record.compress_type != zipfile.ZIP_STORED for record in records)
    if inflates or sum(record.file_size for record in records) > os.path.getsize(path):
        raise InputError(f"{path} is a compressed archive, not a checkpoint: unpack it, or download it again")


def _read_torch(path: str):
    check_archive(path)
    # Hostile and damaged files fail in every way there is, from EOFError to RecursionError, and a file
    # that cannot be read is always the user's to replace: hence the broad `except`.
    with open(path, "rb") as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's remarks on pickle protocols and on its own storages
        try:
            return torch.load(file, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError:
            pass  # refused for what else it holds (a schedule, an argument namespace): leave that out
        except Exception as error:
            raise InputError(unreadable(path, error)) from None
        file.seek(0)
        try:
            return torch.load(file, map_location="cpu", weights_only=False, pickle_module=tensors_only)
        except Exception as error:
            raise InputError(unreadable(path, error)) from None


def unreadable(path: str, error: Exception) -> str:
    """One line for ``error`` of reading ``path``, naming what the file was refused for, if it was."""
    if refused := refused_name(error):
        return (
            f"{path} was refused for {refused}, which could run code and is no part of weights: "
            "get the file from a source that you trust"
        )
    reason = (str(error).strip().splitlines() or [""])[0][:120]
    reason = f"{type(error).__name__}: {reason}" if reason else type(error).__name__
    return f"{path} is damaged or not a checkpoint ({reason}): download or write it again"


def save_atomically(content: dict, path: str) -> None:
    """``torch.save``, atomically: an interrupted write leaves no partial file.

    Raises:
        OSError: for a full disk, or a path that cannot be written.
    """
    try:
        # Through Python's own file, whose errors say what is wrong with the disk, and which leaves the
        # temporary name out of the content.
        with replaced_atomically(path) as temporary, open(temporary, "wb") as file:
            torch.save(content, file)
    except RuntimeError as error:
        raise (error.__context__ if isinstance(error.__context__, OSError) else error) from None


def write_pickle(state_dict: dict[str, Tensor], metadata: Metadata, path: str) -> None:
    """A Detectron2 backbone, as its model zoo has them: any of its checkpointers loads it."""
    content = {
        "model": {name: tensor.contiguous().numpy() for name, tensor in state_dict.items()},
        "__author__": "rt_detectron",
        "matching_heuristics": True,
        "rt_detectron": metadata.to_dict(),
    }
    with open(path, "wb") as file:
        pickle.dump(content, file, protocol=4)


def write_torchvision(state_dict: dict[str, Tensor], metadata: Metadata, path: str) -> None:
    """The bare state dict, as torchvision's and timm's networks load it. It cannot hold ``metadata``."""
    torch.save(state_dict, path)


def write_robustness(state_dict: dict[str, Tensor], metadata: Metadata, path: str) -> None:
    """The robustness package's: its AttackerModel holds the network twice, and the normalisation twice."""
    statistics = {
        "new_mean": torch.tensor(metadata.pixel_mean).view(3, 1, 1) / 255,
        "new_std": torch.tensor(metadata.pixel_std).view(3, 1, 1) / 255,
    }
    model = {f"module.normalizer.{name}": tensor for name, tensor in statistics.items()}
    model |= {f"module.model.{name}": tensor for name, tensor in state_dict.items()}
    model |= {f"module.attacker.normalize.{name}": tensor for name, tensor in statistics.items()}
    model |= {f"module.attacker.model.{name}": tensor for name, tensor in state_dict.items()}
    torch.save({"model": model, "epoch": 0, "rt_detectron": metadata.to_dict()}, path)


def write_safetensors(state_dict: dict[str, Tensor], metadata: Metadata, path: str) -> None:
    """The state dict, and ``metadata`` as JSON in the file's header."""
    safetensors = optional_import("safetensors.torch", "safetensors>=0.4", "writing .safetensors")
    tensors = {name: tensor.contiguous() for name, tensor in state_dict.items()}
    safetensors.save_file(tensors, path, metadata={"rt_detectron": json.dumps(metadata.to_dict())})


# By the ending of the file.
WRITERS = {
    ".pkl": write_pickle,
    ".pth": write_torchvision,
    ".ckpt": write_robustness,
    ".safetensors": write_safetensors,
}
