"""From a classifier's file to a backbone's, and between the formats that classifiers come in."""

import math
import os
import re
import sys
from dataclasses import dataclass

import torch
from torch import Tensor

from rt_detectron.checkpoint.architectures import (
    TIMM,
    backbone_names,
    build_classifier,
    check_architecture,
    detect_architecture,
    get_architecture,
)
from rt_detectron.checkpoint.formats import WRITERS, ClassifierFile, read_classifier
from rt_detectron.utils.errors import InputError, one_line
from rt_detectron.utils.files import file_sha256, replaced_atomically

NORMS = ("l1", "l2", "linf")


@dataclass
class Conversion:
    """What :func:`convert_checkpoint` wrote: the file's metadata and its number of tensors."""

    metadata: dict
    num_tensors: int


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
    """Write the network in ``source`` in the format that the ending of ``output`` names.

    Args:
        source: see :func:`rt_detectron.checkpoint.formats.read_classifier`.
        output: ``.pkl`` (Detectron2 backbone), ``.pth`` (torchvision's state dict), ``.ckpt`` (the layout of
            the robustness package) or ``.safetensors``; replaced atomically. Only a ``.pkl`` leaves out
            the classifier's own layers.
        arch: a name of the table or ``timm/NAME``; None takes the file's metadata or else detects it from
            the tensors (timm's cannot be).
        norm, eps: the threat model of its training, eps in the unit of the published names (L2 in [0,1]
            pixels, Linf in 1/255). None takes them from the file's metadata or else its name.
        input_format: "RGB", or "BGR" to fold Detectron2's default preprocessing into the stem of a ``.pkl``.

    Raises:
        InputError: for input that cannot be read or does not fit, and for an impossible output.
    """
    _check_output(source, output)
    if (norm is None) != (eps is None):
        raise InputError("--norm and --eps go together: give both or neither")
    state_dict, metadata = read_network(source, arch, norm, eps)
    arch = metadata["arch"]
    ending = os.path.splitext(output)[1]
    if ending == ".pkl":
        state_dict = {
            in_backbone: state_dict[name]
            for name, in_backbone in backbone_names(arch).items()
            if name in state_dict
        }
    if input_format == "BGR":
        if ending != ".pkl":
            raise InputError(f"BGR weights are for Detectron2: give a .pkl to write instead of {output}")
        stem = backbone_names(arch)[f"{get_architecture(arch).stem}.weight"]
        state_dict[stem] = fold_default_preprocessing(state_dict[stem], metadata["pixel_std"])
        metadata.update(input_format="BGR", pixel_mean=metadata["pixel_mean"][::-1], pixel_std=[1.0] * 3)
    elif input_format != "RGB":
        raise InputError(f"unknown input format {input_format!r}: RGB or BGR")
    _write(ending, state_dict, metadata, output)
    return Conversion(metadata, len(state_dict))


def read_network(
    source: str, arch: str | None = None, norm: str | None = None, eps: float | None = None
) -> tuple[dict[str, Tensor], dict]:
    """The state dict of the network in ``source``, and what is known of it; see :func:`convert_checkpoint`.

    Raises:
        InputError: for a file that cannot be read, and for tensors that are not those of ``arch``.
    """
    file = read_classifier(source)
    arch = arch or str(file.metadata.get("arch", "")) or detect_architecture(file.state_dict)
    state_dict = _in_current_timm_names(file.state_dict, arch, source)
    check_architecture(state_dict, arch)
    return state_dict, _metadata(file, source, arch, norm, eps)


def _check_output(source: str, output: str) -> None:
    if not output.endswith(tuple(WRITERS)):
        raise InputError(f"cannot write {output}: the output must end in {', '.join(WRITERS)}")
    if os.path.realpath(source) == os.path.realpath(output):
        raise InputError(f"{output} is the input itself: choose another output")
    if os.path.isdir(output):
        raise InputError(f"{output} is a folder: give a file name in it")


def _write(ending: str, state_dict: dict[str, Tensor], metadata: dict, path: str) -> None:
    try:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        with replaced_atomically(path) as temporary:
            WRITERS[ending](state_dict, metadata, temporary)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        raise InputError(
            f"cannot write {path}: {getattr(error, 'strerror', None) or one_line(error)}"
        ) from None


def _in_current_timm_names(state_dict: dict[str, Tensor], arch: str, source: str) -> dict[str, Tensor]:
    """timm's own translation of files of its earlier releases and of a network's original authors."""
    if not arch.startswith(TIMM):
        return state_dict
    with torch.device("meta"):
        network = build_classifier(arch)
    translate = getattr(sys.modules[type(network).__module__], "checkpoint_filter_fn", None)
    if translate is None:
        return state_dict
    try:
        return dict(translate(dict(state_dict), network))
    except Exception as error:  # whatever tensors of another network lead it into
        raise InputError(f"{source} is no {arch} ({one_line(error)[:120]}): give its own --arch") from None


def _metadata(file: ClassifierFile, source: str, arch: str, norm: str | None, eps: float | None) -> dict:
    known = file.metadata
    if norm is None:
        norm, eps = known.get("norm"), known.get("eps")
    if norm is None and eps is None:  # our standard training says eps 0 without a norm
        norm, eps = parse_threat_model(source)
    if norm is not None:
        _check_threat_model(norm, eps)
    if known.get("input_format", "RGB") != "RGB":
        raise InputError(
            f"{source} holds weights for {known['input_format']} images: convert the file it was made from"
        )
    default = get_architecture(arch)
    pixel_mean = file.pixel_mean or known.get("pixel_mean", default.pixel_mean)
    pixel_std = file.pixel_std or known.get("pixel_std", default.pixel_std)
    # A file that was converted before says where it came from.
    original = (
        known if "sha256" in known else {"source": os.path.basename(source), "sha256": file_sha256(source)}
    )
    return {
        "arch": arch,
        "norm": norm,
        "eps": None if eps is None else float(eps),
        "input_format": "RGB",
        "pixel_mean": _pixels(pixel_mean, "pixel_mean"),
        "pixel_std": _pixels(pixel_std, "pixel_std"),
        "stride_in_1x1": False,
        "source": str(original.get("source")),
        "sha256": str(original["sha256"]),
    }


def _check_threat_model(norm: str, eps: float) -> None:
    if norm not in NORMS:
        raise InputError(f"unknown norm {norm!r}: {', '.join(NORMS)}")
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
