"""Our predictor against Detectron2's own, the guard of its weights, and several of them at once."""

import json

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.engine import DefaultPredictor
from detectron2.modeling import build_model

from rt_detectron.detection import Predictor, load_predictors
from rt_detectron.detection.predictor import class_names
from rt_detectron.utils.errors import InputError

NAME = "rt_test_predictor"


@pytest.fixture
def cfg(make_cfg):
    """Of a detector on COCO, with the weights "detector.pth"."""
    cfg = make_cfg("resnet18", "fpn", RES2_OUT_CHANNELS=64, DEPTH=18)
    cfg.INPUT.MIN_SIZE_TEST = 96
    cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = 0.0
    cfg.MODEL.WEIGHTS = "detector.pth"
    return cfg


@pytest.fixture
def bgr(photograph):
    return np.ascontiguousarray(photograph.numpy().transpose(1, 2, 0)[:, :, ::-1])


@pytest.fixture
def own_set(tmp_path):
    """A set of one's own, of which Detectron2 knows the classes from its file only."""
    content = {
        "images": [],
        "annotations": [],
        "categories": [{"id": 4, "name": "b"}, {"id": 2, "name": "a"}],
    }
    content["images"] = [{"id": 1, "file_name": "1.jpg", "width": 4, "height": 4}]
    (tmp_path / "set.json").write_text(json.dumps(content))
    register_coco_instances(NAME, {}, str(tmp_path / "set.json"), str(tmp_path))
    yield tmp_path / "set.json"
    DatasetCatalog.remove(NAME)
    MetadataCatalog.remove(NAME)


@pytest.mark.parametrize("input_format", ["RGB", "BGR"])
def test_it_predicts_what_detectron2s_does(cfg, bgr, input_format, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    torch.save({"model": build_model(cfg).state_dict()}, cfg.MODEL.WEIGHTS)
    cfg.INPUT.FORMAT = input_format
    ours, theirs = Predictor(cfg)(bgr), DefaultPredictor(cfg)(bgr)["instances"]
    assert len(ours) == len(theirs) > 0
    assert ours.image_size == bgr.shape[:2]
    for field in ("scores", "pred_classes", "pred_masks"):
        assert torch.equal(ours.get(field), theirs.get(field))
    assert torch.equal(ours.pred_boxes.tensor, theirs.pred_boxes.tensor)
    assert not torch.equal(Predictor(cfg)(bgr[:, :, ::-1]).scores, ours.scores)  # the order does matter


def test_a_narrow_image_is_refused(cfg, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"model": build_model(cfg).state_dict()}, cfg.MODEL.WEIGHTS)
    predictor = Predictor(cfg)
    with pytest.raises(InputError, match="an image: its 3000 x 1 pixels are so narrow"):
        predictor(np.zeros((1, 3000, 3), np.uint8))


def test_weights_are_guarded(cfg, backbone_file):
    cfg.MODEL.WEIGHTS = backbone_file
    cfg.INPUT.FORMAT = "BGR"
    with pytest.raises(InputError, match=r'set INPUT\.FORMAT "RGB"'):
        Predictor(cfg)
    cfg.MODEL.WEIGHTS = "nowhere.pth"
    with pytest.raises(InputError, match=r"there is no weights file nowhere\.pth"):
        Predictor(cfg)
    cfg.MODEL.WEIGHTS = ""
    with pytest.raises(InputError, match="names no weights"):
        Predictor(cfg)


class TestClassNames:
    def test_coco_needs_no_file(self, cfg):
        assert class_names(cfg)[:2] == ["person", "bicycle"]

    def test_ones_own_are_read(self, cfg, own_set, monkeypatch):
        monkeypatch.setenv("RT_DETECTRON_CACHE", str(own_set.parent / "cache"))
        cfg.DATASETS.TEST = (NAME,)
        assert class_names(cfg) == ["a", "b"]
        cfg.DATASETS.TEST = (f"{NAME}@any",)
        assert class_names(cfg) == ["object"]
        DatasetCatalog.remove(f"{NAME}@any")
        MetadataCatalog.remove(f"{NAME}@any")

    def test_missing_sets_are_passed_over(self, cfg, own_set):
        own_set.unlink()
        cfg.DATASETS.TEST, cfg.DATASETS.TRAIN = (NAME,), ("coco_2017_train",)
        assert class_names(cfg)[0] == "person"
        cfg.DATASETS.TRAIN = ("no_such_set",)
        assert class_names(cfg) == []


class TestLoadPredictors:
    @pytest.fixture
    def files(self, cfg, tmp_path):
        """``files(name ...)``: config files that differ in name only."""

        def write(*names):
            for name in names:
                (tmp_path / name).write_text(cfg.dump())
            return [str(tmp_path / name) for name in names]

        return write

    @pytest.fixture(autouse=True)
    def no_models(self, monkeypatch):
        """Configs in place of predictors, as which weights go where is all that is asked."""
        monkeypatch.setattr("rt_detectron.detection.predictor.Predictor", lambda cfg: cfg)

    def test_one_config_serves_all_weights(self, files):
        found = load_predictors(
            files("a.yaml"), ["1.pth", "2.pth"], None, 0.3, ["TEST.DETECTIONS_PER_IMAGE", "7"]
        )
        assert {caption: cfg.MODEL.WEIGHTS for caption, cfg in found.items()} == {
            "1.pth": "1.pth",
            "2.pth": "2.pth",
        }
        for cfg in found.values():
            assert cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST == cfg.MODEL.RETINANET.SCORE_THRESH_TEST == 0.3
            assert cfg.TEST.DETECTIONS_PER_IMAGE == 7

    def test_configs_bring_their_own_weights_and_captions_name_them(self, files, cfg):
        a, b = files("a.yaml", "b.yaml")
        assert [found.MODEL.WEIGHTS for found in load_predictors([a, b], None, None, 0.5).values()] == [
            cfg.MODEL.WEIGHTS
        ] * 2
        assert list(load_predictors([a, b], None, None, 0.5)) == [a, b]
        assert list(load_predictors([a, b], ["1.pth"], ["standard", "robust"], 0.5)) == ["standard", "robust"]

    @pytest.mark.parametrize(
        ("configs", "weights", "captions", "threshold", "words"),
        [
            (2, 3, None, 0.5, "--config-file was given 2 times for 3 detectors: give it 1 or 3"),
            (3, 2, None, 0.5, "--weights was given 2 times for 3 detectors"),
            (2, 2, ["a"], 0.5, "give 2 different --caption"),
            (2, 2, ["a", "a"], 0.5, "give 2 different --caption"),
            (1, 1, None, 50, "--threshold 50: a score lies in 0 to 1"),
        ],
    )
    def test_mistakes_are_one_line(self, configs, weights, captions, threshold, words):
        with pytest.raises(InputError, match=words):
            load_predictors(
                [f"{i}.yaml" for i in range(configs)],
                [f"{i}.pth" for i in range(weights)],
                captions,
                threshold,
            )
