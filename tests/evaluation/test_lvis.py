import contextlib
import copy
import io
import json
import sys

import numpy as np
import pytest
from detectron2.config import get_cfg
from detectron2.evaluation import LVISEvaluator as Detectron2LVISEvaluator

from rt_detectron.detection import Trainer
from rt_detectron.evaluation import LVISEvaluator
from rt_detectron.evaluation.lvis import METRICS, evaluate_lvis_detections
from rt_detectron.utils.errors import InputError

lvis = pytest.importorskip("lvis", reason="the lvis package is not installed")
SEEDS = range(15)


@pytest.fixture
def federated(draw):
    """``federated(seed, task)``: a random dataset in LVIS's format, and detections on it."""

    def make(seed: int, task: str = "bbox"):
        drawn, rng = draw(seed, task), np.random.default_rng(seed)
        categories = [category["id"] for category in drawn.dataset["categories"]]
        for category in drawn.dataset["categories"]:
            category["frequency"] = str(rng.choice(list("rcf")))
        for image in drawn.dataset["images"]:
            for field in ("neg_category_ids", "not_exhaustive_category_ids"):
                count = rng.integers(0, len(categories) + 1)
                image[field] = rng.choice(categories, count, replace=False).tolist()
        return drawn

    return make


@pytest.fixture
def old_numpy(monkeypatch):
    """What the lvis package's own accumulate() asks NumPy for, in vain from 1.24 on."""
    monkeypatch.setattr(np, "float", float, raising=False)


def index(dataset: dict, folder) -> "lvis.LVIS":
    path = folder / "lvis.json"
    path.write_text(json.dumps(dataset))
    return lvis.LVIS(str(path))


@pytest.mark.parametrize("task", ["bbox", "segm"])
@pytest.mark.parametrize("max_dets", [300, 5, -1])
def test_equal_to_the_lvis_package(federated, tmp_path, old_numpy, task, max_dets):
    aps = []
    for seed in SEEDS:
        drawn = federated(seed, task)
        gt = index(drawn.dataset, tmp_path)
        theirs = lvis.LVISEval(gt, lvis.LVISResults(gt, copy.deepcopy(drawn.results), max_dets), task)
        theirs.run()
        before = copy.deepcopy(drawn.results)
        with contextlib.redirect_stdout(io.StringIO()):
            ours = evaluate_lvis_detections(
                index(drawn.dataset, tmp_path), drawn.results, task, max_dets=max_dets
            )
        assert drawn.results == before
        for metric in METRICS:
            assert ours[metric] == pytest.approx(100 * theirs.results[metric], abs=1e-9), (seed, metric)
        aps.append(ours["AP"])
    assert len(set(aps)) == len(SEEDS)


class TestEvaluator:
    def both(self, name, drawn, folder, **options) -> list[dict]:
        inputs, outputs = drawn.outputs()
        results = []
        for cls in (LVISEvaluator, Detectron2LVISEvaluator):
            evaluator = cls(name, output_dir=str(folder / cls.__module__), **options)
            evaluator.reset()
            evaluator.process(inputs, outputs)
            with contextlib.redirect_stdout(io.StringIO()):
                results.append(evaluator.evaluate())
        return results

    @pytest.mark.parametrize("task", ["bbox", "segm"])
    @pytest.mark.parametrize("mapped", [True, False])
    def test_gives_what_detectron2s_own_gives(self, federated, register, tmp_path, old_numpy, task, mapped):
        drawn = federated(7, task)
        if not mapped:  # LVIS's own ids are 1, 2, ...
            number = {c["id"]: n for n, c in enumerate(drawn.dataset["categories"], start=1)}
            for entry in (*drawn.dataset["annotations"], *drawn.results):
                entry["category_id"] = number[entry["category_id"]]
            for category in drawn.dataset["categories"]:
                category["id"] = number[category["id"]]
            for image in drawn.dataset["images"]:
                for field in ("neg_category_ids", "not_exhaustive_category_ids"):
                    image[field] = [number[c] for c in image[field]]
        name = register(drawn.dataset, **(drawn.metadata() if mapped else {}))
        ours, theirs = self.both(name, drawn, tmp_path, max_dets_per_image=10)
        assert list(ours) == list(theirs) == (["bbox", "segm"] if task == "segm" else ["bbox"])
        for kind in theirs:
            assert list(ours[kind]) == list(theirs[kind])
            assert ours[kind] == pytest.approx(theirs[kind], abs=1e-9)
        assert ours[task]["AP"] > 0
        files = [path.read_text() for path in tmp_path.rglob("lvis_instances_results.json")]
        assert len(files) == 2
        assert files[0] == files[1]

    def test_without_any_detection(self, federated, register, tmp_path):
        drawn = federated(7)
        drawn.results = []
        ours, theirs = self.both(register(drawn.dataset, **drawn.metadata()), drawn, tmp_path)
        assert list(ours["bbox"]) == list(theirs["bbox"])
        assert np.isnan([*ours["bbox"].values(), *theirs["bbox"].values()]).all()

    def test_is_what_the_trainer_uses(self, federated, register, tmp_path):
        name = register(federated(7).dataset, evaluator_type="lvis")
        cfg = get_cfg()
        cfg.DATASETS.TEST, cfg.OUTPUT_DIR = (name,), str(tmp_path)
        assert isinstance(Trainer.build_evaluator(cfg, name), LVISEvaluator)

    @pytest.mark.parametrize(
        ("kind", "field"),
        [
            ("images", "neg_category_ids"),
            ("images", "not_exhaustive_category_ids"),
            ("categories", "frequency"),
        ],
    )
    def test_a_file_that_is_not_federated(self, federated, register, kind, field):
        dataset = federated(7).dataset
        del dataset[kind][1][field]
        with pytest.raises(
            InputError, match=rf"{kind} entry \d+ has no '{field}'.* evaluator_type to \"coco\""
        ):
            LVISEvaluator(register(dataset))

    def test_two_images_with_one_id(self, federated, register):
        dataset = federated(7).dataset
        dataset["images"][1]["id"] = dataset["images"][0]["id"]
        with pytest.raises(InputError, match=r"json: two images have the id \d+, '\d+\.jpg' and"):
            LVISEvaluator(register(dataset))

    def test_a_broken_file(self, register):
        with pytest.raises(
            InputError, match=r"rt_test_evaluation_0.json: not usable annotations \(Expecting"
        ):
            LVISEvaluator(register("{"))

    def test_without_the_package(self, federated, register, monkeypatch):
        monkeypatch.setitem(sys.modules, "lvis", None)
        with pytest.raises(InputError, match='pip install "lvis"'):
            LVISEvaluator(register(federated(7).dataset))


def test_bad_detections(federated, tmp_path):
    drawn = federated(7)
    gt = index(drawn.dataset, tmp_path)
    with pytest.raises(InputError, match="no task 'keypoints'; use bbox or segm"):
        evaluate_lvis_detections(gt, drawn.results, "keypoints")
    with pytest.raises(InputError, match="a detection has no 'segmentation', which segm AP needs"):
        evaluate_lvis_detections(gt, drawn.results, "segm")
