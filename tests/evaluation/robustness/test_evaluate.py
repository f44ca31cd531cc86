import json
import multiprocessing
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from rt_detectron.evaluation.matching import curves_of, read_matches
from rt_detectron.evaluation.results import config_sha256
from rt_detectron.evaluation.robustness import evaluate_robustness, robustness_table
from rt_detectron.evaluation.robustness.measurement import ImageByImage
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
        cfg.TEST.ATTACK.CHECK_IMAGES = 0
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
        ("linf", eps, loss) for eps in (4, 16) for loss in ("all", "vanishing", "worst")
    ]
    for each in content["attack"]:
        assert (each["steps"], each["restarts"], each["images"]) == (2, 1, 2)
        assert each["clean"] == content["attack"][0]["clean"] != content["clean"]["metrics"]
    everything, vanishing, worst = content["attack"][3:]
    assert worst["metrics"]["bbox"]["AP"] < worst["noise"]["bbox"]["AP"]
    assert worst["noise"] == everything["noise"] != content["attack"][0]["noise"]
    for task in ("bbox", "segm"):
        assert worst["metrics"][task].keys() == everything["metrics"][task].keys()
    alone = [entry["metrics"]["bbox"]["AP"] for entry in (everything, vanishing)]
    assert worst["metrics"]["bbox"]["AP"] <= min(alone)
    assert worst["losses"] == ["all", "vanishing"]
    assert everything["passes"] == {"forward": 3, "backward": 2}  # two steps, and the objective after them
    assert worst["passes"] == {"forward": 6, "backward": 4}
    assert everything["objective"]["before"] < everything["objective"]["after"]
    assert [check["check"] for check in everything["checks"]] == ["objective", "noise"]
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
    files = [Path(picture["file"]) for picture in content["pictures"]]
    assert {file.name for file in files} == {"image1.jpg"}
    assert [file.parent.name.rpartition("-")[0] for file in files] == [
        "attack-linf-4-all",
        "attack-linf-4-vanishing",
        "attack-linf-16-all",
        "attack-linf-16-vanishing",
        "contrast-2",
        "brightness-2",
    ]
    widths = [Image.open(Path(cfg.OUTPUT_DIR, picture["file"])).width for picture in content["pictures"]]
    assert all(width > 3 * 480 for width in widths[:4])  # the perturbation, too
    assert all(2 * 480 < width < 3 * 480 for width in widths[4:])
    assert "attacked, Linf eps 16: " in content["pictures"][2]["caption"]


def test_table(finished):
    content = finished[1]
    lines = [line.split("  ")[0] for line in robustness_table(content).splitlines()[2:]]
    remarks = [line for line in lines if line.startswith(("ok: ", "warning: ", "error: "))]
    assert len(remarks) == 2 * (2 + 2 + 2)
    assert remarks[0].startswith("ok: Linf eps 4, all: objective ")
    lines = lines[: -len(remarks)]
    balls = ["random noise", "all", "vanishing", "worst"]
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
    assert found["metrics"] == finished[1]["attack"][3]["metrics"]
    assert found["objective"] == finished[1]["attack"][3]["objective"]
    assert content["corruption"] is None
    assert content["pictures"] == []


def test_what_intervals_over_images_need_lies_beside_every_number(finished):
    cfg, content = finished
    attack, corruption = content["attack"][3], content["corruption"]
    worst = content["attack"][5]
    numbers = {
        content["clean"]["matches"]: (content["clean"]["metrics"], 6),
        attack["matches"]: (attack["metrics"], 2),
        worst["matches"]: (worst["metrics"], 2),
        attack["clean_matches"]: (attack["clean"], 2),
        attack["noise_matches"]: (attack["noise"], 2),
        corruption["clean_matches"]: (corruption["clean"], 3),
        corruption["results"][1]["matches"]: (corruption["results"][1]["metrics"], 3),
    }
    assert len(numbers) == 7
    for file, (metrics, images) in numbers.items():
        matches, common = read_matches(str(Path(cfg.OUTPUT_DIR, file)))
        assert len(common["image_ids"]) == images
        assert matches.keys() == {"bbox", "segm"}
        for task, found in matches.items():
            precision, _ = curves_of(found, len(common["category_ids"]), np.linspace(0, 1, 101))
            of_all_areas = precision[..., 0]
            ap = 100 * of_all_areas[of_all_areas > -1].mean()
            assert ap == pytest.approx(metrics[task]["AP"], abs=1e-6)


class TestKept:
    """What was measured once is not measured again, whatever else the config asks for."""

    @pytest.fixture
    def ran(self, monkeypatch):
        """The measurements that were made, in order."""
        names = []
        original = DetectionTestSet.evaluate

        def recorded(images, model, name, **kwargs):
            names.append(name)
            return original(images, model, name, **kwargs)

        monkeypatch.setattr(DetectionTestSet, "evaluate", recorded)
        return names

    def test_one_more_setting_measures_that_one_alone(self, learned, make_cfg, ran, tmp_path):
        few = ["TEST.PICTURES", 0, "TEST.ATTACK.LOSSES", "('all',)", "TEST.ATTACK.STEPS", 1]
        few += ["TEST.CORRUPTION.NAMES", "('contrast',)", "TEST.ATTACK.NOISE", False]
        first = evaluate_robustness(make_cfg(tmp_path, *few, "TEST.ATTACK.LINF_EPS", "(4,)"), learned[1])
        assert ran == ["clean-6", "clean-2", "attack-linf-4-all", "clean-3", "contrast-2"]
        ran.clear()
        both = evaluate_robustness(make_cfg(tmp_path, *few), learned[1])
        assert ran == ["attack-linf-16-all"]
        assert both["attack"][0] == first["attack"][0]
        assert both["corruption"] == first["corruption"]
        ran.clear()
        # What is not asked for any more stays, and the same again costs nothing.
        opts = ["TEST.ATTACK.LINF_EPS", "(16,)", "TEST.CORRUPTION.NAMES", "('brightness',)"]
        last = evaluate_robustness(make_cfg(tmp_path, *few, *opts), learned[1])
        assert ran == ["brightness-2"]
        assert [(entry["eps"], entry["requested"]) for entry in last["attack"]] == [(16, True), (4, False)]
        results = last["corruption"]["results"]
        assert [(each["corruption"], each["requested"]) for each in results] == [
            ("brightness", True),
            ("contrast", False),
        ]
        assert last["corruption"]["mPC"]["bbox"] == results[0]["metrics"]["bbox"]["AP"]
        assert "Linf eps 4" not in robustness_table(last)
        ran.clear()
        same = evaluate_robustness(make_cfg(tmp_path, *few, *opts), learned[1])
        assert ran == []
        assert same == last

    def test_another_detector_another_set_or_other_settings_are_measured(
        self, learned, make_cfg, ran, tmp_path, caplog
    ):
        few = ["TEST.ATTACK.LINF_EPS", "()", "TEST.PICTURES", 0, "TEST.CORRUPTION.NAMES", "('contrast',)"]
        cfg, model = make_cfg(tmp_path, *few), learned[1]
        first = evaluate_robustness(cfg, model)
        every = ["clean-6", "clean-3", "contrast-2"]
        assert ran == every
        evaluate_robustness(make_cfg(tmp_path, *few, "SEED", 2), model)
        assert ran[3:] == ["contrast-2"]  # of other random numbers
        evaluate_robustness(make_cfg(tmp_path, *few, "MODEL.ROI_HEADS.NMS_THRESH_TEST", 0.4), model)
        assert ran[4:] == every
        (weight, *_) = model.parameters()
        with torch.no_grad():
            weight[0, 0, 0, 0] += 1e-6
            try:
                evaluate_robustness(make_cfg(tmp_path, *few), model)
            finally:
                weight[0, 0, 0, 0] -= 1e-6
        assert ran[7:] == every
        assert sum("is of another detector or test set" in message for message in caplog.messages) == 2
        again = evaluate_robustness(cfg, model)
        assert ran[10:] in ([], every)  # the weight may have been rounded
        assert again["clean"]["metrics"] == first["clean"]["metrics"]
        assert len(list(Path(tmp_path, "robustness").glob("robustness-*.json"))) == 3

    def test_pictures_may_be_asked_for_later(self, learned, make_cfg, ran, tmp_path):
        few = ["TEST.ATTACK.LINF_EPS", "()", "TEST.CORRUPTION.NAMES", "('contrast',)"]
        assert not evaluate_robustness(make_cfg(tmp_path, *few, "TEST.PICTURES", 0), learned[1])["pictures"]
        ran.clear()
        pictures = evaluate_robustness(make_cfg(tmp_path, *few, "TEST.PICTURES", 2), learned[1])["pictures"]
        assert ran == []
        assert len(pictures) == 2
        assert all(Path(tmp_path, picture["file"]).is_file() for picture in pictures)


# Fewer than five events would never finish a measurement whose images are all detected on.
@pytest.mark.parametrize(
    ("events", "least"), [(11, 3), *(pytest.param(n, 10, marks=pytest.mark.slow) for n in (5, 6))]
)
def test_nothing_finished_is_lost_when_the_process_is_killed(
    learned, make_cfg, finished, tmp_path, events, least
):
    """Killed (SIGKILL) after every few files or images until it is finished; the numbers are bit-equal."""
    cfg, expected = make_cfg(tmp_path), finished[1]
    killed, before = 0, {}
    while True:
        process = multiprocessing.get_context("fork").Process(
            target=evaluate_until_killed, args=(cfg, learned[1], events + killed % 3)
        )
        process.start()
        process.join(300)
        found = {path: path.read_bytes() for path in Path(tmp_path, "robustness").rglob("result.json")}
        assert before.items() <= found.items()
        before = found
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        assert not Path(tmp_path, "robustness.json").exists()
        killed += 1
        assert killed < 100
    assert killed >= least
    content = json.loads(Path(tmp_path, "robustness.json").read_text())
    for key in ("clean", "attack", "corruption", "identity", "pictures"):
        assert content[key] == expected[key]
    assert not list(Path(tmp_path).rglob("images-*"))


def evaluate_until_killed(cfg, model, events):
    """Evaluate, and be killed when so many images were detected on or files put in place."""
    torch.set_num_threads(1)
    left = [events]

    def counted(function):
        def call(*args, **kwargs):
            left[0] -= 1
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return call

    os.replace = counted(os.replace)
    ImageByImage.process = counted(ImageByImage.process)
    evaluate_robustness(cfg, model)
    os._exit(0)
