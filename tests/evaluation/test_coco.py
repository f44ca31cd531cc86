import contextlib
import copy
import io
import json
import os
from pathlib import Path

import numpy as np
import pytest
from detectron2.data import MetadataCatalog
from detectron2.evaluation import COCOEvaluator as Detectron2COCOEvaluator
from detectron2.structures import Instances
from pycocotools import mask as rle_masks
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from rt_detectron.evaluation import COCOEvaluator, evaluate_detections
from rt_detectron.evaluation.coco import write_evaluations
from rt_detectron.evaluation.matching import curves_of, read_matches, write_matches
from rt_detectron.utils.errors import InputError

SEEDS = range(20)
TASKS = ("bbox", "segm", "keypoints")
SIGMAS = np.linspace(0.02, 0.2, 17).tolist()


def coco_of(dataset: dict) -> COCO:
    coco = COCO()
    coco.dataset = copy.deepcopy(dataset)
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco


def pycocotools_of(dataset: dict, results: list[dict], task: str, **params) -> COCOeval:
    """pycocotools alone, with the given attributes of its params."""
    coco = coco_of(dataset)
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = COCOeval(coco, coco.loadRes(copy.deepcopy(results)), task)
        for name, value in params.items():
            setattr(evaluation.params, name, value)
        evaluation.evaluate()
        evaluation.accumulate()
        if params.get("maxDets") is None:
            evaluation.summarize()
    return evaluation


def assert_equal(ours: COCOeval, theirs: COCOeval) -> None:
    for name in ("precision", "recall", "scores"):
        assert ours.eval[name].shape == theirs.eval[name].shape
        np.testing.assert_allclose(ours.eval[name], theirs.eval[name], rtol=0, atol=1e-9, err_msg=name)
    if len(theirs.stats):
        np.testing.assert_allclose(ours.stats, theirs.stats, rtol=0, atol=1e-9)


class TestEqualToPycocotools:
    @pytest.mark.parametrize("task", TASKS)
    def test_on_random_detections(self, draw, task):
        for seed in SEEDS:
            drawn = draw(seed, task)
            ours = evaluate_detections(coco_of(drawn.dataset), drawn.results, task)
            assert_equal(ours, pycocotools_of(drawn.dataset, drawn.results, task))

    @pytest.mark.parametrize("task", TASKS)
    def test_the_object_of_annotation_0_counts_like_any_other(self, draw, task):
        losses = []
        for seed in range(8):
            drawn = draw(seed, task)
            expected = pycocotools_of(drawn.dataset, drawn.results, task)
            for annotation in drawn.dataset["annotations"]:
                annotation["id"] -= 1
            assert_equal(evaluate_detections(coco_of(drawn.dataset), drawn.results, task), expected)
            losses.append(expected.stats[0] - pycocotools_of(drawn.dataset, drawn.results, task).stats[0])
        # The reason not to follow pycocotools here. Few of the drawn keypoints are near enough to show it.
        assert task == "keypoints" or max(losses) > 0

    def test_the_random_sets_hold_the_hard_cases(self, draw):
        """Otherwise the test above would show little."""
        drawn = [draw(seed) for seed in SEEDS]
        annotations = [a for d in drawn for a in d.dataset["annotations"]]
        results = [r for d in drawn for r in d.results]
        assert sum(a["iscrowd"] for a in annotations) > 20
        assert sum(a["bbox"][3] == 0 for a in annotations) > 10
        assert sum(r["bbox"][3] == 0 for r in results) > 10
        assert {0.0, 32.0**2, 96.0**2} <= {a["area"] for a in annotations}
        assert any(
            {i["id"] for i in d.dataset["images"]} - {a["image_id"] for a in d.dataset["annotations"]}
            for d in drawn
        )
        groups = [
            (n, r["image_id"], r["category_id"], r["score"]) for n, d in enumerate(drawn) for r in d.results
        ]
        assert len(groups) - len(set(groups)) > 50  # equal scores
        aps = [pycocotools_of(d.dataset, d.results, "bbox").stats[0] for d in drawn]
        assert len({round(ap, 6) for ap in aps}) == len(SEEDS)
        assert 0.1 < np.mean(aps) < 0.9

    @pytest.mark.parametrize("task", ["bbox", "segm"])
    def test_with_other_limits_of_detections(self, draw, task):
        for seed in SEEDS:
            drawn = draw(seed, task)
            ours = evaluate_detections(coco_of(drawn.dataset), drawn.results, task, max_dets=(2, 1, 3))
            assert_equal(ours, pycocotools_of(drawn.dataset, drawn.results, task, maxDets=[2, 1, 3]))

    @pytest.mark.parametrize("task", TASKS)
    def test_on_some_of_the_images(self, draw, task):
        for seed in SEEDS:
            drawn = draw(seed, task)
            some = [image["id"] for image in drawn.dataset["images"]][1::2]
            ours = evaluate_detections(coco_of(drawn.dataset), drawn.results, task, img_ids=some)
            assert_equal(ours, pycocotools_of(drawn.dataset, drawn.results, task, imgIds=some))

    def test_with_other_sigmas(self, draw):
        for seed in SEEDS:
            drawn = draw(seed, "keypoints")
            ours = evaluate_detections(
                coco_of(drawn.dataset), drawn.results, "keypoints", kpt_oks_sigmas=SIGMAS
            )
            theirs = pycocotools_of(
                drawn.dataset, drawn.results, "keypoints", kpt_oks_sigmas=np.array(SIGMAS)
            )
            assert_equal(ours, theirs)

    def test_keypoints_that_come_with_boxes(self, draw):
        """pycocotools measures them by the box if the first of all detections has one."""
        drawn = draw(3, "keypoints")
        for result in drawn.results:
            x, y = np.reshape(result["keypoints"], (-1, 3))[:, :2].T
            result["bbox"] = [x.min(), y.min(), 3 * np.ptp(x), 3 * np.ptp(y)]
        ours = evaluate_detections(coco_of(drawn.dataset), drawn.results, "keypoints")
        assert_equal(ours, pycocotools_of(drawn.dataset, drawn.results, "keypoints"))

    def test_on_image_ids_that_are_words(self, draw):
        drawn = draw(5)
        for entry in (*drawn.dataset["annotations"], *drawn.results):
            entry["image_id"] = f"image {entry['image_id']}"
        for image in drawn.dataset["images"]:
            image["id"] = f"image {image['id']}"
        ours = evaluate_detections(coco_of(drawn.dataset), drawn.results, "bbox")
        assert_equal(ours, pycocotools_of(drawn.dataset, drawn.results, "bbox"))

    def test_on_ids_that_floating_point_cannot_tell_apart(self, draw):
        drawn = draw(5)
        for entry in (*drawn.dataset["annotations"], *drawn.results):
            entry["image_id"] += 2**60
        for image in drawn.dataset["images"]:
            image["id"] += 2**60
        for annotation in drawn.dataset["annotations"]:
            annotation["id"] -= 2**60  # negative ones, too
        ours = evaluate_detections(coco_of(drawn.dataset), drawn.results, "bbox")
        assert_equal(ours, pycocotools_of(drawn.dataset, drawn.results, "bbox"))

    @pytest.mark.parametrize("task", ["bbox", "segm"])
    def test_on_more_detections_of_an_image_than_a_byte_counts(self, draw, task):
        """Lists of more than 255 masks fail in some functions of pycocotools 2.0.11."""
        drawn = draw(1, task)
        image, category = (drawn.dataset["annotations"][0][key] for key in ("image_id", "category_id"))
        for result in drawn.results:
            result.update(image_id=image, category_id=category)
        results = [dict(r, score=r["score"] / n) for n in range(1, 12) for r in drawn.results][:400]
        assert len(results) == 400
        ours = evaluate_detections(coco_of(drawn.dataset), results, task, max_dets=(1, 10, 350))
        assert_equal(ours, pycocotools_of(drawn.dataset, results, task, maxDets=[1, 10, 350]))

    @pytest.mark.parametrize("task", ["bbox", "segm"])
    def test_on_real_annotations(self, task):
        root = Path(os.getenv("DETECTRON2_DATASETS", "datasets")).expanduser()
        path = root / "coco" / "annotations" / "instances_val2017.json"
        if not path.exists():
            pytest.skip("DETECTRON2_DATASETS holds no coco/annotations/instances_val2017.json")
        dataset = json.loads(path.read_text())
        rng = np.random.default_rng(0)
        images = {image["id"]: (image["height"], image["width"]) for image in dataset["images"]}
        results = []
        for a in dataset["annotations"]:
            for _ in range(rng.integers(0, 3)):
                x, y, w, h = np.array(a["bbox"]) * rng.normal(1, 0.08, 4)
                result = {"image_id": a["image_id"], "category_id": a["category_id"], "score": rng.random()}
                if task == "bbox":
                    results.append(result | {"bbox": [x, y, w, h]})
                    continue
                polygon = [[x, y, x + w, y, x + w, y + h, x, y + h]]
                results.append(
                    result | {"segmentation": rle_masks.frPyObjects(polygon, *images[a["image_id"]])[0]}
                )
        ours = evaluate_detections(coco_of(dataset), results, task)
        assert ours.stats[0] > 0.01
        assert_equal(ours, pycocotools_of(dataset, results, task))


def test_what_the_caller_gave_is_left_alone(draw):
    drawn = draw(2)
    before = copy.deepcopy(drawn.results)
    evaluate_detections(coco_of(drawn.dataset), drawn.results, "bbox")
    assert drawn.results == before


@pytest.mark.parametrize("task", TASKS)
def test_no_detections_find_nothing(draw, task):
    """pycocotools itself fails on an empty list."""
    drawn = draw(7, task)
    ours = evaluate_detections(coco_of(drawn.dataset), [], task)
    assert ours.stats[0] == 0
    expected = pycocotools_of(drawn.dataset, drawn.results, task).eval["precision"]
    assert ((ours.eval["precision"] == -1) == (expected == -1)).all()


class TestBadDetections:
    def test_unknown_task(self, draw):
        with pytest.raises(InputError, match="'boxes' is unknown; use one of bbox, segm, keypoints"):
            evaluate_detections(coco_of(draw(0).dataset), draw(0).results, "boxes")

    def test_no_masks(self, draw):
        with pytest.raises(InputError, match="a detection has no 'segmentation', which segm AP needs"):
            evaluate_detections(coco_of(draw(0, "segm").dataset), draw(0).results, "segm")

    def test_images_of_another_dataset(self, draw):
        drawn = draw(0)
        drawn.results[0]["image_id"] = -7
        with pytest.raises(
            InputError, match=r"1 images with detections are not .* as -7; evaluate on the dataset"
        ):
            evaluate_detections(coco_of(drawn.dataset), drawn.results, "bbox")

    def test_keypoints_without_a_sigma(self, draw):
        drawn = draw(0, "keypoints")
        with pytest.raises(InputError, match=r"needs 5 keypoints .* it has 17 keypoints"):
            evaluate_detections(coco_of(drawn.dataset), drawn.results, "keypoints", kpt_oks_sigmas=[0.1] * 5)
        drawn.results[0]["keypoints"] = [1.0, 2.0, 1.0]
        with pytest.raises(InputError, match="detections need 17 keypoints"):
            evaluate_detections(coco_of(drawn.dataset), drawn.results, "keypoints")

    def test_annotations_without_masks(self, draw):
        with pytest.raises(InputError, match=r"annotation \d+ has no usable segmentation: 'segmentation'"):
            evaluate_detections(coco_of(draw(0).dataset), draw(0, "segm").results, "segm")


def evaluated(evaluator, inputs, outputs) -> dict:
    evaluator.reset()
    evaluator.process(inputs, copy.deepcopy(outputs))  # Detectron2 shifts keypoints in place
    with contextlib.redirect_stdout(io.StringIO()):
        return evaluator.evaluate()


def assert_same_results(ours: dict, theirs: dict) -> None:
    assert list(ours) == list(theirs)
    for task in theirs:
        assert list(ours[task]) == list(theirs[task])
        for metric in theirs[task]:
            assert ours[task][metric] == pytest.approx(theirs[task][metric], abs=1e-9, nan_ok=True), metric


class TestEvaluator:
    def both(self, name, inputs, outputs, folder, **options) -> tuple[dict, dict]:
        """Our results and those of Detectron2's own class, which uses pycocotools."""
        ours = COCOEvaluator(name, output_dir=str(folder / "ours"), **options)
        theirs = Detectron2COCOEvaluator(
            name, output_dir=str(folder / "theirs"), use_fast_impl=False, **options
        )
        assert isinstance(ours, Detectron2COCOEvaluator)
        return evaluated(ours, inputs, outputs), evaluated(theirs, inputs, outputs)

    @pytest.mark.parametrize("task", TASKS)
    @pytest.mark.parametrize("options", [{}, {"max_dets_per_image": 5}, {"max_dets_per_image": 200}], ids=str)
    def test_gives_what_detectron2s_own_gives(self, draw, register, tmp_path, task, options):
        drawn = draw(7, task)
        if task == "keypoints":
            options = {**options, "kpt_oks_sigmas": SIGMAS}
        name = register(drawn.dataset, **drawn.metadata())
        ours, theirs = self.both(name, *drawn.outputs(), tmp_path, **options)
        assert_same_results(ours, theirs)
        assert {"bbox", task} == set(ours)
        assert any(key.startswith("AP-class ") for key in ours["bbox"])
        assert np.isfinite(ours[task]["AP"])
        ours, theirs = (tmp_path / side / "coco_instances_results.json" for side in ("ours", "theirs"))
        assert ours.read_text() == theirs.read_text()

    def test_without_any_detection(self, draw, register, tmp_path):
        drawn = draw(7)
        name = register(drawn.dataset)
        inputs, outputs = drawn.outputs()
        outputs = [{"instances": output["instances"][:0]} for output in outputs]
        ours, theirs = self.both(name, inputs, outputs, tmp_path)
        assert_same_results(ours, theirs)
        assert np.isnan(ours["bbox"]["AP"])

    def test_proposals(self, draw, register, tmp_path):
        drawn = draw(7)
        inputs, outputs = drawn.outputs()
        for output in outputs:
            instances = output.pop("instances")
            output["proposals"] = Instances(
                instances.image_size,
                proposal_boxes=instances.pred_boxes,
                objectness_logits=instances.scores,
            )
        ours, theirs = self.both(register(drawn.dataset), inputs, outputs, tmp_path)
        assert_same_results(ours, theirs)
        assert ours["box_proposals"]["AR@100"] > 10

    def test_a_test_set_without_annotations(self, draw, register, tmp_path):
        drawn = draw(7)
        inputs, outputs = drawn.outputs()
        name = register({key: drawn.dataset[key] for key in ("images", "categories")})
        ours, theirs = self.both(name, inputs, outputs, tmp_path)
        assert ours == theirs == {}
        assert len(json.loads((tmp_path / "ours" / "coco_instances_results.json").read_text())) > 10

    def test_some_images(self, draw, register, tmp_path):
        drawn = draw(7)
        inputs, outputs = drawn.outputs()
        results = []
        for cls, options in ((COCOEvaluator, {}), (Detectron2COCOEvaluator, {"use_fast_impl": False})):
            evaluator = cls(register(drawn.dataset), **options)
            evaluator.reset()
            evaluator.process(inputs, outputs)
            with contextlib.redirect_stdout(io.StringIO()):
                results.append(evaluator.evaluate(img_ids=[inputs[0]["image_id"], inputs[2]["image_id"]]))
        assert_same_results(*results)

    def test_pycocotools_on_request(self, draw, register, monkeypatch):
        drawn = draw(7)
        evaluator = COCOEvaluator(register(drawn.dataset), use_fast_impl=False)
        monkeypatch.setattr("rt_detectron.evaluation.coco.evaluate_detections", None)
        assert np.isfinite(evaluated(evaluator, *drawn.outputs())["bbox"]["AP"])

    def test_a_class_that_the_dataset_lacks(self, draw, register):
        drawn = draw(7)
        name = register(drawn.dataset, **drawn.metadata())
        inputs, outputs = drawn.outputs()
        outputs[0]["instances"].pred_classes[:] = 80
        with pytest.raises(InputError, match=r"predicts class 80, but the dataset has \d classes"):
            evaluated(COCOEvaluator(name), inputs, outputs)

    def test_annotations_need_no_iscrowd(self, draw, register):
        """Detectron2 trains on such files, and pycocotools stops at them."""
        drawn = draw(7)
        for annotation in drawn.dataset["annotations"]:
            annotation["iscrowd"] = 0
        inputs, outputs = drawn.outputs()
        expected = evaluated(COCOEvaluator(register(drawn.dataset)), inputs, outputs)
        for annotation in drawn.dataset["annotations"]:
            del annotation["iscrowd"]
        assert evaluated(COCOEvaluator(register(drawn.dataset)), inputs, outputs) == expected


class TestBrokenAnnotations:
    @pytest.mark.parametrize(
        ("text", "reason"),
        [
            ("{", r"not usable annotations \(Expecting .*datasets/README.md names the format"),
            ("[]", "not usable annotations"),
            ('{"annotations": []}', "'images' is missing or empty"),
            (
                '{"annotations": [{"id": 1}], "images": [], "categories": []}',
                r"not usable annotations \('image_id'\)",
            ),
        ],
    )
    def test_files(self, register, text, reason):
        with pytest.raises(InputError, match=rf"rt_test_evaluation_0.json: {reason}") as error:
            COCOEvaluator(register(text))
        assert "\n" not in str(error.value)

    def test_a_missing_file(self, register):
        name = register("{}")
        os.remove(MetadataCatalog.get(name).json_file)
        with pytest.raises(InputError, match=r"rt_test_evaluation_0.json: .*No such file"):
            COCOEvaluator(name)

    @pytest.mark.parametrize("field", ["bbox", "area"])
    @pytest.mark.parametrize("value", [None, "12", [1, 2], float("nan")], ids=str)
    def test_annotations_without_a_box_or_an_area(self, draw, register, field, value):
        dataset = draw(7).dataset
        dataset["annotations"][3][field] = value
        number = dataset["annotations"][3]["id"]
        with pytest.raises(InputError, match=rf"annotation {number} needs a 'bbox' .* and an 'area'"):
            COCOEvaluator(register(dataset))


class TestMatches:
    @pytest.mark.parametrize("task", TASKS)
    def test_hold_all_that_precision_is_made_of(self, draw, task, tmp_path):
        for seed in SEEDS[::5]:
            drawn = draw(seed, task)
            evaluation = evaluate_detections(coco_of(drawn.dataset), drawn.results, task, keep_matches=True)
            write_evaluations({task: evaluation}, str(tmp_path / "matches.npz"))
            tasks, common = read_matches(str(tmp_path / "matches.npz"))
            assert common["image_ids"].tolist() == evaluation.params.imgIds
            assert common["category_ids"].tolist() == evaluation.params.catIds
            assert common["iou_thrs"].tolist() == evaluation.params.iouThrs.tolist()
            assert common["area_rng"].tolist() == evaluation.params.areaRng
            matches = tasks[task]
            precision, recall = curves_of(matches, len(evaluation.params.catIds), evaluation.params.recThrs)
            expected = pycocotools_of(drawn.dataset, drawn.results, task).eval
            np.testing.assert_allclose(precision, expected["precision"][..., -1], atol=1e-9)
            np.testing.assert_allclose(recall, expected["recall"][..., -1], atol=1e-9)
            nothing, _ = curves_of(
                matches.without_detections(), precision.shape[2], evaluation.params.recThrs
            )
            assert ((nothing == -1) == (precision == -1)).all()
            assert nothing.max() == 0

    def test_image_by_image(self, draw):
        """Those of a single image are as if it had been evaluated alone."""
        for seed in SEEDS[::5]:
            drawn = draw(seed)
            coco = coco_of(drawn.dataset)
            whole = evaluate_detections(coco, drawn.results, "bbox", keep_matches=True)
            matches, params = whole.eval["matches"], whole.params
            for number, image in enumerate(params.imgIds):
                alone = evaluate_detections(coco, drawn.results, "bbox", img_ids=[image])
                precision, _ = curves_of(matches.of_images([number]), len(params.catIds), params.recThrs)
                np.testing.assert_allclose(precision, alone.eval["precision"][..., -1], atol=1e-9)

    def test_lie_beside_the_predictions_also_where_there_are_none(self, draw, register, tmp_path):
        drawn = draw(7)
        evaluator = COCOEvaluator(register(drawn.dataset, **drawn.metadata()), output_dir=str(tmp_path))
        evaluator.keeps_matches = True
        inputs, outputs = drawn.outputs()
        for found in (outputs, [{"instances": output["instances"][:0]} for output in outputs]):
            evaluated(evaluator, inputs, found)
            tasks, _ = read_matches(str(tmp_path / "matches.npz"))
            assert bool(len(tasks["bbox"].image)) == (found is outputs)
            assert len(tasks["bbox"].object_image) == len(drawn.dataset["annotations"])

    def test_a_damaged_file_is_one_line(self, tmp_path):
        write_matches(str(tmp_path / "matches.npz"), {})
        (tmp_path / "matches.npz").write_bytes((tmp_path / "matches.npz").read_bytes()[:-1])
        with pytest.raises(InputError, match=r"is damaged \(BadZipFile\): delete its folder"):
            read_matches(str(tmp_path / "matches.npz"))
