"""Read and write weights in all supported file formats. Reading never runs code in a file."""

import json
import os
import pickle
import re
import types
import warnings
import zipfile
from collections import OrderedDict
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rt_detectron.checkpoint.architectures import ARCHITECTURES, get_architecture
from rt_detectron.checkpoint.metadata import Metadata
from rt_detectron.utils.errors import InputError, optional_import
from rt_detectron.utils.files import replaced_atomically

# Where a file keeps the network's own names. The robustness package stores the network twice, plainly and
# inside its attacker: only the plain copy is listed, so exactly one is taken.
PREFIXES = (
    "module.model.model.",  # robustness, with its inner wrapper
    "module.model.",  # robustness
    "model.model.",  # the same two, saved without DataParallel
    "model.",
    "module.network.",  # our pretraining under DistributedDataParallel
    "network.",  # our pretraining
    "module.",  # torchvision or timm under DataParallel
    "",  # torchvision or timm
)
# Beside the network: the normalisation in front of it, by its buffers for mean and std in [0, 1] units.
NORMALIZERS = {
    "module.normalizer.": ("new_mean", "new_std"),  # robustness
    "module.attacker.normalize.": ("new_mean", "new_std"),
    "normalizer.": ("new_mean", "new_std"),
    "attacker.normalize.": ("new_mean", "new_std"),
    "normalize.": ("mean", "std"),  # RobustBench
    "module.normalize.": ("mean", "std"),
}
NOT_THE_NETWORK = (*NORMALIZERS, "module.attacker.", "attacker.")
STEMS = frozenset(f"{architecture.stem}.weight" for architecture in ARCHITECTURES.values())


Pixel = tuple[float, ...]  # RGB, 0..255


@dataclass
class ClassifierFile:
    """What a classifier's file holds.

    Attributes:
        state_dict: the network's tensors on the CPU under torchvision's or timm's names, floats as float32.
        metadata: of a file that has it.
        pixel_mean, pixel_std: of the normalisation stored beside the network, RGB in 0..255, or None.
    """

    state_dict: dict[str, Tensor]
    metadata: Metadata | None = None
    pixel_mean: Pixel | None = None
    pixel_std: Pixel | None = None


def read_classifier(path: str) -> ClassifierFile:
    """Read a robustness ``.ckpt``, torchvision or timm ``.pth``, ``.safetensors``, a file of our pretraining,
    a ``.pth.tar`` of PyTorch's ImageNet example (as the Stylized-ImageNet networks of Geirhos et al. 2019
    are), or a backbone ``.pkl`` converted before.

    Raises:
        InputError: if there is no such file, it is none of these, is damaged, or holds tensors that are
            not finite.
    """
    check_file(path)
    metadata, tensors = _read(path)
    if path.endswith(".pkl"):
        tensors = _classifier_names(tensors, metadata, path)
    prefix = _prefix(tensors)
    state_dict = {
        name.removeprefix(prefix): _as_float32(tensor, name, path)
        for name, tensor in tensors.items()
        if name.startswith(prefix) and not name.startswith(NOT_THE_NETWORK)
    }
    if not state_dict:
        raise InputError(f"{path} holds no tensors: give a file of weights")
    pixel_mean, pixel_std = _normalizer(tensors, path)
    return ClassifierFile(state_dict, metadata, pixel_mean, pixel_std)


def _read(path: str) -> tuple[Metadata | None, dict[str, Tensor]]:
    if path.endswith(".safetensors"):
        return _read_safetensors(path)
    content = read_pickle(path) if path.endswith(".pkl") else _read_torch(path)
    tensors = _find_tensors(content, path)
    return _metadata(content, path), tensors


def _metadata(content: dict, path: str) -> Metadata | None:
    """The file's entry ``rt_detectron``, if it has one."""
    return Metadata.from_dict(content["rt_detectron"], path) if "rt_detectron" in content else None


def _prefix(tensors: dict[str, Tensor]) -> str:
    """The prefix of the network's own names."""
    for prefix in PREFIXES:
        if any(f"{prefix}{stem}" in tensors for stem in STEMS):
            return prefix
    # Not a network of the table, so the names are not known, but all of them have it.
    names = [name for name in tensors if not name.startswith(NOT_THE_NETWORK)]
    return next(prefix for prefix in PREFIXES if all(name.startswith(prefix) for name in names))


def _classifier_names(tensors: dict[str, Tensor], metadata: Metadata | None, path: str) -> dict[str, Tensor]:
    """The tensors of a backbone's file under the names that they have in the classifier."""
    if metadata is None:
        raise InputError(
            f"{path} was not written by rt_detectron, so the network in it is not known: give the checkpoint "
            "that it was made from"
        )
    architecture = get_architecture(metadata.arch)
    names = {in_backbone: name for name, in_backbone in architecture.backbone_names.items()}
    unknown = [name for name in tensors if name not in names]
    if unknown:
        raise InputError(f"{path} is no backbone {architecture.name}: it holds {unknown[0]}")
    return {names[name]: tensor for name, tensor in tensors.items()}


def read_pickle(path: str):
    """Read a ``.pkl`` of plain containers and numpy arrays, as Detectron2's model zoo has them.

    Raises:
        InputError: if it holds anything else, is damaged or cannot be read.
    """
    check_file(path)
    with open(path, "rb") as file:
        try:
            return _ArraysOnlyUnpickler(file, encoding="latin1").load()  # latin1: for Python 2's files
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


def _read_safetensors(path: str) -> tuple[Metadata | None, dict[str, Tensor]]:
    safetensors = optional_import("safetensors", "safetensors>=0.4", f"reading {path}")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            content = {
                key: json.loads(text)
                for key, text in (file.metadata() or {}).items()
                if key == "rt_detectron"
            }
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no dict)
    except Exception as error:  # broad, as in _read_torch
        raise InputError(unreadable(path, error)) from None
    return _metadata(content, path), tensors


def check_archive(path: str) -> None:
    """Raise :class:`InputError` if a record of torch's zip format does not match its checksum.

    torch.load does not check them, so a flipped bit in a weight would go unnoticed. Files in torch's older
    format have no checksums.
    """
    if not zipfile.is_zipfile(path):
        return
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except Exception as error:  # broad, as in _read_torch
        raise InputError(unreadable(path, error)) from None
    if damaged is not None:
        raise InputError(f"{path} is damaged ({damaged} has a wrong checksum): download or write it again")


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
            return torch.load(file, map_location="cpu", weights_only=False, pickle_module=_tensors_only)
        except Exception as error:
            raise InputError(unreadable(path, error)) from None


def unreadable(path: str, error: Exception) -> str:
    """The message for ``error`` while reading ``path``; it names what was refused, if anything was."""
    if isinstance(error, pickle.UnpicklingError) and (refused := re.search(r"GLOBAL (\S+)", str(error))):
        return (
            f"{path} was refused for {refused[1][:120]}, which could run code and is no part of weights: "
            "get the file from a source that you trust"
        )
    reason = (str(error).strip().splitlines() or [""])[0][:120]
    reason = f"{type(error).__name__}: {reason}" if reason else type(error).__name__
    return f"{path} is damaged or not a checkpoint ({reason}): download or write it again"


class _InertType(type):
    """Its classes ignore everything that a pickle does to them: calls, state, items."""

    def __call__(cls, *args, **kwargs):
        return cls

    def _ignore(cls, *args, **kwargs) -> None:
        pass

    __setstate__ = __setitem__ = append = extend = add = _ignore


class _Placeholder(metaclass=_InertType):
    """Stands for every object of a pickle that is neither a tensor nor a plain container.

    Pickle demands a class in some places and an object in others, so the class is its own only instance.
    """

    def __new__(cls, *args, **kwargs):
        return cls


class _Dict(dict):
    """Replaces collections.OrderedDict, without the attributes that torch adds to a state dict."""

    def __setstate__(self, state) -> None:
        pass


class _Function:
    """A function that a pickle may call, but whose attributes it cannot set."""

    __slots__ = ("_function",)

    def __init__(self, function):
        self._function = function

    def __call__(self, *args):
        return self._function(*args)

    def __setstate__(self, state) -> None:
        pass


def _tensor(storage, offset, size, stride, *_) -> Tensor:
    return torch._utils._rebuild_tensor(storage, offset, size, stride)


def _parameter(tensor, *_) -> Tensor:
    return tensor


_ALLOWED = {
    ("collections", "OrderedDict"): _Function(_Dict),
    ("torch", "Size"): _Function(tuple),
    ("torch._utils", "_rebuild_tensor"): _Function(_tensor),
    ("torch._utils", "_rebuild_tensor_v2"): _Function(_tensor),
    ("torch._utils", "_rebuild_parameter"): _Function(_parameter),
    ("torch._utils", "_rebuild_parameter_with_state"): _Function(_parameter),
}


class _TensorsOnlyUnpickler(pickle.Unpickler):
    """Builds tensors and plain containers. Nothing is imported: every other name is a placeholder.

    torch.load adds the storages itself, by a table of their names, before it asks ``find_class``.
    """

    def find_class(self, module: str, name: str):
        return _ALLOWED.get((module, name), _Placeholder)


# What torch.load takes as its pickle module.
_tensors_only = types.SimpleNamespace(
    __name__="tensors_only",
    Unpickler=_TensorsOnlyUnpickler,
    load=lambda file, **kwargs: _TensorsOnlyUnpickler(file, **kwargs).load(),
)


def _bytes(text: str, encoding: str) -> bytes:
    """Replaces _codecs.encode, by which pickle protocol 2 writes bytes."""
    if not isinstance(text, str) or encoding != "latin1":
        raise pickle.UnpicklingError("bytes in an unknown spelling")
    return text.encode("latin1")


def _constructor(sample, protocol: int) -> _Function:
    """The function that numpy's pickles call to make ``sample``. Its module depends on numpy's version."""
    return _Function(sample.__reduce_ex__(protocol)[0])


_ALLOWED_IN_ARRAYS = {
    ("collections", "OrderedDict"): _Function(OrderedDict),
    ("_codecs", "encode"): _Function(_bytes),
    ("numpy", "ndarray"): np.ndarray,  # itself, since the next asks for a type
    ("numpy", "dtype"): _Function(np.dtype),
}
for _core in ("numpy.core", "numpy._core"):  # before and from numpy 2 on
    _ALLOWED_IN_ARRAYS |= {
        (f"{_core}.multiarray", "_reconstruct"): _constructor(np.zeros(1), 4),
        (f"{_core}.multiarray", "scalar"): _constructor(np.float32(0), 4),
        (f"{_core}.numeric", "_frombuffer"): _constructor(np.zeros(1), 5),
    }


class _ArraysOnlyUnpickler(pickle.Unpickler):
    """Builds numpy arrays and plain containers, and refuses a file that asks for anything else.

    Unlike a training checkpoint, a ``.pkl`` of weights has no reason to hold more.
    """

    def find_class(self, module: str, name: str):
        try:
            return _ALLOWED_IN_ARRAYS[module, name]
        except KeyError:
            # In torch's words, for `unreadable`; without blanks and line ends, which a pickle may smuggle in.
            raise pickle.UnpicklingError(f"GLOBAL {re.sub(r'[^!-~]', '?', f'{module}.{name}')}") from None


def _find_tensors(content, path: str) -> dict[str, Tensor]:
    """The file's state dict: under "model", under "state_dict" (older files), or the file itself."""
    if not isinstance(content, dict):
        raise InputError(f"{path} holds no state dict: save model.state_dict() instead of the model")
    state_dict = next((content[key] for key in ("model", "state_dict") if key in content), content)
    if not isinstance(state_dict, dict):
        raise InputError(f"{path} holds a whole model: save model.state_dict() instead")
    return {
        name: torch.as_tensor(value)
        for name, value in state_dict.items()
        if isinstance(value, Tensor | np.ndarray) and isinstance(name, str)
    }


def _as_float32(tensor: Tensor, name: str, path: str) -> Tensor:
    if not tensor.is_floating_point():
        return tensor
    tensor = tensor.detach().float()
    if not torch.isfinite(tensor).all():
        raise InputError(f"{path}: tensor {name} holds NaN or infinity: the training behind it diverged")
    return tensor


def _normalizer(
    tensors: dict[str, Tensor], path: str
) -> tuple[tuple[float, ...] | None, tuple[float, ...] | None]:
    """The mean and std that are stored in [0,1] units beside the network, in 0..255."""
    for prefix, names in NORMALIZERS.items():
        if all(prefix + name in tensors for name in names):
            mean, std = (_pixels(tensors[prefix + name], prefix + name, path) for name in names)
            return mean, std
    return None, None


def _pixels(tensor: Tensor, name: str, path: str) -> Pixel:
    values = _as_float32(tensor, name, path).flatten().tolist()
    if len(values) != 3:
        raise InputError(f"{path}: {name} has {len(values)} values, RGB needs 3")
    return tuple(round(255 * value, 4) for value in values)  # rounded: 0.485 is stored as 0.48500001


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
