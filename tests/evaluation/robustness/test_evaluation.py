import pytest
from detectron2.config import get_cfg

from rt_detectron.attacks import ThreatModel
from rt_detectron.config import add_robust_config
from rt_detectron.evaluation.robustness import robustness_evaluations
from rt_detectron.utils.errors import InputError


def evaluations(**keys):
    cfg = get_cfg()
    add_robust_config(cfg)
    cfg.DATASETS.TEST = ("coco_2017_val",)
    for key, value in keys.items():
        cfg.merge_from_list([f"TEST.{key.replace('__', '.')}", value])
    return {evaluation.name: evaluation for evaluation in robustness_evaluations(cfg)}


def test_all_combinations_each_once():
    found = evaluations(
        ATTACK__L2_EPS=(0.5, 0.5),
        ATTACK__LINF_EPS=[1, 4.0],
        ATTACK__LOSSES=("all", "vanishing"),
        ATTACK__STEPS=5,
        CORRUPTION__NAMES=("fog", "snow", "fog"),
        CORRUPTION__SEVERITIES=(1, 3),
    )
    balls = [ThreatModel("l2", 0.5), ThreatModel("linf", 1), ThreatModel("linf", 4.0)]
    attacks = found["attack"].all_attacks
    assert [(attack.pgd.threat_model, attack.name) for attack in attacks] == [
        (ball, loss) for ball in balls for loss in ("all", "vanishing")
    ]
    assert {(attack.pgd.steps, attack.pgd.random_start) for attack in attacks} == {(5, False)}
    assert found["corruption"].corruptions == (("fog", 1), ("fog", 3), ("snow", 1), ("snow", 3))
    assert len(evaluations(CORRUPTION__NAMES=("common",))["corruption"].corruptions) == 15 * 5


def test_restarts_begin_at_random_points():
    (attack,) = evaluations(ATTACK__LINF_EPS=(2,), ATTACK__RESTARTS=3)["attack"].all_attacks
    assert attack.pgd.random_start
    assert attack.pgd.restarts == 3


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({}, "nothing to evaluate: set TEST.ATTACK.LINF_EPS"),
        ({"ATTACK__L2_EPS": (-1,)}, "TEST.ATTACK: threat model: eps is -1"),
        ({"ATTACK__L2_EPS": ("much",)}, "TEST.ATTACK: threat model: eps is 'much'"),
        ({"ATTACK__LINF_EPS": (0.03,)}, "did you mean eps=7.65"),
        ({"ATTACK__L2_EPS": (1,), "ATTACK__STEPS": 0}, "TEST.ATTACK: PGD: steps is 0"),
        ({"ATTACK__L2_EPS": (1,), "ATTACK__RESTARTS": 0}, "TEST.ATTACK: PGD: restarts is 0"),
        ({"ATTACK__L2_EPS": (1,), "ATTACK__LOSSES": ("boxes",)}, "loss 'boxes' is unknown"),
        ({"ATTACK__L2_EPS": (1,), "ATTACK__LOSSES": ()}, "TEST.ATTACK.LOSSES is empty"),
        ({"ATTACK__L2_EPS": (1,), "ATTACK__LOSSES": ("mask",)}, "MODEL.MASK_ON is False"),
        ({"ATTACK__L2_EPS": (1,), "ATTACK__MAX_IMAGES": -1}, "TEST.ATTACK.MAX_IMAGES is -1"),
        ({"ATTACK__L2_EPS": (1,), "PICTURES": -2}, "TEST.PICTURES is -2"),
        ({"CORRUPTION__NAMES": ("smog",)}, "TEST.CORRUPTION.NAMES: unknown corruption 'smog'"),
        ({"CORRUPTION__NAMES": ("fog",), "CORRUPTION__SEVERITIES": (0, 1)}, r"SEVERITIES is \[0, 1\]"),
        ({"CORRUPTION__NAMES": ("fog",), "CORRUPTION__SEVERITIES": ()}, r"SEVERITIES is \[\]"),
    ],
)
def test_mistakes_are_one_line(keys, words):
    with pytest.raises(InputError, match=words) as error:
        evaluations(**keys)
    assert "\n" not in str(error.value)


def test_an_l2_eps_that_may_be_meant_for_0_to_255_is_told(caplog):
    evaluations(ATTACK__L2_EPS=(5,))
    assert not caplog.text
    evaluations(ATTACK__L2_EPS=(128,))
    assert "L2_EPS 128 breaks any detector" in caplog.text
    assert "if yours is for 0..255, give 0.502" in caplog.text


def test_one_test_set_at_a_time():
    cfg = get_cfg()
    add_robust_config(cfg)
    cfg.DATASETS.TEST = ("coco_2017_val", "coco_2017_val_100")
    with pytest.raises(InputError, match=r"DATASETS\.TEST has 2 sets"):
        robustness_evaluations(cfg)
