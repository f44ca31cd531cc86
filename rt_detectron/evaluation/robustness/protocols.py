"""Published protocols of attacks on detectors, by TEST.ATTACK.PROTOCOL."""

from typing import Any

from detectron2.config import CfgNode, get_cfg

from rt_detectron.config import add_robust_config
from rt_detectron.utils.errors import InputError, did_you_mean

# What each one sets of TEST.ATTACK.
PROTOCOLS: dict[str, dict[str, Any]] = {
    "ours": {},
    # Li et al., TIFS 2025, and their code, thu-ml/oddefense: mmdet/apis/test.py and the configs.
    "oddefense": {
        "LINF_EPS": (4,),
        "L2_EPS": (),
        "STEPS": 10,
        "STEP_SIZE": 1.0,
        "ADAPTIVE": False,
        "START": "image",
        "RESTARTS": 1,
        "BEST": False,
        "TARGETED": False,
        "LOSSES": ("A_cls", "A_reg", "A_cwa"),
        "CLIP": 6.0,
        "PADDING": True,
    },
    # ARES 2.0, thu-ml/ares: detection/configs/global.
    "ares": {
        "LINF_EPS": (2,),
        "L2_EPS": (),
        "STEPS": 20,
        "STEP_SIZE": 1.0,
        "ADAPTIVE": False,
        "START": "random",
        "RESTARTS": 1,
        "BEST": False,
        "TARGETED": False,
        "LOSSES": ("no_regression",),
        "CLIP": 0.0,
        "PADDING": False,
    },
}


def attack_keys(cfg: CfgNode) -> CfgNode:
    """``cfg.TEST.ATTACK`` with what its PROTOCOL sets.

    Raises:
        InputError: for an unknown protocol, or a key that has been given another value than the protocol's.
    """
    keys = cfg.TEST.ATTACK.clone()
    if keys.PROTOCOL not in PROTOCOLS:
        hint = did_you_mean(keys.PROTOCOL, PROTOCOLS)
        raise InputError(
            f"TEST.ATTACK.PROTOCOL is {keys.PROTOCOL!r}; it takes one of {', '.join(PROTOCOLS)}{hint}"
        )
    defaults = get_cfg()
    add_robust_config(defaults)
    keys.defrost()
    for key, value in PROTOCOLS[keys.PROTOCOL].items():
        given = keys[key]
        # A list in a config file is a tuple here.
        if _plain(given) not in (_plain(value), _plain(defaults.TEST.ATTACK[key])):
            raise InputError(
                f"TEST.ATTACK.{key} is {given!r}, and PROTOCOL {keys.PROTOCOL} sets it to {value!r}: leave "
                "it out, or set PROTOCOL to 'ours'"
            )
        keys[key] = value
    return keys


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, list | tuple) else value
