import json
import logging
from pathlib import Path

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.evaluation import DatasetEvaluators

from rt_detectron.evaluation import COCOEvaluator
from rt_detectron.evaluation.build import build_evaluator, check_test_sets, inference_folder
from rt_detectron.utils.errors import InputError

NAME = "rt_test_build"


@pytest.fixture
def cfg(tiny_cfg, tmp_path):
    return tiny_cfg(tmp_path)


class TestBuildEvaluator:
    def test_coco_and_panoptic(self, cfg, sets, monkeypatch):
        assert isinstance(build_evaluator(cfg, sets["val"]), COCOEvaluator)
        name = "coco_2017_val_100_panoptic_separated"
        made = []
        for kind in ("COCOEvaluator", "SemSegEvaluator", "COCOPanopticEvaluator"):
            monkeypatch.setattr(
                f"rt_detectron.evaluation.build.{kind}", lambda *a, kind=kind, **k: made.append(kind)
            )
        assert isinstance(build_evaluator(cfg, name), DatasetEvaluators)
        assert made == ["COCOEvaluator", "SemSegEvaluator", "COCOPanopticEvaluator"]

    def test_an_unknown_kind_is_refused(self, cfg):
        MetadataCatalog.get("rt_test_unknown_kind").evaluator_type = "ocr"
        with pytest.raises(InputError, match=r"evaluator_type 'ocr'; known are coco, "):
            build_evaluator(cfg, "rt_test_unknown_kind")
        MetadataCatalog.remove("rt_test_unknown_kind")

    def test_the_limit_of_detections_is_a_key(self, tiny_cfg, sets, tmp_path, caplog):
        for detections, key, limit in ((10, 0, 100), (300, 0, 300), (300, 100, 100), (10, 50, 50)):
            caplog.clear()
            cfg = tiny_cfg(tmp_path, "TEST.DETECTIONS_PER_IMAGE", detections, "TEST.COCO_MAX_DETS", key)
            assert build_evaluator(cfg, sets["val"])._max_dets_per_image == [1, 10, limit]
            assert (f"AP counts up to {limit} detections" in caplog.text) == (limit != 100)


def test_each_of_several_sets_has_a_folder_below_inference(tiny_cfg, tmp_path):
    """Also one that is named by its paths, and two that differ in a single character."""
    names = ["plain", "coco:a/b.json:c", "coco:a_b.json:c", "coco:" + "deep/" * 90 + "b.json:c@any"]
    cfg = tiny_cfg(tmp_path, "DATASETS.TEST", repr(tuple(names)))
    folders = [Path(inference_folder(cfg, name)) for name in names]
    assert folders[0] == tmp_path / "inference" / "plain"
    assert {folder.parent for folder in folders} == {tmp_path / "inference"}
    assert len(set(folders)) == len(names)
    for folder in folders:
        folder.mkdir(parents=True)


class TestCheckTestSets:
    """What the evaluation would find at its end is found before it begins."""

    @pytest.fixture
    def spoiled(self, tiny_cfg, sets, tmp_path):
        """``spoiled(change, KEY, VALUE, ...)``: a config whose test set is the tiny one, changed."""

        def make(change, *opts):
            source = MetadataCatalog.get(sets["val"])
            content = json.loads(Path(source.json_file).read_text())
            change(content)
            path = tmp_path / "spoiled.json"
            path.write_text(json.dumps(content))
            register_coco_instances(NAME, {}, str(path), source.image_root)
            return tiny_cfg(tmp_path, "DATASETS.TEST", f"('{NAME}',)", *opts)

        yield make
        DatasetCatalog.remove(NAME)
        MetadataCatalog.remove(NAME)

    @staticmethod
    def message(cfg) -> str:
        with pytest.raises(InputError) as error:
            check_test_sets(cfg)
        assert "\n" not in str(error.value)
        return str(error.value)

    def test_a_sound_one(self, cfg):
        check_test_sets(cfg)

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            (lambda content: [a.pop("area") for a in content["annotations"]], "and an 'area'"),
            (lambda content: content["annotations"][2].pop("bbox"), "needs a 'bbox'"),
            (
                lambda content: content["annotations"][2].update(image_id=999),
                "only 15 of them match to images",
            ),
            (lambda content: [a.update(id=7) for a in content["annotations"]], "not unique"),
            (lambda content: content["annotations"][0].update(category_id=99), "category_id=99"),
            (lambda content: content["annotations"][1].pop("segmentation"), "set MODEL.MASK_ON False"),
            (lambda content: content["annotations"][1].update(segmentation=[]), "set MODEL.MASK_ON False"),
            (lambda content: content["annotations"][1].update(segmentation=[[1, 2, 3, 4]]), "three points"),
            (
                lambda content: content["annotations"][1]["segmentation"].update(size=[9, 9]),
                "of the size [9, 9]",
            ),
            (lambda content: content["images"][0].pop("height"), "height"),
        ],
    )
    def test_annotations_that_cannot_be_scored(self, spoiled, tmp_path, change, words):
        text = self.message(spoiled(change))
        assert text.startswith(f"{tmp_path}/spoiled.json: ")
        assert words in text

    def test_without_masks_none_are_needed(self, spoiled):
        check_test_sets(
            spoiled(lambda content: content["annotations"][1].pop("segmentation"), "MODEL.MASK_ON", False)
        )

    def test_keypoints(self, spoiled):
        text = self.message(spoiled(lambda content: None, "MODEL.KEYPOINT_ON", True))
        assert text.endswith("it has 0 keypoints; without it, set MODEL.KEYPOINT_ON False")

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            (lambda c: c["categories"][2].update(name="ox"), "class 2 is 'ox', not 'two'"),
            (
                lambda c: [c["categories"][k].update(id=i) for k, i in ((0, 2), (1, 1))],
                "class 0 is 'one', not 'zero'",
            ),
            (lambda c: c["categories"].append({"id": 11, "name": "ten"}), "is 10, but rt_test_build has 11"),
        ],
    )
    def test_classes_that_are_not_the_training_sets(self, spoiled, change, words):
        assert words in self.message(spoiled(change))

    def test_images_of_test_sets_are_never_skipped(self, spoiled):
        cfg = spoiled(lambda c: c["images"][0].update(file_name="x.jpg"), "INPUT.ON_CORRUPT", "skip")
        assert self.message(cfg).endswith(
            "x.jpg: cannot be read (there is no such file); repair or delete it"
        )

    def test_a_set_without_objects_is_told(self, spoiled, caplog):
        check_test_sets(spoiled(lambda content: content.update(annotations=[])))
        assert "has no annotated object: its AP is undefined" in caplog.text

    def test_a_set_for_semantic_segmentation_has_none(self, tiny_cfg, sets, tmp_path, caplog):
        images = Path(MetadataCatalog.get(sets["val"]).image_root).glob("*.jpg")
        records = [{"file_name": str(image), "sem_seg_file_name": "semantic.png"} for image in images]
        DatasetCatalog.register(NAME, lambda: records)
        MetadataCatalog.get(NAME).set(evaluator_type="sem_seg", stuff_classes=["sky"], ignore_label=255)
        check_test_sets(tiny_cfg(tmp_path, "DATASETS.TEST", NAME))
        assert "AP" not in caplog.text
        DatasetCatalog.remove(NAME)
        MetadataCatalog.remove(NAME)

    def test_more_objects_than_detections(self, tiny_cfg, tmp_path, caplog):
        with caplog.at_level(logging.WARNING):
            check_test_sets(tiny_cfg(tmp_path, "TEST.DETECTIONS_PER_IMAGE", 1))
        assert "objects, but TEST.DETECTIONS_PER_IMAGE is 1: no more are found" in caplog.text
