"""Conversion of classifier files to backbones, and between the formats of classifiers."""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rt_detectron.checkpoint.architectures import (
    Architecture,
    check_architecture,
    detect_architecture,
    get_architecture,
)
from rt_detectron.checkpoint.formats import WRITERS, ClassifierFile, read_classifier
from rt_detectron.checkpoint.metadata import INPUT_FORMATS, Metadata
from rt_detectron.utils.errors import InputError, one_line
from rt_detectron.utils.files import file_sha256, replaced_atomically


@dataclass
class Conversion:
    """What :func:`convert_checkpoint` wrote: the file's metadata and its number of tensors."""

    metadata: Metadata
    num_tensors: int


def parse_threat_model(path: str) -> tuple[str | None, float | None]:
    """(norm, eps) from a published file name: ``resnet50_linf_eps4.0.ckpt`` gives ("linf", 4.0)."""
    match = re.search(r"_(l2|linf)_eps(\d+(?:\.\d+)?)(?=\.\w+$|$)", os.path.basename(path))
    return (match[1], float(match[2])) if match else (None, None)


def fold_default_preprocessing(weight: Tensor, pixel_std: Sequence[float]) -> Tensor:
    """The stem convolution for input (BGR - mean), made from ``weight`` for input (RGB - mean) / std.

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
        norm: of the threat model of its training: "l1", "l2" or "linf". None takes norm and eps from
            the file's metadata or else its name.
        eps: of that threat model, of images in [0, 1], for "linf" in 1/255.
        input_format: "RGB", or "BGR" to fold Detectron2's default preprocessing into the stem of a ``.pkl``.

    Raises:
        InputError: for input that cannot be read or does not fit, and for an impossible output.
    """
    _check_output(source, output)
    ending = os.path.splitext(output)[1]
    if (norm is None) != (eps is None):
        raise InputError("--norm and --eps go together: give both or neither")
    if input_format not in INPUT_FORMATS:
        raise InputError(f"unknown input format {input_format!r}: {' or '.join(INPUT_FORMATS)}")
    if input_format == "BGR" and ending != ".pkl":
        raise InputError(f"BGR weights are for Detectron2: give a .pkl to write instead of {output}")
    architecture, state_dict, metadata = read_network(source, arch, norm, eps)
    if ending == ".pkl":
        state_dict = {
            in_backbone: state_dict[name]
            for name, in_backbone in architecture.backbone_names.items()
            if name in state_dict
        }
    if input_format == "BGR":
        stem = architecture.backbone_names[f"{architecture.stem}.weight"]
        state_dict[stem] = fold_default_preprocessing(state_dict[stem], metadata.pixel_std)
        metadata = replace(
            metadata, input_format="BGR", pixel_mean=metadata.pixel_mean[::-1], pixel_std=(1.0,) * 3
        )
    _write(ending, state_dict, metadata, output)
    return Conversion(metadata, len(state_dict))


def read_network(
    source: str,
    arch: str | Architecture | None = None,
    norm: str | None = None,
    eps: float | None = None,
) -> tuple[Architecture, dict[str, Tensor], Metadata]:
    """The network in ``source``, its state dict and its metadata; see :func:`convert_checkpoint`.

    Raises:
        InputError: for a file that cannot be read, and for tensors that are not those of ``arch``.
    """
    file = read_classifier(source)
    if arch is None and file.metadata is not None:
        arch = file.metadata.arch
    architecture = get_architecture(arch or detect_architecture(file.state_dict))
    try:
        state_dict = architecture.family.translate(architecture, file.state_dict)
    except Exception as error:  # whatever tensors of another network lead a library's translation into
        reason = one_line(error)[:120]
        raise InputError(f"{source} is no {architecture.name} ({reason}): give its own --arch") from None
    check_architecture(state_dict, architecture)
    return architecture, state_dict, _metadata(file, source, architecture, norm, eps)


def _check_output(source: str, output: str) -> None:
    if not output.endswith(tuple(WRITERS)):
        raise InputError(f"cannot write {output}: the output must end in {', '.join(WRITERS)}")
    if os.path.realpath(source) == os.path.realpath(output):
        raise InputError(f"{output} is the input itself: choose another output")
    if os.path.isdir(output):
        raise InputError(f"{output} is a folder: give a file name in it")


def _write(ending: str, state_dict: dict[str, Tensor], metadata: Metadata, path: str) -> None:
    try:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        with replaced_atomically(path) as temporary:
            WRITERS[ending](state_dict, metadata, temporary)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        raise InputError(
            f"cannot write {path}: {getattr(error, 'strerror', None) or one_line(error)}"
        ) from None


def _metadata(
    file: ClassifierFile, source: str, architecture: Architecture, norm: str | None, eps: float | None
) -> Metadata:
    known = file.metadata
    if known is not None and known.input_format != "RGB":
        raise InputError(
            f"{source} holds weights for {known.input_format} images: convert the file it was made from"
        )
    if norm is None and known is not None:
        norm, eps = known.norm, known.eps
    if norm is None and eps is None:  # our standard training says eps 0 without a norm
        norm, eps = parse_threat_model(source)
    if known is not None and known.sha256 is not None:  # converted before: it says where it came from
        origin = {"source": known.source, "sha256": known.sha256}
    else:
        origin = {"source": os.path.basename(source), "sha256": file_sha256(source)}
    return Metadata(
        architecture.name,
        norm,
        eps,
        input_format="RGB",
        pixel_mean=file.pixel_mean or (known or architecture).pixel_mean,
        pixel_std=file.pixel_std or (known or architecture).pixel_std,
        stride_in_1x1=False,
        **origin,
    )
