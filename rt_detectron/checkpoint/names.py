"""Which network a set of tensors is, and what its tensors are called in a Detectron2 backbone."""

import functools
import re

import torch
from torch import Tensor

from rt_detectron.checkpoint.architectures import (
    ARCHITECTURES,
    TIMM,
    build_classifier,
    get_architecture,
    import_timm,
)
from rt_detectron.utils.errors import InputError

# torchvision's ResNets -> Detectron2's, each rule on the outcome of the one before it.
_TO_DETECTRON2 = (
    (r"^(conv1|bn1)\.", r"stem.\1."),
    (r"^layer(\d)\.", lambda match: f"res{int(match[1]) + 1}."),
    (r"\bbn(\d)\.", r"conv\1.norm."),
    (r"\bdownsample\.0\.", "shortcut."),
    (r"\bdownsample\.1\.", "shortcut.norm."),
)


@functools.cache
def backbone_names(arch: str) -> dict[str, str]:
    """The names of a classifier's tensors, as far as its backbone has them, to those in the backbone.

    ``layer1.0.downsample.1.bias`` to ``res2.0.shortcut.norm.bias`` for a ResNet, which is Detectron2's own;
    ``features.conv0.weight`` to ``trunk.features.conv0.weight`` for a network that a feature extractor
    wraps. BN's counters, which no backbone uses, are left out.
    """
    architecture = get_architecture(arch)
    names = [n for n in _shapes(arch) if not n.startswith(architecture.head) and not is_counter(n)]
    if architecture.resnets:
        return {name: _to_detectron2(name) for name in names}
    if arch.startswith(TIMM):
        return _timm_names(arch, names)
    return {name: f"trunk.{name}" for name in names}


def is_counter(name: str) -> bool:
    """Whether a tensor is BN's count of batches: no number that a network computes with."""
    return name.endswith(".num_batches_tracked")


def _to_detectron2(name: str) -> str:
    for pattern, replacement in _TO_DETECTRON2:
        name = re.sub(pattern, replacement, name)
    return name


def _timm_names(arch: str, names: list[str]) -> dict[str, str]:
    """By comparison with timm's features_only model, which flattens ``stages.0`` to ``stages_0``."""
    with torch.device("meta"):
        features = import_timm().create_model(arch.removeprefix(TIMM), features_only=True)
    flat = {name.removeprefix("model.").replace(".", "_"): name for name in features.state_dict()}
    return {name: f"trunk.{flat[key]}" for name in names if (key := name.replace(".", "_")) in flat}


def detect_architecture(state_dict: dict[str, Tensor]) -> str:
    """The network of the table whose names and shapes are those of ``state_dict``, a classifier's.

    Raises:
        InputError: if none fits, naming what keeps the nearest one from fitting.
    """
    candidates = [a for a, known in ARCHITECTURES.items() if f"{known.stem}.weight" in state_dict]
    problems = {arch: _problems(state_dict, arch) for arch in candidates or ARCHITECTURES}
    arch = min(problems, key=lambda name: len(problems[name]))
    if problems[arch]:
        raise InputError(
            _misfit(arch, problems[arch], "no known architecture fits; the nearest is ")
            + "; a timm network needs --arch timm/NAME"
        )
    return arch


def check_architecture(state_dict: dict[str, Tensor], arch: str) -> None:
    """Raise :class:`InputError` naming the missing, unexpected and misshaped tensors, if there are any.

    The number of classes is free, and so is the presence of BN's ``num_batches_tracked`` and of all that
    only the classifier has: a backbone has no use for them.
    """
    problems = _problems(state_dict, arch)
    if problems:
        raise InputError(_misfit(arch, problems, "the tensors do not fit "))


@functools.cache
def _shapes(arch: str) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        network = build_classifier(arch)
    return {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}


def _problems(state_dict: dict[str, Tensor], arch: str) -> list[tuple[str, str]]:
    """What is wrong with ``state_dict`` as ``arch``: (kind, description of a tensor), in that order."""
    head = get_architecture(arch).head
    known = _shapes(arch)
    found = {name: tuple(tensor.shape) for name, tensor in state_dict.items()}
    needed = known if any(name.startswith(head) for name in found) else backbone_names(arch)
    missing = [("missing", name) for name in needed if name not in found and not is_counter(name)]
    unexpected = [("unexpected", name) for name in found if name not in known]
    misshaped = [
        ("misshaped", f"{name} {found[name]} instead of {shape}")
        for name, shape in known.items()
        if name in found and not _same_shape(found[name], shape, any_classes=name.startswith(head))
    ]
    return missing + unexpected + misshaped


def _same_shape(found: tuple[int, ...], needed: tuple[int, ...], any_classes: bool) -> bool:
    return (found[1:] == needed[1:] and len(found) == len(needed)) if any_classes else found == needed


def _misfit(arch: str, problems: list[tuple[str, str]], what: str) -> str:
    parts = []
    for kind in ("missing", "unexpected", "misshaped"):
        names = [name for problem, name in problems if problem == kind]
        more = f" and {len(names) - 5} more" if len(names) > 5 else ""
        if names:
            parts.append(f"{kind} {', '.join(names[:5])}{more}")
    return f"{what}{arch}: {'; '.join(parts)}"
