"""From torchvision's names to Detectron2's, and from a classifier's file to a backbone's."""

import functools
import math
import os
import pickle
import re
from dataclasses import dataclass

import torch
from torch import Tensor

from rt_detectron.checkpoint.architectures import (
    ARCHITECTURES,
    IMAGENET_MEAN,
    IMAGENET_STD,
    build_classifier,
    get_architecture,
)
from rt_detectron.checkpoint.formats import ClassifierFile, read_classifier
from rt_detectron.errors import InputError
from rt_detectron.files import file_sha256, replaced_atomically

OUTPUT_FORMATS = (".pkl",)
NORMS = ("l2", "linf")

# torchvision -> Detectron2, each rule on the outcome of the one before it.
_TO_DETECTRON2 = (
    (r"^(conv1|bn1)\.", r"stem.\1."),
    (r"^layer(\d)\.", lambda match: f"res{int(match[1]) + 1}."),
    (r"\bbn(\d)\.", r"conv\1.norm."),
    (r"\bdownsample\.0\.", "shortcut."),
    (r"\bdownsample\.1\.", "shortcut.norm."),
)
_TO_TORCHVISION = (
    (r"^stem\.", ""),
    (r"^res(\d)\.", lambda match: f"layer{int(match[1]) - 1}."),
    (r"\bconv(\d)\.norm\.", r"bn\1."),
    (r"\bshortcut\.norm\.", "downsample.1."),
    (r"\bshortcut\.", "downsample.0."),
)


@dataclass
class Conversion:
    """What :func:`convert_checkpoint` wrote: the file's metadata and its number of tensors."""

    metadata: dict
    num_tensors: int


def to_detectron2_name(name: str) -> str:
    """``layer1.0.downsample.1.bias`` to ``res2.0.shortcut.norm.bias``."""
    return _rename(name, _TO_DETECTRON2)


def to_torchvision_name(name: str) -> str:
    """The inverse of :func:`to_detectron2_name`."""
    return _rename(name, _TO_TORCHVISION)


def _rename(name: str, rules) -> str:
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def detect_architecture(state_dict: dict[str, Tensor]) -> str:
    """The network of the table whose names and shapes are those of ``state_dict`` (torchvision's names).

    Raises:
        InputError: if none fits, naming what keeps the nearest one from fitting.
    """
    problems = {arch: _problems(state_dict, arch) for arch in ARCHITECTURES}
    arch = min(problems, key=lambda name: len(problems[name]))
    if problems[arch]:
        raise InputError(_misfit(arch, problems[arch], "no known architecture fits; the nearest is "))
    return arch


def check_architecture(state_dict: dict[str, Tensor], arch: str) -> None:
    """Raise :class:`InputError` naming the missing, unexpected and misshaped tensors, if there are any.

    The number of classes is free, and so is the presence of the classifier's layer and of BN's
    ``num_batches_tracked``: a backbone has no use for them.
    """
    get_architecture(arch)
    problems = _problems(state_dict, arch)
    if problems:
        raise InputError(_misfit(arch, problems, "the tensors do not fit "))


@functools.cache
def _shapes(arch: str) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        network = build_classifier(arch)
    return {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}


def _is_counter(name: str) -> bool:
    return name.endswith(".num_batches_tracked")


def _problems(state_dict: dict[str, Tensor], arch: str) -> list[tuple[str, str]]:
    """What is wrong with ``state_dict`` as ``arch``: (kind, description of a tensor), in that order."""
    needed = _shapes(arch)
    found = {name: tuple(tensor.shape) for name, tensor in state_dict.items()}
    headless = not any(name.startswith("fc.") for name in found)
    missing = [
        ("missing", name)
        for name in needed
        if name not in found and not _is_counter(name) and not (headless and name.startswith("fc."))
    ]
    unexpected = [("unexpected", name) for name in found if name not in needed]
    misshaped = [
        ("misshaped", f"{name} {found[name]} instead of {shape}")
        for name, shape in needed.items()
        if name in found and not _same_shape(name, found[name], shape)
    ]
    return missing + unexpected + misshaped


def _same_shape(name: str, found: tuple[int, ...], needed: tuple[int, ...]) -> bool:
    if name.startswith("fc."):  # any number of classes
        return len(found) == len(needed) and found[1:] == needed[1:]
    return found == needed


def _misfit(arch: str, problems: list[tuple[str, str]], what: str) -> str:
    parts = []
    for kind in ("missing", "unexpected", "misshaped"):
        names = [name for problem, name in problems if problem == kind]
        more = f" and {len(names) - 5} more" if len(names) > 5 else ""
        if names:
            parts.append(f"{kind} {', '.join(names[:5])}{more}")
    return f"{what}{arch}: {'; '.join(parts)}"


def parse_threat_model(path: str) -> tuple[str | None, float | None]:
    """(norm, eps) from a published file name: ``resnet50_linf_eps4.0.ckpt`` gives ("linf", 4.0)."""
    match = re.search(r"_(l2|linf)_eps(\d+(?:\.\d+)?)(?=\.\w+$|$)", os.path.basename(path))
    return (match[1], float(match[2])) if match else (None, None)


def fold_default_preprocessing(weight: Tensor, pixel_std: list[float]) -> Tensor:
    """A stem convolution that takes BGR minus mean where ``weight`` takes RGB minus mean over std.

    Args:
        weight: (out, 3, k, k), for RGB.
        pixel_std: RGB, 0..255.

    Returns:
        (out, 3, k, k), for BGR. Exact up to rounding: the mean is still subtracted before the zero
        padding, which therefore stays the mean colour.
    """
    std = torch.tensor(pixel_std, dtype=torch.float64).view(1, 3, 1, 1)
    return (weight.double() / std).flip(1).to(weight.dtype)


def convert_checkpoint(
    source: str,
    output: str,
    arch: str | None = None,
    norm: str | None = None,
    eps: float | None = None,
    input_format: str = "RGB",
) -> Conversion:
    """Write the classifier in ``source`` as a Detectron2 backbone.

    Args:
        source: see :func:`rt_detectron.checkpoint.formats.read_classifier`.
        output: a ``.pkl``, replaced atomically.
        arch: a name of the table; None detects it from the tensors.
        norm, eps: the threat model of its training, eps in the unit of the published names (L2 in [0,1]
            pixels, Linf in 1/255). None takes them from the file's metadata or else its name.
        input_format: "RGB", or "BGR" to fold Detectron2's default preprocessing into the stem.

    Raises:
        InputError: for input that cannot be read or does not fit, and for an impossible output.
    """
    _check_output(source, output)
    if (norm is None) != (eps is None):
        raise InputError("--norm and --eps go together: give both or neither")
    file = read_classifier(source)
    if arch is None:
        arch = detect_architecture(file.state_dict)
    else:
        check_architecture(file.state_dict, arch)
    metadata = _metadata(file, source, arch, norm, eps)
    backbone = {
        to_detectron2_name(name): tensor
        for name, tensor in file.state_dict.items()
        if not name.startswith("fc.") and not _is_counter(name)
    }
    if input_format == "BGR":
        stem = "stem.conv1.weight"
        backbone[stem] = fold_default_preprocessing(backbone[stem], metadata["pixel_std"])
        metadata.update(input_format="BGR", pixel_mean=metadata["pixel_mean"][::-1], pixel_std=[1.0] * 3)
    elif input_format != "RGB":
        raise InputError(f"unknown input format {input_format!r}: RGB or BGR")
    _write_pickle(
        {
            "model": {name: tensor.numpy() for name, tensor in backbone.items()},
            "__author__": "rt_detectron",
            "matching_heuristics": True,
            "rt_detectron": metadata,
        },
        output,
    )
    return Conversion(metadata, len(backbone))


def _check_output(source: str, output: str) -> None:
    if not output.endswith(OUTPUT_FORMATS):
        raise InputError(f"cannot write {output}: the output must end in {' or '.join(OUTPUT_FORMATS)}")
    if os.path.realpath(source) == os.path.realpath(output):
        raise InputError(f"{output} is the input itself: choose another output")
    if os.path.isdir(output):
        raise InputError(f"{output} is a folder: give a file name in it")


def _metadata(file: ClassifierFile, source: str, arch: str, norm: str | None, eps: float | None) -> dict:
    if norm is None:
        norm, eps = file.metadata.get("norm"), file.metadata.get("eps")
    if norm is None and eps is None:  # our standard training says eps 0 without a norm
        norm, eps = parse_threat_model(source)
    if norm is not None:
        _check_threat_model(norm, eps)
    if file.metadata.get("input_format", "RGB") != "RGB":
        raise InputError(
            f"{source} says that its classifier takes {file.metadata['input_format']}: only RGB is known"
        )
    return {
        "arch": arch,
        "norm": norm,
        "eps": None if eps is None else float(eps),
        "input_format": "RGB",
        "pixel_mean": _pixels(
            file.pixel_mean or file.metadata.get("pixel_mean", IMAGENET_MEAN), "pixel_mean"
        ),
        "pixel_std": _pixels(file.pixel_std or file.metadata.get("pixel_std", IMAGENET_STD), "pixel_std"),
        "stride_in_1x1": False,
        "source": os.path.basename(source),
        "sha256": file_sha256(source),
    }


def _check_threat_model(norm: str, eps: float) -> None:
    if norm not in NORMS:
        raise InputError(f"unknown norm {norm!r}: {' or '.join(NORMS)}")
    if not isinstance(eps, int | float) or not math.isfinite(eps) or eps < 0:
        raise InputError(f"eps must be a number from 0 on, found {eps!r}")


def _pixels(values, name: str) -> list[float]:
    lowest = 0.0 if name == "pixel_mean" else 1e-3  # a std of 0 would divide by it
    try:
        values = [float(value) for value in values]
    except (TypeError, ValueError):
        values = []
    if len(values) != 3 or not all(lowest <= value <= 255 for value in values):
        raise InputError(f"the file's {name} is not three numbers in 0..255: its metadata is damaged")
    return values


def _write_pickle(content: dict, path: str) -> None:
    try:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        with replaced_atomically(path) as temporary, open(temporary, "wb") as file:
            pickle.dump(content, file, protocol=4)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}") from None
