"""Checks against gradient masking catch a detector that hides its gradient, and pass one that does not."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from detectron2.evaluation import DatasetEvaluator

from rt_detectron.evaluation.robustness import evaluate_robustness, robustness_table, session
from rt_detectron.evaluation.robustness.attack import AttackEvaluation
from rt_detectron.evaluation.robustness.masking import of_all, of_one
from rt_detectron.evaluation.robustness.measurement import Measured
from rt_detectron.evaluation.robustness.session import Session
from rt_detectron.utils.errors import InputError


@pytest.fixture
def cfg(learned, tmp_path):
    cfg = learned[0].clone()
    cfg.defrost()
    cfg.OUTPUT_DIR = str(tmp_path)
    cfg.TEST.ATTACK.LINF_EPS = (24,)
    cfg.TEST.ATTACK.LOSSES = ("A_cls",)
    cfg.TEST.ATTACK.STEPS = 5
    cfg.TEST.ATTACK.MAX_IMAGES = cfg.TEST.ATTACK.CHECK_IMAGES = 3
    cfg.TEST.ATTACK.QUERIES = 15
    return cfg


def checks(content):
    (entry,) = content["attack"]
    return {check["check"]: check["level"] for check in entry["checks"]}


def test_a_plain_detector_passes_with_a_surrogate(learned, cfg):
    content = evaluate_robustness(cfg, learned[1], surrogate=learned[1])
    names = ["objective", "noise", "huge eps", "random search", "transfer"]
    assert checks(content) == dict.fromkeys(names, "ok")
    lines = robustness_table(content).splitlines()[-5:]
    assert lines[0].startswith("ok: Linf eps 24, A_cls: objective ")
    assert lines[2].startswith("ok: Linf eps 24, A_cls: AP 0 at a huge eps of 192 (")
    few = content["attack"][0]["check_images"]
    assert few["images"] == 3
    aps = {name: few[name]["metrics"]["bbox"]["AP"] for name in [*names[2:], "clean", "attack"]}
    assert aps["transfer"] == aps["attack"] < aps["clean"]
    assert all(Path(cfg.OUTPUT_DIR, few[name]["matches"]).is_file() for name in aps)


def test_an_input_quantiser_is_caught(learned, cfg, monkeypatch):
    """Its gradient is zero: the attack does not move the image, and AP under attack is clean AP."""
    _, model = learned
    plain = model.preprocess_image

    def quantised(inputs):
        return plain([{**each, "image": (each["image"].float() / 16).round() * 16} for each in inputs])

    monkeypatch.setattr(model, "preprocess_image", quantised, raising=False)
    cfg.TEST.ATTACK.LINF_EPS = (64,)  # noise that surely costs AP
    content = evaluate_robustness(cfg, model, surrogate=None)
    (entry,) = content["attack"]
    assert entry["metrics"] == entry["clean"]
    found = checks(content)
    assert found["objective"] == found["huge eps"] == found["noise"] == "error"
    assert "it did not rise in 3 of 3 images" in robustness_table(content)
    assert "preprocess_image" in vars(model)
    assert torch.is_grad_enabled()


@pytest.mark.parametrize(("stuck", "levels"), [((20, 20), ["error"]), ((20, 2), ["ok"]), ((20, None), [])])
def test_of_several_objectives_one_must_rise(stuck, levels):
    objectives = [number and {"before": 1, "after": 1, "images": 20, "not_risen": number} for number in stuck]
    found = of_all([Measured({}, None, 0.0, objective) for objective in objectives])
    assert [check["level"] for check in found] == levels


def test_what_cannot_be_checked_is_said_or_refused(learned, cfg, caplog):
    cfg.TEST.ATTACK.SURROGATE = "other.pth"
    cfg.TEST.ATTACK.CHECK_IMAGES = 0
    with pytest.raises(InputError, match="SURROGATE is tried on CHECK_IMAGES images under attack"):
        AttackEvaluation.from_config(cfg)
    cfg.TEST.ATTACK.SURROGATE, cfg.TEST.ATTACK.CHECK_IMAGES = "", 3

    class Whole(DatasetEvaluator):
        def evaluate(self):
            return {}

    there = Session(cfg, learned[1], cfg.OUTPUT_DIR, surrogate=learned[1])
    assert "SURROGATE has the weights of MODEL.WEIGHTS" in caplog.text
    there.test_set = replace(there.test_set, evaluator=Whole())
    AttackEvaluation.from_config(cfg).check(there)
    assert "Whole only scores whole test sets: the checks on TEST.ATTACK.CHECK_IMAGES images" in caplog.text


@pytest.mark.parametrize(("protocol", "eps", "attacked"), [("oddefense", (), True), ("ours", (), False)])
def test_the_objects_that_an_attack_needs_are_checked(learned, cfg, monkeypatch, protocol, eps, attacked):
    asked = []
    load = session.load_test_set
    monkeypatch.setattr(
        session, "load_test_set", lambda *args, **options: asked.append(options) or load(*args, **options)
    )
    cfg.TEST.ATTACK.PROTOCOL, cfg.TEST.ATTACK.LINF_EPS = protocol, eps
    Session(cfg, learned[1], cfg.OUTPUT_DIR)
    assert asked == [{"with_objects": attacked}]


@pytest.mark.parametrize(
    ("ap", "noise", "alone", "level"),
    [
        (9.0, 20.0, True, "ok"),
        (20.05, 20.0, True, "ok"),
        (21.0, 20.0, True, "error"),
        (21.0, 20.0, False, "warning"),
    ],
)
def test_an_attack_weaker_than_noise(ap, noise, alone, level):
    attacked, noisy = (Measured({"bbox": {"AP": value}}, None, 0.0) for value in (ap, noise))
    (check,) = of_one(attacked, noisy, alone)
    assert check["level"] == level
    assert f"AP {ap:.4g} under attack, 20 under random noise of the same size" in check["text"]
