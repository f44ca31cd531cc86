"""Write weights in each of the formats that :mod:`rt_detectron.checkpoint.formats` reads."""

import json
import pickle

import torch
from torch import Tensor

from rt_detectron.utils.errors import InputError
from rt_detectron.utils.files import replaced_atomically


def save_atomically(content: dict, path: str) -> None:
    """``torch.save``, so that ``path`` is whole or not there at all.

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


def write_pickle(state_dict: dict[str, Tensor], metadata: dict, path: str) -> None:
    """A Detectron2 backbone, as its model zoo has them: any of its checkpointers loads it."""
    content = {
        "model": {name: tensor.contiguous().numpy() for name, tensor in state_dict.items()},
        "__author__": "rt_detectron",
        "matching_heuristics": True,
        "rt_detectron": metadata,
    }
    with open(path, "wb") as file:
        pickle.dump(content, file, protocol=4)


def write_torchvision(state_dict: dict[str, Tensor], metadata: dict, path: str) -> None:
    """The bare state dict: what torchvision's and timm's networks load. ``metadata`` has no place in it."""
    torch.save(state_dict, path)


def write_robustness(state_dict: dict[str, Tensor], metadata: dict, path: str) -> None:
    """The robustness package's: its AttackerModel holds the network twice, and the normalisation twice."""
    statistics = {
        "new_mean": torch.tensor(metadata["pixel_mean"]).view(3, 1, 1) / 255,
        "new_std": torch.tensor(metadata["pixel_std"]).view(3, 1, 1) / 255,
    }
    model = {f"module.normalizer.{name}": tensor for name, tensor in statistics.items()}
    model |= {f"module.model.{name}": tensor for name, tensor in state_dict.items()}
    model |= {f"module.attacker.normalize.{name}": tensor for name, tensor in statistics.items()}
    model |= {f"module.attacker.model.{name}": tensor for name, tensor in state_dict.items()}
    torch.save({"model": model, "epoch": 0, "rt_detectron": metadata}, path)


def write_safetensors(state_dict: dict[str, Tensor], metadata: dict, path: str) -> None:
    """The state dict, and ``metadata`` as JSON in the file's header."""
    try:
        from safetensors.torch import save_file
    except ImportError:
        raise InputError(
            "writing .safetensors needs safetensors: pip install 'rt_detectron[safetensors]'"
        ) from None
    tensors = {name: tensor.contiguous() for name, tensor in state_dict.items()}
    save_file(tensors, path, metadata={"rt_detectron": json.dumps(metadata)})


# By the ending of the file.
WRITERS = {
    ".pkl": write_pickle,
    ".pth": write_torchvision,
    ".ckpt": write_robustness,
    ".safetensors": write_safetensors,
}
