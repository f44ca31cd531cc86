"""What a file says of its network beside the tensors, which do not tell its activations or its pixels."""

import os
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence

from rt_detectron.checkpoint.architectures import IMAGENET_MEAN, RESNET, Architecture
from rt_detectron.checkpoint.formats import WeightsFile
from rt_detectron.checkpoint.layouts import Network
from rt_detectron.utils.errors import InputError

Pixels = tuple[tuple[float, ...], tuple[float, ...]]  # mean and std, RGB, 0..255
SAY_PIXELS = (
    "say them by --pixel-mean and --pixel-std of tools/convert_checkpoint.py (none: the network takes images "
    "in [0, 1])"
)

# The last part of a name, as normalisations call their numbers: mean, mu, new_mean; std, sigma, pixel_std.
ROLES = {"mean": re.compile(r"mean|(^|_)mu$"), "std": re.compile(r"std|sigma|(^|_)sd$")}

_WORD = r"(?<![a-z]){}(?![a-z])"
_ACTIVATIONS = "gelu|silu|swish|hard_?swish|mish|[sc]?elu|p_?relu|leaky_?relu|softplus"
# Words that stand for a network with the same tensors as one of the table, which computes something else.
LOOKALIKES = {
    "it has other activations than ReLU": re.compile(_WORD.format(f"({_ACTIVATIONS})")),
    # ARES 2.0 (thu-ml/ares): resnet152_at and wresnet50_at, as its model zoo and its files call them.
    "ARES trained it with GELU": re.compile(r"(?<![a-z])(resnet152|w(ide_)?resnet50(_2)?)_at(?![a-z])"),
    "it has blurred or averaged strides": re.compile(r"resnet_?(aa|blur)|blur_?pool|anti_?alias"),
    "it has the strides of Caffe's networks in the 1x1 convolutions": re.compile(
        _WORD.format("(caffe|msra)")
    ),
    "it is dilated": re.compile(_WORD.format("(deeplab(v3)?(plus)?|fcn|pspnet|lraspp|dilated)")),
}


def check_lookalikes(file: WeightsFile, architecture: Architecture) -> None:
    """Raise :class:`InputError` if the file's name or a setting in it speaks against ``architecture``."""
    if doubt := lookalike(file):
        name = architecture.name
        raise InputError(
            f"{file.path}: its tensors fit {name}, but {doubt}; give --arch {name} if it is one all the "
            "same, or timm's own name for it (such as timm/resnetblur50 or timm/resnet50:act_layer=gelu)"
        )


def lookalike(file: WeightsFile) -> str | None:
    """What in the file's name and settings says that it is no network of the table, in words."""
    for where, text in _texts(file):
        for reason, words in LOOKALIKES.items():
            if found := words.search(text.lower()):
                return f"{where} says {found[0]!r}: perhaps {reason}"
    return None


def _texts(file: WeightsFile) -> Iterator[tuple[str, str]]:
    """Where a short text stands, and the text; a switch that is on counts by its name."""
    yield "its name", os.path.basename(file.path)
    for key, value in file.settings.items():
        if isinstance(value, str) and len(value) <= 100:
            yield f"its entry {key}", value
        elif value is True:
            yield f"its entry {key}", key.rpartition(".")[2]


def is_named(file: WeightsFile, architecture: Architecture) -> bool:
    """Whether the file says, as its authors would, that it is ``architecture`` as torchvision builds it.

    That is a published name (resnet50_l2_eps3.ckpt, resnet50-0676ba61.pth) or an entry ``arch``.
    """
    stem = os.path.basename(file.path).split(".", 1)[0]
    published = re.fullmatch(rf"{architecture.name}(-[0-9a-f]{{8}}|_(l2|linf)_eps\d+)?", stem)
    return published is not None or file.settings.get("arch") == architecture.name


def guessed_network(file: WeightsFile, architecture: Architecture) -> list[str]:
    """What is assumed of a network that was found by its tensors alone, in words."""
    if is_named(file, architecture):
        return []
    relu = ", its activations for ReLU" if architecture.family is RESNET else ""
    return [f"the network is taken for {architecture.name} by its tensors{relu}; --arch says it for certain"]


def stored_pixels(file: WeightsFile, network: Network) -> Pixels | None:
    """The mean and std that the file says its network subtracts and divides by; None if it says nothing.

    Raises:
        InputError: if it holds three numbers that cannot be told to be that, or contradicts itself.
    """
    vectors = dict(_vectors(file, network))
    groups: dict[tuple[str, str], dict[str, str]] = defaultdict(dict)
    unclear = []
    for name in vectors:
        parent, _, last = name.lower().rpartition(".")
        role = next((role for role, pattern in ROLES.items() if pattern.search(last)), None)
        if role is None:
            unclear.append(name)
        else:
            groups[parent, ROLES[role].sub("", last)][role] = name
    unclear += [name for group in groups.values() if len(group) == 1 for name in group.values()]
    unclear = [name for name in unclear if len(vectors[name]) == 3]  # a single number may be anything
    pairs = {
        _in_255(vectors[group["mean"]], vectors[group["std"]]) for group in groups.values() if len(group) == 2
    }
    if unclear:
        problem = f"{', '.join(unclear[:3])}, three numbers that may be its mean or std"
    elif len(pairs) > 1:
        problem = f"several means and stds that differ ({', '.join(map(str, sorted(pairs)))})"
    elif any(_is_bgr(mean) for mean, _ in pairs):
        problem = "ImageNet's mean in the order of BGR, and RGB weights are needed"
    else:
        return next(iter(pairs), None)
    raise InputError(f"{file.path} holds {problem}: {SAY_PIXELS}")


def _vectors(file: WeightsFile, network: Network) -> Iterator[tuple[str, tuple[float, ...]]]:
    """The single numbers and threes of numbers in the file that are no part of a network, by name.

    Those of other state dicts, and of settings, only if their name says that they are a mean or a std.
    """
    for key, tensors in file.state_dicts.items():
        for name, tensor in tensors.items():
            full = f"{key}.{name}" if key else name
            own = key == network.key
            of_network = name.startswith(network.prefix) and name[len(network.prefix) :] not in network.beside
            if tensor.numel() in (1, 3) and (not of_network if own else _has_role(name)):
                yield full, tuple(tensor.double().flatten().tolist())
    for name, value in file.settings.items():
        if _has_role(name) and isinstance(value, list | tuple) and _are_three_numbers(value):
            yield name, tuple(map(float, value))


def _are_three_numbers(values: Sequence) -> bool:
    return len(values) == 3 and all(type(value) in (int, float) for value in values)


def _has_role(name: str) -> bool:
    last = name.lower().rpartition(".")[2]
    return any(pattern.search(last) for pattern in ROLES.values())


def _in_255(mean: tuple[float, ...], std: tuple[float, ...]) -> Pixels:
    """In 0..255, whether they are stored for images in [0, 1] or in 0..255; one number serves all colours."""
    scale = 255 if max(*mean, *std) <= 1 else 1
    mean, std = (numbers * (3 // len(numbers)) for numbers in (mean, std))
    rounded = [tuple(round(scale * number, 4) for number in numbers) for numbers in (mean, std)]
    return rounded[0], rounded[1]  # rounded: 0.485 is stored as 0.48500001


def _is_bgr(mean: tuple[float, ...]) -> bool:
    return all(abs(a - b) < 1 for a, b in zip(mean, IMAGENET_MEAN[::-1], strict=True))
