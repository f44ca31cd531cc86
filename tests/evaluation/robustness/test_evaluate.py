import json
import os
from pathlib import Path

import pytest
import torch
from PIL import Image

from rt_detectron.evaluation.results import config_sha256
from rt_detectron.evaluation.robustness import evaluate_robustness, robustness_table
from rt_detectron.evaluation.robustness.test_set import DetectionTestSet


@pytest.fixture(scope="module")
def make_cfg(learned, tmp_path_factory):
    """``make_cfg(folder, KEY, value, ...)``: two attacks of two losses, two corruptions, pictures; quick."""
    weights = tmp_path_factory.mktemp("weights") / "detector.pth"
    torch.save(learned[1].state_dict(), weights)

    def make(folder, *opts):
        cfg = learned[0].clone()
        cfg.defrost()
        cfg.OUTPUT_DIR = str(folder)
        cfg.MODEL.WEIGHTS = str(weights)
        cfg.TEST.ATTACK.LINF_EPS = (4, 16)
        cfg.TEST.ATTACK.LOSSES = ("all", "vanishing")
        cfg.TEST.ATTACK.STEPS = 2
        cfg.TEST.ATTACK.MAX_IMAGES = 2
        cfg.TEST.CORRUPTION.NAMES = ("contrast", "brightness")
        cfg.TEST.CORRUPTION.SEVERITIES = (2,)
        cfg.TEST.CORRUPTION.MAX_IMAGES = 3
        cfg.TEST.PICTURES = 1
        cfg.merge_from_list(list(opts))
        return cfg

    return make


@pytest.fixture(scope="module")
def finished(learned, make_cfg, tmp_path_factory):
    cfg = make_cfg(tmp_path_factory.mktemp("finished"))
    return cfg, evaluate_robustness(cfg, learned[1])


def test_content(finished):
    cfg, content = finished
    assert json.loads(Path(cfg.OUTPUT_DIR, "robustness.json").read_text()) == content
    assert content["clean"]["images"] == 6
    assert content["clean"]["metrics"]["bbox"]["AP"] > 15
    assert content["clean"]["metrics"]["bbox"]["APl"] is None
    assert [(each["norm"], each["eps"], each["loss"]) for each in content["attack"]] == [
        ("linf", eps, loss) for eps in (4, 16) for loss in ("all", "vanishing")
    ]
    for each in content["attack"]:
        assert (each["steps"], each["restarts"], each["images"]) == (2, 1, 2)
        assert each["clean"] == content["attack"][0]["clean"] != content["clean"]["metrics"]
    strongest = content["attack"][2]
    assert strongest["metrics"]["bbox"]["AP"] < strongest["noise"]["bbox"]["AP"]
    assert strongest["noise"] == content["attack"][3]["noise"] != content["attack"][0]["noise"]
    corruption = content["corruption"]
    assert (corruption["images"], corruption["names"]) == (3, ["contrast", "brightness"])
    assert corruption["severities"] == [2]
    aps = [result["metrics"]["bbox"]["AP"] for result in corruption["results"]]
    assert corruption["mPC"]["bbox"] == pytest.approx(sum(aps) / 2)
    clean = corruption["clean"]["bbox"]["AP"]
    assert corruption["rPC"]["bbox"] == pytest.approx(100 * sum(aps) / 2 / clean)
    assert content["config_sha256"] == config_sha256(cfg)
    assert (content["seed"], content["weights"]) == (1, cfg.MODEL.WEIGHTS)
    assert {"torch", "rt_detectron"} <= set(content["versions"])


def test_predictions_are_the_clean_ones_and_nothing_lies_where_a_training_writes(finished):
    cfg, content = finished
    (dataset,) = content["datasets"]
    predictions = json.loads(Path(dataset["predictions"]).read_text())
    assert len({prediction["image_id"] for prediction in predictions}) > 3
    assert sorted(os.listdir(cfg.OUTPUT_DIR)) == ["robustness", "robustness.json"]


def test_pictures(finished):
    cfg, content = finished
    names = [Path(picture["file"]).name for picture in content["pictures"]]
    assert names == [
        f"{setting}-image1.jpg"
        for setting in (
            "attack-linf-4",
            "attack-linf-4-vanishing",
            "attack-linf-16",
            "attack-linf-16-vanishing",
            "contrast-2",
            "brightness-2",
        )
    ]
    widths = [Image.open(Path(cfg.OUTPUT_DIR, picture["file"])).width for picture in content["pictures"]]
    assert all(width > 3 * 480 for width in widths[:4])  # the perturbation, too
    assert all(2 * 480 < width < 3 * 480 for width in widths[4:])
    assert "attacked, Linf eps 16: " in content["pictures"][2]["caption"]


def test_table(finished):
    content = finished[1]
    lines = [line.split("  ")[0] for line in robustness_table(content).splitlines()[2:]]
    balls = ["random noise", "all", "vanishing"]
    assert lines == [
        "clean",
        "clean",
        *(f"Linf eps {eps}, {what}" for eps in (4, 16) for what in balls),
        "clean",
        *("contrast 2", "brightness 2", "mPC", "rPC (%)"),
    ]
    assert f"{content['clean']['metrics']['bbox']['AP']:.2f}" in robustness_table(content)


def test_the_attack_depends_on_the_seed_alone(learned, make_cfg, finished, tmp_path):
    torch.manual_seed(123)
    opts = ["TEST.ATTACK.LINF_EPS", "(16,)", "TEST.ATTACK.LOSSES", "('all',)", "TEST.CORRUPTION.NAMES", "()"]
    content = evaluate_robustness(make_cfg(tmp_path, *opts, "TEST.PICTURES", 0), learned[1])
    (found,) = content["attack"]
    assert found == finished[1]["attack"][2]
    assert content["corruption"] is None
    assert content["pictures"] == []


class TestResume:
    @pytest.fixture
    def ran(self, monkeypatch):
        """What was measured on changed images, in order; the measurement ``ran.fails`` is interrupted."""

        class Names(list):
            fails = None

        names = Names()
        original = DetectionTestSet.evaluate

        def recorded(images, model, name, **kwargs):
            if kwargs["perturb"] or kwargs["mapper"]:
                names.append(name)
            if name == names.fails:
                raise KeyboardInterrupt
            return original(images, model, name, **kwargs)

        monkeypatch.setattr(DetectionTestSet, "evaluate", recorded)
        return names

    def test_an_interrupted_evaluation_goes_on(self, learned, make_cfg, finished, ran, tmp_path):
        cfg = make_cfg(tmp_path)
        ran.fails = "attack-linf-16"
        with pytest.raises(KeyboardInterrupt):
            evaluate_robustness(cfg, learned[1])
        assert not (tmp_path / "robustness.json").exists()  # there is one only of a finished evaluation
        ran.fails = None
        ran.clear()
        content = evaluate_robustness(cfg, learned[1], resume=True)
        assert ran == ["attack-linf-16", "attack-linf-16-vanishing", "contrast-2", "brightness-2"]
        same = ("clean", "attack", "corruption", "config_sha256")
        assert {key: content[key] for key in same} == {key: finished[1][key] for key in same}
        assert len(content["pictures"]) == 6
        ran.clear()
        assert evaluate_robustness(cfg, learned[1], resume=True)["attack"] == content["attack"]
        assert ran == []

    def test_not_without_being_asked_nor_with_other_keys_or_weights(
        self, learned, make_cfg, finished, ran, tmp_path, caplog
    ):
        few = ["TEST.ATTACK.LINF_EPS", "()", "TEST.PICTURES", 0]
        cfg = make_cfg(tmp_path, *few)
        evaluate_robustness(cfg, learned[1])
        evaluate_robustness(cfg, learned[1])
        assert ran == 2 * ["contrast-2", "brightness-2"]
        evaluate_robustness(make_cfg(tmp_path, *few, "SEED", 2), learned[1], resume=True)
        assert ran == 3 * ["contrast-2", "brightness-2"]
        weights = Path(cfg.MODEL.WEIGHTS)
        before = weights.read_bytes()
        weights.write_bytes(before + b" ")
        try:
            evaluate_robustness(make_cfg(tmp_path, *few, "SEED", 2), learned[1], resume=True)
        finally:
            weights.write_bytes(before)
        assert ran == 4 * ["contrast-2", "brightness-2"]
        assert sum("everything is measured again" in message for message in caplog.messages) == 2
