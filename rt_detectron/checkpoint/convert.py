"""Conversion of classifier files to backbones, and between the formats of classifiers."""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rt_detectron.checkpoint.architectures import TIMM_FAMILY, Architecture, get_architecture
from rt_detectron.checkpoint.formats import (
    WRITERS,
    WeightsFile,
    file_architecture,
    file_name,
    read_weights,
)
from rt_detectron.checkpoint.layouts import Choice, Network, find_network
from rt_detectron.checkpoint.metadata import INPUT_FORMATS, Metadata
from rt_detectron.checkpoint.preprocessing import close
from rt_detectron.checkpoint.statements import (
    SAY_PIXELS,
    Pixels,
    check_lookalikes,
    guessed_network,
    lookalike,
    stored_pixels,
)
from rt_detectron.utils.errors import InputError, one_line
from rt_detectron.utils.files import file_sha256, replaced_atomically

ANY = Choice()
HALF_PRECISION = 0.1  # of 0..255; what a mean stored in half precision may be away from the published one
UNIT_PIXELS: Pixels = ((0.0,) * 3, (255.0,) * 3)  # of a network that takes images in [0, 1] as they are


@dataclass
class Weights:
    """A network out of a file; see :func:`read_network`.

    Attributes:
        architecture: which network.
        state_dict: its tensors on the CPU under its own names, floats as float32.
        metadata: what is known of it.
        pixels_are_known: whether its mean and std are those of the file, and not a guess.
        guesses: what is not known but assumed, a sentence each.
        remarks: what was read where the file holds several networks, a sentence each.
    """

    architecture: Architecture
    state_dict: dict[str, Tensor]
    metadata: Metadata
    pixels_are_known: bool
    guesses: list[str]
    remarks: list[str]


@dataclass
class Conversion:
    """What :func:`convert_checkpoint` wrote: the file's metadata and its number of tensors.

    ``guesses`` and ``remarks`` are those of :class:`Weights`.
    """

    metadata: Metadata
    num_tensors: int
    guesses: list[str]
    remarks: list[str]


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
    source: str | os.PathLike,
    output: str | os.PathLike,
    arch: str | None = None,
    norm: str | None = None,
    eps: float | None = None,
    input_format: str = "RGB",
    choice: Choice = ANY,
    pixels: Pixels | None = None,
    published: Pixels | None = None,
) -> Conversion:
    """Write the network in ``source`` in the format that the ending of ``output`` names.

    Args:
        source: see :func:`rt_detectron.checkpoint.formats.read_weights`.
        output: ``.pkl`` (Detectron2 backbone), ``.pth`` (torchvision's state dict), ``.ckpt`` (the layout of
            the robustness package) or ``.safetensors``; replaced atomically. Only a ``.pkl`` leaves out
            the classifier's own layers.
        arch, norm, eps, choice, pixels, published: see :func:`read_network`.
        input_format: "RGB", or "BGR" to fold Detectron2's default preprocessing into the stem of a ``.pkl``.

    Raises:
        InputError: for input that cannot be read or does not fit, and for an impossible output.
    """
    source, output = file_name(source), file_name(output)
    _check_output(source, output)
    ending = os.path.splitext(output)[1]
    if input_format not in INPUT_FORMATS:
        raise InputError(f"unknown input format {input_format!r}: {' or '.join(INPUT_FORMATS)}")
    if input_format == "BGR" and ending != ".pkl":
        raise InputError(f"BGR weights are for Detectron2: give a .pkl to write instead of {output}")
    weights = read_network(source, arch, norm, eps, choice, pixels, published)
    if input_format == "BGR":
        weights = _folded(weights, source)
    state_dict = weights.state_dict
    if ending == ".pkl":
        state_dict = {
            in_backbone: state_dict[name]
            for name, in_backbone in weights.architecture.backbone_names.items()
            if name in state_dict
        }
    _write(ending, state_dict, weights.metadata, output)
    return Conversion(weights.metadata, len(state_dict), weights.guesses, weights.remarks)


def read_network(
    source: str | os.PathLike,
    arch: str | Architecture | None = None,
    norm: str | None = None,
    eps: float | None = None,
    choice: Choice = ANY,
    pixels: Pixels | None = None,
    published: Pixels | None = None,
) -> Weights:
    """The network in ``source``, and what is known of it.

    Args:
        source: see :func:`rt_detectron.checkpoint.formats.read_weights`.
        arch: a name of the table or ``timm/NAME``; None takes the file's metadata or else detects it from
            the tensors (timm's cannot be).
        norm: of the threat model of its training: "l1", "l2" or "linf". None takes norm and eps from
            the file's metadata or else its name.
        eps: of that threat model, of images in [0, 1], for "linf" in 1/255.
        choice: what to read where the file holds several networks.
        pixels: mean and std, RGB in 0..255, that the network subtracts and divides by; None takes what the
            file says, or else ``published``, or else what is usual for ``arch``.
        published: the same as the source of the file gives them, which the file must not contradict.

    Raises:
        InputError: for a file that cannot be read, tensors that are not those of ``arch``, and a file that
            contradicts itself or says what cannot be understood.
    """
    if (norm is None) != (eps is None):
        raise InputError("--norm and --eps go together: give both or neither")
    file = read_weights(source)
    if arch is None and file.metadata is not None:
        arch = file_architecture(file.metadata, file.path)
    network, others = find_network(file, get_architecture(arch) if arch is not None else None, choice)
    architecture, guesses = network.architecture, []
    if arch is None:
        check_lookalikes(file, architecture)
        guesses += guessed_network(file, architecture)
    elif file.metadata is None and architecture.family is not TIMM_FAMILY and (doubt := lookalike(file)):
        guesses.append(f"the network is taken for {architecture.name} as you say, but {doubt}")
    said = pixels or _pixels(file, network)
    if (
        said
        and published
        and not all(close(*both, HALF_PRECISION) for both in zip(said, published, strict=True))
    ):
        raise InputError(
            f"{file.path} holds {_in_words(said)}, but {_in_words(published)} was published with it: replace "
            "it by the published file"
        )
    said = published or said
    pixels = said or (architecture.pixel_mean, architecture.pixel_std)
    if said is None:
        guesses.append(f"the file holds no mean and std: taken for {_in_words(pixels)}; or {SAY_PIXELS}")
    return Weights(
        architecture,
        {name: _as_float32(tensor, name, file.path) for name, tensor in network.state_dict.items()},
        _metadata(file, architecture, norm, eps, pixels),
        said is not None,
        guesses,
        [f"read the {network.place}, not the {other.place}: --ema and --no-ema choose" for other in others],
    )


def _folded(weights: Weights, path: str) -> Weights:
    """``weights`` for Detectron2's default preprocessing.

    Raises:
        InputError: unless the stem computes the same with them. One that standardises its own weights
            (timm's StdConv2d and ScaledStdConv2d, in BiT and NFNets) undoes what is folded into them.
    """
    architecture, metadata = weights.architecture, weights.metadata
    stem = f"{architecture.stem}."
    tensors = {name.removeprefix(stem): t for name, t in weights.state_dict.items() if name.startswith(stem)}
    folded = {**tensors, "weight": fold_default_preprocessing(tensors["weight"], metadata.pixel_std)}
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (metadata.pixel_mean, metadata.pixel_std))
    centred = 255 * torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) - mean
    module = architecture.skeleton.get_submodule(architecture.stem)
    expected = torch.func.functional_call(module, tensors, centred / std)
    found = torch.func.functional_call(module, folded, centred.flip(1))
    if (found - expected).abs().max() > 1e-4 * expected.abs().max():
        raise InputError(
            f"{path}: the first convolution of {architecture.name} standardises its own weights, so no "
            "preprocessing can be folded into them: convert it without --input-format BGR"
        )
    state_dict = {**weights.state_dict, f"{stem}weight": folded["weight"]}
    return replace(weights, state_dict=state_dict, metadata=metadata.folded())


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


def _pixels(file: WeightsFile, network: Network) -> Pixels | None:
    """What the file says of mean and std, in its tensors or its metadata."""
    stored = stored_pixels(file, network)
    known = file.metadata and (file.metadata.pixel_mean, file.metadata.pixel_std)
    if stored and known and not all(map(close, stored, known)):
        raise InputError(
            f"{file.path} holds {_in_words(stored)}, and its metadata says {_in_words(known)}: {SAY_PIXELS}"
        )
    return known or stored


def _in_words(pixels: Pixels) -> str:
    mean, std = (" ".join(f"{number:g}" for number in numbers) for numbers in pixels)
    return f"{mean} and {std}"


def _as_float32(tensor: Tensor, name: str, path: str) -> Tensor:
    if not tensor.is_floating_point():
        if name.endswith((".weight", ".bias", ".running_mean", ".running_var")):
            raise InputError(
                f"{path}: tensor {name} holds {tensor.dtype} and no weights: save them as floats"
            )
        return tensor
    tensor = tensor.float()
    if not torch.isfinite(tensor).all():
        raise InputError(f"{path}: tensor {name} holds NaN or infinity: the training behind it diverged")
    return tensor


def _metadata(
    file: WeightsFile, architecture: Architecture, norm: str | None, eps: float | None, pixels: Pixels
) -> Metadata:
    known = file.metadata
    if known is not None and known.input_format != "RGB":
        raise InputError(
            f"{file.path} holds weights for {known.input_format} images: convert the file it was made from"
        )
    if norm is None and known is not None:
        norm, eps = known.norm, known.eps
    if norm is None and eps is None:  # our standard training says eps 0 without a norm
        norm, eps = parse_threat_model(file.path)
    if known is not None and known.sha256 is not None:  # converted before: it says where it came from
        origin = {"source": known.source, "sha256": known.sha256}
    else:
        name = "".join(letter if letter.isprintable() else "?" for letter in os.path.basename(file.path))
        origin = {"source": name, "sha256": file_sha256(file.path)}
    try:
        return Metadata(
            architecture.name,
            norm,
            eps,
            input_format="RGB",
            pixel_mean=pixels[0],
            pixel_std=pixels[1],
            stride_in_1x1=False,
            **origin,
        )
    except InputError as error:
        raise InputError(f"{file.path}: {error}") from None
