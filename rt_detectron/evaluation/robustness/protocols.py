"""Published protocols of attacks on detectors, by TEST.ATTACK.PROTOCOL."""

from typing import Any

from detectron2.config import CfgNode, get_cfg

from rt_detectron.config import add_robust_config
from rt_detectron.utils.errors import InputError, did_you_mean

OURS = "ours"  # no publication's: what the keys say
# What a published one sets of TEST.ATTACK unless it says otherwise below.
_PLAIN: dict[str, Any] = {
    "L2_EPS": (),
    "ADAPTIVE": False,
    "REDUCE_RADIUS": False,
    "RESTARTS": 1,
    "BEST": False,
    "TARGETED": False,
    "CLIP": 0.0,
    "PADDING": False,
}
PROTOCOLS: dict[str, dict[str, Any]] = {
    OURS: {},
    # Li et al., TIFS 2025, and their code, thu-ml/oddefense: mmdet/apis/test.py and the configs.
    "oddefense": {
        **_PLAIN,
        "LINF_EPS": (4,),
        "STEPS": 10,
        "STEP_SIZE": 1.0,
        "START": "image",
        "LOSSES": ("A_cls", "A_reg", "A_cwa"),
        "CLIP": 6.0,
        "PADDING": True,
    },
    # ARES 2.0, thu-ml/ares: detection/configs/global.
    "ares": {
        **_PLAIN,
        "LINF_EPS": (2,),
        "STEPS": 20,
        "STEP_SIZE": 1.0,
        "START": "random",
        "LOSSES": ("no_regression",),
    },
    # The Segmentation Ensemble Attack, Croce, Singh & Hein (ECCV 2024), for any Linf eps. Their code,
    # nmndeep/robust-segmentation, has the steps and radii (semseg/utils/attacker.py, tools/infer.py); since
    # the paper it has other losses.
    "sea": {
        **_PLAIN,
        "STEPS": 300,
        "STEP_SIZE": 0.0,
        "ADAPTIVE": True,
        "REDUCE_RADIUS": True,
        "START": "random",
        "LOSSES": ("MCE_Bal", "MCE", "JS"),
    },
}


def attack_keys(cfg: CfgNode) -> dict[str, CfgNode]:
    """By protocol of ``cfg.TEST.ATTACK.PROTOCOL``, that group of keys with what the protocol sets.

    Raises:
        InputError: for an unknown protocol, a key that has been given another value than the protocol's, or
            an eps that is missing.
    """
    given = cfg.TEST.ATTACK
    names = [name.strip() for name in given.PROTOCOL.split(",")]
    found = {name: _with(given, name, is_for_ours=OURS in names) for name in names}
    for name, keys in found.items():
        if given.PROTOCOL != OURS and not (keys.LINF_EPS or keys.L2_EPS):
            raise InputError(
                f"TEST.ATTACK.PROTOCOL is {given.PROTOCOL!r}, and {name} takes the size of the attack from "
                "you: give a LINF_EPS, such as (4, 8), or drop it"
            )
    return found


def _with(given: CfgNode, protocol: str, is_for_ours: bool) -> CfgNode:
    """``given`` with what a protocol sets; what the user has given is refused, unless it is for ours."""
    if protocol not in PROTOCOLS:
        hint = did_you_mean(protocol, PROTOCOLS)
        raise InputError(
            f"TEST.ATTACK.PROTOCOL is {given.PROTOCOL!r}; it takes one of {', '.join(PROTOCOLS)}, or several "
            f"with commas{hint}"
        )
    defaults = get_cfg()
    add_robust_config(defaults)
    keys = given.clone()
    keys.defrost()
    for key, value in PROTOCOLS[protocol].items():
        allowed = (_plain(value), _plain(defaults.TEST.ATTACK[key]))
        if not is_for_ours and _plain(given[key]) not in allowed:
            raise InputError(
                f"TEST.ATTACK.{key} is {given[key]!r}, and PROTOCOL {protocol} sets it to {value!r}: leave "
                f"it out, or set PROTOCOL to {OURS!r}"
            )
        keys[key] = value
    return keys


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, list | tuple) else value  # a list in a file is a tuple here
