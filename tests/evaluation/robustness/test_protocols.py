import pytest
from detectron2.config import get_cfg

from rt_detectron.attacks import APGD, ThreatModel
from rt_detectron.config import add_robust_config
from rt_detectron.evaluation.robustness import (
    evaluate_robustness,
    robustness_evaluations,
    robustness_table,
)
from rt_detectron.utils.errors import InputError


def by_protocol(*opts):
    cfg = get_cfg()
    add_robust_config(cfg)
    cfg.DATASETS.TEST = ("coco_2017_val",)
    cfg.merge_from_list([*opts])
    return {each.name: each for each in robustness_evaluations(cfg)}["attack"].attacks


def attacks(*opts):
    (found,) = by_protocol(*opts).values()
    return found


def test_oddefense_as_published():
    """Li et al., TIFS 2025: PGD-10, Linf 4/255, steps of 1/255, from the image, padding included."""
    found = attacks("TEST.ATTACK.PROTOCOL", "oddefense")
    assert [attack.name for attack in found] == ["A_cls", "A_reg", "A_cwa"]
    for attack in found:
        assert attack.pgd.threat_model == ThreatModel("linf", 4)
        assert attack.pgd.step_size == pytest.approx(1 / 255)
        assert (attack.pgd.steps, attack.pgd.random_start, attack.pgd.restarts) == (10, False, 1)
        assert (attack.clip, attack.padding, attack.targeted) == (6, True, False)


def test_ares_as_published():
    """ARES 2.0: PGD-20, Linf 2/255, steps of 1/255, from a random point, all losses but the regression."""
    (attack,) = attacks("TEST.ATTACK.PROTOCOL", "ares")
    assert attack.pgd.threat_model == ThreatModel("linf", 2)
    assert attack.pgd.step_size == pytest.approx(1 / 255)
    assert (attack.pgd.steps, attack.pgd.random_start) == (20, True)
    losses = {"loss_cls": 1.0, "loss_box_reg": 10.0, "loss_rpn_cls": 2.0, "loss_rpn_loc": 6.0}
    assert attack.objective(losses) == 3


def test_sea_as_published():
    """Croce, Singh & Hein (ECCV 2024): APGD with 300 steps in balls of 2, 1.5 and 1 eps, three losses."""
    found = attacks("TEST.ATTACK.PROTOCOL", "sea", "TEST.ATTACK.LINF_EPS", "(8,)")
    assert [attack.name for attack in found] == ["MCE_Bal", "MCE", "JS"]
    for attack in found:
        assert isinstance(attack.pgd, APGD)
        assert attack.pgd.threat_model == ThreatModel("linf", 8)
        assert (attack.pgd.steps, attack.pgd.reduce_radius, attack.pgd.random_start) == (300, True, True)
        assert attack.settings["reduce_radius"]
        # 300 steps, a look at the end of each ball, and the objective before and after for the checks
        assert attack.passes == {"forward": 305, "backward": 300}


def test_our_own_keys():
    keys = {"STEPS": 8, "STEP_SIZE": 0.5, "START": "random", "BEST": True, "TARGETED": True, "CLIP": 3.0}
    opts = [str(part) for key, value in keys.items() for part in (f"TEST.ATTACK.{key}", value)]
    (attack,) = attacks("TEST.ATTACK.L2_EPS", "(2,)", "TEST.ATTACK.LOSSES", "('A_cls',)", *opts)
    assert attack.pgd.step_size == pytest.approx(0.5)
    assert attack.settings == {
        "norm": "l2", "eps": 2, "loss": "A_cls", "steps": 8, "adaptive": False, "step_size": 0.5,
        "start": "random",
        "restarts": 1, "best": True, "targeted": True, "clip": 3.0, "padding": False, "seed": 0,
    }  # fmt: skip
    (adaptive,) = attacks("TEST.ATTACK.LINF_EPS", "(4,)", "TEST.ATTACK.ADAPTIVE", True)
    assert isinstance(adaptive.pgd, APGD)
    assert (adaptive.settings["adaptive"], adaptive.settings["step_size"]) == (True, None)
    (default,) = attacks("TEST.ATTACK.LINF_EPS", "(4,)")
    assert default.settings["step_size"] == 1  # 2.5 eps / steps


@pytest.mark.parametrize(
    ("opts", "words"),
    [
        (["PROTOCOL", "odefense"], "PROTOCOL is 'odefense'; it takes one of ours, .* did you mean oddefense"),
        (["PROTOCOL", "ares", "STEPS", 50], "STEPS is 50, and PROTOCOL ares sets it to 20: leave it out"),
        (
            ["PROTOCOL", "oddefense", "LINF_EPS", "(8,)"],
            r"LINF_EPS is \(8,\), and PROTOCOL oddefense sets it",
        ),
        (["PROTOCOL", "ares,odefense"], "did you mean oddefense"),
        (["PROTOCOL", "ares,oddefense", "STEPS", 7], "PROTOCOL ares sets it to 20"),
        (["PROTOCOL", "ours,ares"], "ours takes the size of the attack from you: give a LINF_EPS"),
        (["PROTOCOL", "sea"], "sea takes the size of the attack from you: give a LINF_EPS, such as"),
        (["PROTOCOL", "sea", "LINF_EPS", "(4,)", "STEPS", 50], "PROTOCOL sea sets it to 300"),
        (["LINF_EPS", "(4,)", "REDUCE_RADIUS", True], "REDUCE_RADIUS is for APGD: set ADAPTIVE"),
        (["LINF_EPS", "(4,)", "REDUCE_RADIUS", True, "ADAPTIVE", True, "STEPS", 3], "takes 4 or more"),
        (["LINF_EPS", "(4,)", "START", "noise"], "START is 'noise'; it takes 'image' or 'random'"),
        (["LINF_EPS", "(4,)", "STEP_SIZE", -1.0], "STEP_SIZE is -1"),
        (["LINF_EPS", "(4,)", "STEP_SIZE", 1.0, "ADAPTIVE", True], "leave STEP_SIZE at 0"),
        (["LINF_EPS", "(4,)", "TARGETED", True], "'all' has no target"),
        (["LINF_EPS", "(4,)", "CHECK_IMAGES", -1], "TEST.ATTACK.CHECK_IMAGES is -1"),
    ],
)
def test_mistakes_are_one_line(opts, words):
    with pytest.raises(InputError, match=words) as error:
        attacks(*(f"TEST.ATTACK.{each}" if i % 2 == 0 else each for i, each in enumerate(opts)))
    assert "\n" not in str(error.value)


def test_a_protocols_own_values_may_be_given():
    given = ["TEST.ATTACK.LINF_EPS", "[2]", "TEST.ATTACK.STEPS", 20]
    assert attacks("TEST.ATTACK.PROTOCOL", "ares", *given) == attacks("TEST.ATTACK.PROTOCOL", "ares")


def test_several_protocols_at_once():
    """Each as alone; the other keys are for ours."""
    own = ["TEST.ATTACK.L2_EPS", "(0.5,)", "TEST.ATTACK.STEPS", 3, "TEST.ATTACK.LOSSES", "('A_cls',)"]
    found = by_protocol("TEST.ATTACK.PROTOCOL", "ours, ares,oddefense", *own)
    assert list(found) == ["ours", "ares", "oddefense"]
    assert found["ours"] == attacks(*own)
    for name in ("ares", "oddefense"):
        assert found[name] == attacks("TEST.ATTACK.PROTOCOL", name)


def test_several_protocols_are_measured_side_by_side(learned, tmp_path):
    cfg = learned[0].clone()
    cfg.defrost()
    cfg.OUTPUT_DIR = str(tmp_path)
    cfg.TEST.ATTACK.PROTOCOL = "ours,ares"
    cfg.TEST.ATTACK.LINF_EPS, cfg.TEST.ATTACK.STEPS = (2,), 1
    cfg.TEST.ATTACK.MAX_IMAGES = cfg.TEST.ATTACK.CHECK_IMAGES = cfg.TEST.ATTACK.QUERIES = 1
    content = evaluate_robustness(cfg, learned[1])
    found = [(entry["protocol"], entry["steps"], entry["eps"]) for entry in content["attack"]]
    assert found == [("ours", 1, 2), ("ares", 20, 2)]
    assert ["check_images" in entry for entry in content["attack"]] == [True, False]  # once for each norm
    rows = [line.split("  ")[0] for line in robustness_table(content).splitlines()]
    assert "Linf eps 2, all" in rows
    assert "Linf eps 2, no_regression (ares)" in rows
