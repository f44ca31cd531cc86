import pytest
from detectron2.data import MetadataCatalog
from detectron2.evaluation import DatasetEvaluators

from rt_detectron.evaluation import COCOEvaluator
from rt_detectron.evaluation.build import build_evaluator
from rt_detectron.utils.errors import InputError


class TestBuildEvaluator:
    @pytest.fixture
    def cfg(self, tiny_cfg, tmp_path):
        return tiny_cfg(tmp_path)

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
