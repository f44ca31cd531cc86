"""Our keys beside a project's own, in either order."""

import pytest
from detectron2.config import CfgNode, get_cfg

from rt_detectron.config import add_robust_config


def keys(cfg: CfgNode, parent: str = "") -> dict:
    """Every value of ``cfg`` by its whole name."""
    found = {}
    for key, value in cfg.items():
        own = keys(value, f"{parent}{key}.") if isinstance(value, CfgNode) else {f"{parent}{key}": value}
        found.update(own)
    return found


def test_adds_keys_and_changes_none_of_detectron2s():
    cfg = get_cfg()
    before = keys(cfg)
    add_robust_config(cfg)
    after = keys(cfg)
    assert after["MODEL.ROBUST.ARCH"] == ""
    assert {key: after[key] for key in before} == before


def test_a_projects_own_keys_keep_their_values():
    """Mask2Former has a BACKBONE_MULTIPLIER of 0.1; calling twice is a project's own value, too."""
    cfg = get_cfg()
    cfg.SOLVER.BACKBONE_MULTIPLIER = 0.1
    cfg.TEST.ATTACK = CfgNode({"STEPS": 3})
    add_robust_config(cfg)
    assert (cfg.SOLVER.BACKBONE_MULTIPLIER, cfg.TEST.ATTACK.STEPS) == (0.1, 3)
    assert cfg.TEST.ATTACK.RESTARTS == 1
    cfg.MODEL.ROBUST.ARCH = "resnet50"
    add_robust_config(cfg)
    assert (cfg.MODEL.ROBUST.ARCH, cfg.SOLVER.BACKBONE_MULTIPLIER) == ("resnet50", 0.1)


def test_every_key_of_ours_that_is_set_before_stays():
    cfg = get_cfg()
    add_robust_config(cfg)
    ours = keys(cfg).keys() - keys(get_cfg()).keys()
    own = get_cfg()
    for name in ours:
        *groups, key = name.split(".")
        node = own
        for group in groups:
            node = node.setdefault(group, CfgNode())
        node[key] = "the project's"
    before = keys(own)
    add_robust_config(own)
    assert keys(own) == before


@pytest.mark.parametrize(
    ("name", "value"), [("ATTACK", 3), ("BEST_METRIC", CfgNode({"NAME": "AP"}))], ids=["value", "group"]
)
def test_another_kind_of_key_is_one_line(name, value):
    cfg = get_cfg()
    cfg.TEST[name] = value
    with pytest.raises(ValueError, match=rf"^TEST\.{name} of this project"):
        add_robust_config(cfg)
