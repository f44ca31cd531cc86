import contextlib
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.structures import BitMasks, Boxes, Instances
from pycocotools import mask as mask_utils
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

import rt_detectron
from rt_detectron.config import add_robust_config
from rt_detectron.detection import Trainer
from rt_detectron.evaluation.results import config_sha256, write_results

NAME = "rt_test_results_val"


class NearlyRight(torch.nn.Module):
    """A "detector" that returns the annotated objects, shifted by up to 3 pixels, some of a wrong class."""

    def __init__(self, annotations: COCO, classes: dict[int, int]):
        super().__init__()
        self.annotations = annotations
        self.classes = classes
        self.rng = np.random.default_rng(0)

    def forward(self, batch):
        return [{"instances": self.instances(image)} for image in batch]

    def instances(self, image):
        found = self.annotations.imgToAnns[image["image_id"]]
        shifts = self.rng.integers(0, 4, len(found)).tolist()
        boxes = torch.tensor([annotation["bbox"] for annotation in found])
        boxes[:, 2:] += boxes[:, :2]
        masks = [mask_utils.decode(annotation["segmentation"]) for annotation in found]
        masks = [np.roll(mask, shift, axis=1) for mask, shift in zip(masks, shifts, strict=True)]
        classes = torch.tensor([self.classes[annotation["category_id"]] for annotation in found])
        wrong = torch.tensor(self.rng.random(len(found)) < 0.2)
        instances = Instances((image["height"], image["width"]))
        instances.pred_boxes = Boxes(boxes + torch.tensor([[s, 0.0, s, 0.0] for s in shifts]))
        instances.pred_masks = BitMasks(np.stack(masks)).tensor
        instances.pred_classes = torch.where(wrong, (classes + 1) % 10, classes)
        instances.scores = torch.tensor(self.rng.random(len(found)), dtype=torch.float32)
        return instances


@pytest.fixture(scope="module")
def annotations(tiny_datasets):
    """The tiny test set, registered under NAME; gives the path of its annotations."""
    folder = tiny_datasets / "demo" / "detection"
    path = folder / "annotations" / "instances_val.json"
    register_coco_instances(NAME, {}, str(path), str(folder / "val"))
    yield path
    DatasetCatalog.remove(NAME)
    MetadataCatalog.remove(NAME)


@pytest.fixture
def cfg(tmp_path):
    cfg = get_cfg()
    add_robust_config(cfg)
    cfg.MODEL.DEVICE = "cpu"
    cfg.DATALOADER.NUM_WORKERS = 0
    cfg.MODEL.WEIGHTS = "weights/as given.pkl"
    cfg.SEED = 7
    cfg.DATASETS.TEST = (NAME,)
    cfg.OUTPUT_DIR = str(tmp_path)
    return cfg


def written(cfg, results, **kwargs) -> dict:
    path = write_results(cfg, results, **{"wall_time_s": 1.26, "iterations": 300, **kwargs})
    assert path == f"{cfg.OUTPUT_DIR}/results.json"
    return json.loads(Path(path).read_text())


def reference(annotations: COCO, predictions: str, task: str) -> COCOeval:
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = COCOeval(annotations, annotations.loadRes(predictions), task)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation


def test_ap_is_that_of_pycocotools_on_the_predictions_file(cfg, annotations):
    DatasetCatalog.get(NAME)  # fills in the mapping of the categories
    metadata = MetadataCatalog.get(NAME)
    coco = COCO(str(annotations))
    model = NearlyRight(coco, metadata.thing_dataset_id_to_contiguous_id).eval()
    content = written(cfg, Trainer.test(cfg, model))
    (dataset,) = content["datasets"]
    assert dataset == {
        "name": NAME,
        "json_file": str(annotations),
        "image_root": str(annotations.parents[1] / "val"),
        "predictions": f"{cfg.OUTPUT_DIR}/inference/coco_instances_results.json",
    }
    for task in ("bbox", "segm"):
        evaluation = reference(coco, dataset["predictions"], task)
        metrics = content["metrics"][task]
        assert metrics["AP"] == pytest.approx(100 * evaluation.stats[0], abs=1e-6)
        assert metrics["AP50"] == pytest.approx(100 * evaluation.stats[1], abs=1e-6)
        assert 5 < metrics["AP"] < 95
        # precision: IoU, recall, category, area, detections; -1 where a category has no object
        per_class = evaluation.eval["precision"][:, :, :, 0, -1]
        for number, name in enumerate(metadata.thing_classes):
            precision = per_class[:, :, number]
            if (precision > -1).any():
                expected = 100 * precision[precision > -1].mean()
                assert metrics[f"AP-{name}"] == pytest.approx(expected, abs=1e-6)
            else:
                assert metrics[f"AP-{name}"] is None


def test_predictions_are_in_cocos_format(cfg, annotations):
    DatasetCatalog.get(NAME)
    coco = COCO(str(annotations))
    model = NearlyRight(coco, MetadataCatalog.get(NAME).thing_dataset_id_to_contiguous_id).eval()
    content = written(cfg, Trainer.test(cfg, model))
    predictions = json.loads(Path(content["datasets"][0]["predictions"]).read_text())
    assert len(predictions) == len(coco.anns)
    for prediction in predictions:
        assert set(prediction) == {"image_id", "category_id", "bbox", "score", "segmentation"}
        assert prediction["category_id"] in coco.cats
        assert mask_utils.area(prediction["segmentation"]) > 0
    # x, y, width, height: the sizes are those of the annotated boxes
    widths = sorted(round(prediction["bbox"][2], 3) for prediction in predictions)
    assert widths == sorted(annotation["bbox"][2] for annotation in coco.anns.values())


def test_content(cfg, annotations):
    results = {"bbox": {"AP": 12.5, "AP-cat": float("nan"), "AP-dog": np.float64(3)}}
    content = written(cfg, results)
    assert content["metrics"] == {"bbox": {"AP": 12.5, "AP-cat": None, "AP-dog": 3.0}}
    assert content["seed"] == 7
    assert content["iterations"] == 300
    assert content["wall_time_s"] == 1.3
    assert content["weights"] == "weights/as given.pkl"
    assert content["config_sha256"] == config_sha256(cfg)
    assert content["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert content["versions"]["rt_detectron"] == rt_detectron.__version__
    assert {"python", "detectron2", "torchvision", "numpy", "pycocotools"} <= set(content["versions"])
    assert content["datasets"][0]["predictions"] is None  # nothing was evaluated into this folder


def test_several_test_sets_have_a_folder_each(cfg, annotations):
    cfg.DATASETS.TEST = (NAME, "rt_demo_val")
    folder = Path(cfg.OUTPUT_DIR, "inference", "rt_demo_val")
    folder.mkdir(parents=True)
    (folder / "coco_instances_results.json").write_text("[]")
    datasets = written(cfg, {NAME: {"bbox": {"AP": 1.0}}, "rt_demo_val": {}})["datasets"]
    assert [dataset["name"] for dataset in datasets] == [NAME, "rt_demo_val"]
    assert datasets[0]["predictions"] is None
    assert datasets[1]["predictions"] == str(folder / "coco_instances_results.json")
    assert Trainer.build_evaluator(cfg, NAME)._output_dir == str(folder.parent / NAME)


def test_the_hash_is_the_configs_wherever_the_output_lies(cfg):
    first = config_sha256(cfg)
    cfg.OUTPUT_DIR = "elsewhere"
    cfg.freeze()
    assert config_sha256(cfg) == first
    assert cfg.OUTPUT_DIR == "elsewhere"
    cfg.defrost()
    cfg.SEED = 8
    assert config_sha256(cfg) != first


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_an_interrupted_write_leaves_the_old_file_alone(cfg, annotations, monkeypatch, error):
    old = written(cfg, {"bbox": {"AP": 1.0}})

    def interrupted(content, file, **kwargs):
        file.write('{"metrics": ')
        raise error

    monkeypatch.setattr(json, "dump", interrupted)
    with pytest.raises(error):
        write_results(cfg, {"bbox": {"AP": 2.0}}, 1.0, 1)
    (path,) = Path(cfg.OUTPUT_DIR).iterdir()
    assert json.loads(path.read_text()) == old
