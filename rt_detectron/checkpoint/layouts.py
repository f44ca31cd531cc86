"""Which tensors of a file are the network: in which of its state dicts, and behind which prefix.

Both are found by trying where a known network fits, so that no list of wrappers has to be complete:
``module.``, ``_orig_mod.``, ``1.`` of Sequential(normalize, network), DINO's ``teacher``, timm's
``state_dict_ema``.
"""

import re
from collections import Counter
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rt_detectron.checkpoint.architectures import ARCHITECTURES, Architecture, describe, is_counter, misfits
from rt_detectron.checkpoint.formats import WeightsFile
from rt_detectron.utils.errors import InputError

# Names of weights averaged over the training, by what stands in them between points and underscores.
AVERAGED = re.compile(r"(?<![a-z])(ema|swa|averaged?|teacher|polyak)(?![a-z])")
# The robustness package stores the network a second time inside its attacker.
ATTACKER = re.compile(r"(^|\.)attacker\.")
SMALL = 3  # a tensor of so few numbers beside a network is no layer: a mean, a counter


@dataclass(frozen=True)
class Choice:
    """What to read of a file that holds several things.

    Attributes:
        key: where in the file the state dict is, such as "state_dict_ema"; None: wherever the network fits.
        prefix: what stands before the network's own names, such as "module."; None: whatever fits.
        ema: True for weights averaged over the training, False for the others; None: the averaged if any.
    """

    key: str | None = None
    prefix: str | None = None
    ema: bool | None = None


@dataclass(frozen=True, eq=False)
class Network:
    """One network in a file, or what was taken for one.

    Attributes:
        architecture: which.
        state_dict: its tensors under its own names, as they are stored.
        key, prefix: where they are, as in :class:`Choice`.
        beside: small tensors between them that have no place in the network.
        misfits: see :func:`rt_detectron.checkpoint.architectures.misfits`.
    """

    architecture: Architecture
    state_dict: dict[str, Tensor]
    key: str
    prefix: str
    beside: dict[str, Tensor] = field(default_factory=dict)
    misfits: list[tuple[str, str]] = field(default_factory=list)

    @property
    def place(self) -> str:
        """Where it is, in words."""
        where = f"state dict {self.key!r}" if self.key else "state dict that is the file"
        return f"{where}, behind {self.prefix!r}" if self.prefix else where

    @property
    def averaged(self) -> bool:
        """Whether its names say that its weights are an average over the training."""
        return AVERAGED.search(f"{self.key}.{self.prefix}".lower()) is not None


def find_network(
    file: WeightsFile, architecture: Architecture | None, choice: Choice
) -> tuple[Network, list[Network]]:
    """The network in ``file``, and those left aside because its weights are, or are not, averaged.

    Args:
        architecture: which network; None tries all of the table.
        choice: what to take where the file holds several.

    Raises:
        InputError: if nothing fits, naming what keeps the nearest from fitting, or if several different
            networks do.
    """
    tried = _tried(file, architecture, choice)
    fitting = [network for network in tried if not network.misfits]
    if not fitting:
        raise InputError(f"{file.path}: {_nothing_fits(tried, architecture)}")
    fitting = [network for network in fitting if not ATTACKER.search(network.prefix)] or fitting
    averaged = choice.ema if choice.ema is not None else any(network.averaged for network in fitting)
    chosen = [network for network in fitting if network.averaged == averaged]
    if not chosen:
        kind = "averaged weights" if averaged else "weights but averaged ones"
        raise InputError(f"{file.path} holds no {kind}: its network is the {fitting[0].place}")
    different = [network for network in chosen[1:] if not _same(network, chosen[0])]
    if different:
        places = "; ".join(network.place for network in (chosen[0], *different))
        raise InputError(
            f"{file.path} holds several networks ({places}): choose by --key or --prefix of "
            "tools/convert_checkpoint.py"
        )
    return chosen[0], [network for network in fitting if network not in chosen]


def _tried(file: WeightsFile, architecture: Architecture | None, choice: Choice) -> list[Network]:
    state_dicts = {
        key: tensors
        for key, tensors in file.state_dicts.items()
        if choice.key is None or f"{key}.".startswith(f"{choice.key}.")
    }
    if not state_dicts:
        known = ", ".join(repr(key) for key in file.state_dicts)
        raise InputError(f"{file.path} has no state dict {choice.key!r}: it has {known}")
    tried = []
    for key, tensors in state_dicts.items():
        counts = Counter(prefix for name in tensors for prefix in _prefixes(name))
        for prefix in sorted(counts) if choice.prefix is None else [_dotted(choice.prefix)]:
            below = {name.removeprefix(prefix): tensors[name] for name in tensors if name.startswith(prefix)}
            candidates = [architecture] if architecture else _with_stem_of(below)
            # a third: fewer tensors are some layers of a network, and give no helpful message either
            candidates = [known for known in candidates if 3 * len(below) >= len(known.backbone_names)]
            tried += [_fit(known, below, key, prefix) for known in candidates]
    return tried


def _dotted(prefix: str) -> str:
    return f"{prefix.rstrip('.')}." if prefix else ""


def _prefixes(name: str) -> list[str]:
    """For "a.b.weight" these are "", "a." and "a.b."."""
    parts = name.split(".")[:-1]
    return ["".join(f"{part}." for part in parts[:count]) for count in range(len(parts) + 1)]


def _with_stem_of(tensors: dict[str, Tensor]) -> list[Architecture]:
    return [known for known in ARCHITECTURES.values() if f"{known.stem}.weight" in tensors]


def _fit(architecture: Architecture, tensors: dict[str, Tensor], key: str, prefix: str) -> Network:
    try:
        found = architecture.family.translate(architecture, tensors)
    except Exception:  # whatever tensors of another network lead a library's translation into
        found = tensors
    known = architecture.shapes
    beside = {name: found[name] for name in found if name not in known and found[name].numel() <= SMALL}
    state_dict = {name: tensor for name, tensor in found.items() if name not in beside}
    return Network(architecture, state_dict, key, prefix, beside, misfits(state_dict, architecture))


def _same(one: Network, other: Network) -> bool:
    return one.architecture is other.architecture and all(
        name in other.state_dict and torch.equal(tensor, other.state_dict[name])
        for name, tensor in one.state_dict.items()
        if not is_counter(name)
    )


def _nothing_fits(tried: list[Network], architecture: Architecture | None) -> str:
    """What keeps the nearest network from fitting, unless it is as far away as any."""
    nearest = min(tried, key=lambda network: len(network.misfits), default=None)
    problem = describe(nearest.misfits) if nearest else "they are far fewer, or have other names"
    if architecture is not None:
        return f"the tensors do not fit {architecture.name}: {problem}; give the file's own --arch"
    way_out = "a timm network needs --arch timm/NAME"
    if nearest is None or len(nearest.misfits) > len(nearest.architecture.shapes) / 2:
        return f"no known architecture fits; known are {', '.join(ARCHITECTURES)}; {way_out}"
    return f"no known architecture fits; the nearest is {nearest.architecture.name}: {problem}; {way_out}"
