import contextlib
import io
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, DatasetMapper, MetadataCatalog
from detectron2.evaluation import DatasetEvaluator
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from rt_detectron.attacks import PGD, RandomNoise, ThreatModel, build_detector_attack
from rt_detectron.data.corruptions import CorruptionMapper
from rt_detectron.detection import Trainer
from rt_detectron.evaluation.robustness.test_set import (
    DetectionTestSet,
    _batches,
    annotated_test_mapper,
    spread,
    zero_where_nothing_is_found,
)
from rt_detectron.utils.errors import InputError


@pytest.fixture(scope="module")
def evaluator(learned, tmp_path_factory):
    cfg = learned[0].clone()
    cfg.defrost()
    cfg.OUTPUT_DIR = str(tmp_path_factory.mktemp("evaluator"))
    return Trainer.build_evaluator(cfg, cfg.DATASETS.TEST[0])


@pytest.fixture(scope="module")
def images(learned, evaluator):
    cfg, _ = learned
    return DetectionTestSet(DatasetCatalog.get(cfg.DATASETS.TEST[0]), evaluator, annotated_test_mapper(cfg))


@pytest.fixture(scope="module")
def clean(learned, images):
    metrics = images.evaluate(learned[1])
    assert metrics["bbox"]["AP"] > 30  # else nothing below means much
    return metrics


class TestUnderAttack:
    def ap(self, learned, images, clean, change):
        metrics = images.evaluate(learned[1], perturb=change, clean=clean)
        return metrics["bbox"]["AP"], metrics["segm"]["AP"]

    @pytest.mark.parametrize(("norm", "all_eps"), [("linf", (8, 16, 32)), ("l2", (2.0, 8.0))])
    def test_ap_falls_as_eps_grows_and_more_than_under_noise(self, learned, images, clean, norm, all_eps):
        found = [(clean["bbox"]["AP"], clean["segm"]["AP"])]  # at eps 0
        for eps in all_eps:
            attack = build_detector_attack("all", PGD(ThreatModel(norm, eps), steps=5))
            found.append(self.ap(learned, images, clean, attack))
        boxes = [box for box, _ in found]
        assert boxes == sorted(boxes, reverse=True)
        noise = self.ap(learned, images, clean, RandomNoise(ThreatModel(norm, all_eps[-1])))
        for task in (0, 1):
            assert found[-1][task] < 0.5 * noise[task]

    def test_without_any_detection_ap_is_0(self, learned, images, clean, monkeypatch):
        monkeypatch.setattr(learned[1].roi_heads.box_predictor, "test_score_thresh", 1.1)
        assert math.isnan(images.evaluate(learned[1])["bbox"]["AP"])  # Detectron2's way
        metrics = images.evaluate(learned[1], perturb=RandomNoise(ThreatModel("l2", 1.0)), clean=clean)
        assert metrics["bbox"]["AP"] == metrics["segm"]["AP"] == 0
        assert {task: set(values) for task, values in metrics.items()} == {
            task: set(values) for task, values in clean.items()
        }
        undefined = {key for key, value in clean["bbox"].items() if math.isnan(value)}
        assert undefined  # there are no large objects
        assert {key for key, value in metrics["bbox"].items() if math.isnan(value)} == undefined

    def test_nothing_of_the_model_changes(self, learned, images, clean):
        _, model = learned
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        model.roi_heads.train()
        images.evaluate(model, perturb=build_detector_attack("all", PGD(ThreatModel("l2", 1.0), steps=1)))
        assert model.roi_heads.training
        assert not model.backbone.training
        model.eval()
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_batches_change_no_number(learned, images, clean):
    _, model = learned
    attack = build_detector_attack("A_cls", PGD(ThreatModel("l2", 2.0), steps=2, random_start=True))
    found, seen = [], []

    def noted(model, inputs):
        attacked = attack(model, inputs)
        seen.append({each["image_id"]: each["image"] for each in attacked})
        return attacked

    for size in (1, 4):
        found.append(replace(images, batch_size=size).evaluate(model, perturb=noted, clean=clean))
    one_by_one, together = seen[: len(images.dicts)], seen[len(images.dicts) :]
    assert len(together) < len(one_by_one)
    moved = {key: image for part in together for key, image in part.items()}
    for part in one_by_one:
        ((key, image),) = part.items()
        assert (image - moved[key]).norm() < 0.02 * 255
    assert found[0]["bbox"]["AP"] == pytest.approx(found[1]["bbox"]["AP"], abs=0.5)
    assert found[0]["bbox"]["AP"] < 0.9 * clean["bbox"]["AP"]


def test_only_images_of_one_size_make_a_batch():
    sizes = [(4, 6), (6, 4), (4, 6), (4, 6), (6, 4)]
    dicts = [{"height": height, "width": width} for height, width in sizes]
    assert _batches(dicts, 2) == [[0, 2], [3], [1, 4]]
    assert _batches([*dicts, {}, {}], 9) == [[0, 2, 3], [1, 4], [5], [6]]
    assert _batches(dicts, 1) == [[0], [1], [2], [3], [4]]


class TestSubset:
    def test_only_the_objects_of_its_images_count(self, learned, images, evaluator):
        """As pycocotools scores the predictions of these images alone."""
        cfg, model = learned
        some = images.spread(2)
        metrics = some.evaluate(model)
        with open(f"{evaluator._output_dir}/coco_instances_results.json") as file:
            predictions = json.load(file)
        ids = [image["image_id"] for image in some.dicts]
        assert {prediction["image_id"] for prediction in predictions} <= set(ids)
        with contextlib.redirect_stdout(io.StringIO()):
            annotations = COCO(MetadataCatalog.get(cfg.DATASETS.TEST[0]).json_file)
            reference = COCOeval(annotations, annotations.loadRes(predictions), "bbox")
            reference.params.imgIds = ids
            reference.evaluate()
            reference.accumulate()
            reference.summarize()
        assert metrics["bbox"]["AP"] == pytest.approx(100 * reference.stats[0], abs=1e-6)
        assert metrics["bbox"]["AP"] > 5

    def test_evenly_spread(self, images):
        assert spread(range(10), 3) == [0, 3, 6]
        assert spread(range(3), 5) == [0, 1, 2]
        assert images.spread(0) is images
        assert images.spread(6) is images
        assert not images.spread(5).whole

    def test_an_evaluator_that_only_scores_whole_sets(self, images):
        whole = DetectionTestSet(images.dicts, DatasetEvaluator(), images.mapper)
        assert whole.spread(0) is whole
        with pytest.raises(InputError, match="DatasetEvaluator only scores whole test sets"):
            whole.spread(2)


def test_the_mapper_resizes_the_ground_truth_with_the_image(learned):
    cfg = learned[0].clone()
    cfg.defrost()
    cfg.INPUT.MIN_SIZE_TEST = 48
    image = DatasetCatalog.get(cfg.DATASETS.TEST[0])[0]
    found, plain = annotated_test_mapper(cfg)(image), DatasetMapper(cfg, is_train=False)(image)
    assert torch.equal(found["image"], plain["image"])
    assert {key: found[key] for key in ("image_id", "height", "width")} == {
        key: plain[key] for key in ("image_id", "height", "width")
    }
    x, y, width, height = np.array([annotation["bbox"] for annotation in image["annotations"]]).T
    expected = torch.tensor(np.stack([x, y, x + width, y + height], 1) / 2, dtype=torch.float32)
    assert torch.allclose(found["instances"].gt_boxes.tensor, expected)
    tight = found["instances"].gt_masks.get_bounding_boxes().tensor
    assert (tight - expected).abs().max() <= 1
    assert "annotations" in image  # the dataset's own dict is left alone
    empty = annotated_test_mapper(cfg)({**image, "annotations": []})
    assert len(empty["instances"]) == 0


class TestUnderCorruption:
    def test_ap_falls(self, learned, images, clean):
        mild, strong = (
            images.evaluate(
                learned[1], mapper=CorruptionMapper(images.mapper, "gaussian_noise", severity), clean=clean
            )
            for severity in (1, 5)
        )
        assert strong["bbox"]["AP"] < min(mild["bbox"]["AP"], clean["bbox"]["AP"])


def test_zero_is_told_from_undefined():
    nan = math.nan
    clean = {"bbox": {"AP": 3.0, "APl": nan, "AP-dog": 1.0}, "segm": {"AP": 2.0, "APl": None}}
    found = zero_where_nothing_is_found({"bbox": {"AP": nan, "APl": nan, "AP-cat": 1.0}}, clean)
    assert found["bbox"].keys() == {"AP", "APl", "AP-dog", "AP-cat"}
    assert (found["bbox"]["AP"], found["bbox"]["AP-dog"], found["bbox"]["AP-cat"]) == (0, 0, 1)
    assert math.isnan(found["bbox"]["APl"])
    assert found["segm"]["AP"] == 0
    assert math.isnan(found["segm"]["APl"])
