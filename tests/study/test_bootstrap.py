import contextlib
import copy
import io

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from sklearn.metrics import accuracy_score, balanced_accuracy_score

from rt_detectron.evaluation.coco import evaluate_detections, write_evaluations
from rt_detectron.study import bootstrap
from rt_detectron.study.bootstrap import (
    average_precision,
    exact_precision,
    f1_per_image,
    first_order_precision,
    image_counts,
    match,
    precision_at_recall,
    read_matches,
    resampled_accuracy,
    resampled_precision,
)

IMAGES, SIDE = 8, 100


def random_set(seed, images=IMAGES, categories=3):
    """Ground truth with crowds and an empty image; detections near objects and elsewhere, no score twice."""
    generator = np.random.default_rng(seed)
    truth = {
        "images": [{"id": 10 * i, "width": SIDE, "height": SIDE} for i in range(images)],
        "categories": [{"id": 5 * c + 1, "name": f"c{c}"} for c in range(categories)],
        "annotations": [],
    }
    detections = []
    for image in range(images - 1):
        for _ in range(generator.integers(1, 6)):
            box = [*generator.uniform(0, 60, 2), *generator.uniform(5, 40, 2)]
            category = int(5 * generator.integers(categories) + 1)
            truth["annotations"].append(
                {
                    "id": len(truth["annotations"]) + 1,
                    "image_id": 10 * image,
                    "category_id": category,
                    "bbox": box,
                    "area": box[2] * box[3],
                    "iscrowd": int(generator.random() < 0.15),
                    "segmentation": [polygon(box)],
                }
            )
            for _ in range(generator.integers(0, 3)):
                near = (np.asarray(box) + generator.normal(0, 2, 4)).clip(1).tolist()
                detections.append(detection(10 * image, category, near, generator))
        for _ in range(generator.integers(0, 3)):
            box = [*generator.uniform(0, 60, 2), *generator.uniform(5, 40, 2)]
            detections.append(
                detection(10 * image, int(5 * generator.integers(categories) + 1), box, generator)
            )
    return truth, detections


def polygon(box):
    x, y, width, height = box
    return [x, y, x + width, y, x + width, y + height, x, y + height]


def detection(image, category, box, generator):
    score = float(generator.uniform(0.05, 1))
    return {
        "image_id": image,
        "category_id": category,
        "bbox": list(map(float, box)),
        "score": score,
        "segmentation": [polygon(box)],
    }


def index(truth):
    coco = COCO()
    coco.dataset = copy.deepcopy(truth)
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco


def pycocotools_ap(truth, detections, task="bbox"):
    coco = index(truth)
    with contextlib.redirect_stdout(io.StringIO()):
        evaluator = COCOeval(coco, coco.loadRes(copy.deepcopy(detections)), task)
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
    return 100 * evaluator.stats[:3]


def duplicated(truth, detections, counts):
    """The data set in which the image at each position really is there ``counts`` times."""
    copies = {"images": [], "annotations": [], "categories": truth["categories"]}
    found = []
    for image, count in zip(truth["images"], counts, strict=True):
        for _ in range(count):
            new = len(copies["images"]) + 1
            copies["images"].append({**image, "id": new})
            for annotation in truth["annotations"]:
                if annotation["image_id"] == image["id"]:
                    number = len(copies["annotations"]) + 1
                    copies["annotations"].append({**annotation, "id": number, "image_id": new})
            found += [{**d, "image_id": new} for d in detections if d["image_id"] == image["id"]]
    return copies, found


@pytest.mark.parametrize("task", ["bbox", "segm"])
@pytest.mark.parametrize("seed", [1, 2])
def test_each_image_once_is_pycocotools_ap(task, seed):
    truth, detections = random_set(seed)
    found = average_precision(match(index(truth), detections, task), np.ones((IMAGES, 1), int))
    ap, ap50, ap75 = pycocotools_ap(truth, detections, task)
    assert 5 < ap < 95
    assert [found[metric][0] for metric in ("AP", "AP50", "AP75")] == pytest.approx(
        [ap, ap50, ap75], abs=1e-9
    )
    categories = [found[f"AP-c{number}"][0] for number in range(3)]
    assert np.mean(categories) == pytest.approx(ap)


def test_a_resample_is_the_data_set_with_its_images_repeated():
    truth, detections = random_set(3)
    counts = np.random.default_rng(0).multinomial(IMAGES, np.full(IMAGES, 1 / IMAGES), size=6).T
    expected = [pycocotools_ap(*duplicated(truth, detections, column))[0] for column in counts.T]
    assert np.ptp(expected) > 5
    found = average_precision(match(index(truth), detections, "bbox"), counts)["AP"]
    assert found == pytest.approx(expected, abs=1e-9)


def test_precision_at_recall_is_pycocotools():
    truth, detections = random_set(2, images=30)
    coco = index(truth)
    with contextlib.redirect_stdout(io.StringIO()):
        evaluator = COCOeval(coco, coco.loadRes(copy.deepcopy(detections)), "bbox")
        evaluator.evaluate()
        evaluator.accumulate()
    expected = evaluator.eval["precision"][0, :, :, 0, -1].mean(axis=1)  # (T, R, K, A, M): IoU 0.5, all areas
    assert np.ptp(expected) > 0.3
    np.testing.assert_allclose(precision_at_recall(match(coco, detections, "bbox")), expected)


def test_many_objects_of_one_category():
    """More than 100 hits: every recall threshold falls between two of them somewhere."""
    truth, detections = random_set(4, images=90, categories=1)
    ap = average_precision(match(index(truth), detections, "bbox"), np.ones((90, 1), int))["AP"]
    assert ap == pytest.approx([pycocotools_ap(truth, detections)[0]], abs=1e-9)


def test_a_resample_without_objects_has_no_ap():
    truth, detections = random_set(1)
    counts = np.zeros((IMAGES, 2), int)
    counts[-1] = IMAGES  # the empty image only
    counts[0, 1] = 1
    ap = average_precision(match(index(truth), detections, "bbox"), counts)["AP"]
    assert np.isnan(ap).tolist() == [True, False]


def test_nothing_detected_is_an_ap_of_zero():
    truth, _ = random_set(1)
    assert average_precision(match(index(truth), [], "bbox"), np.ones((IMAGES, 1), int))["AP"] == [0.0]


def test_an_image_counts_the_same_in_every_test_set():
    whole, part = image_counts([1, 2, 3, "x"], 300), image_counts(["x", 2], 300)
    assert np.array_equal(part, whole[[3, 1]])
    assert whole.mean() == pytest.approx(1, abs=0.1)
    assert whole.var() == pytest.approx(1, abs=0.2)
    assert abs(np.corrcoef(whole)[0, 1:]).max() < 0.2


def test_batches_change_nothing(monkeypatch):
    truth, detections = random_set(6)
    matches = match(index(truth), detections, "bbox")
    whole = exact_precision(matches, 30)
    assert whole["AP"].std() > 0
    expected = average_precision(matches, image_counts(matches.image_ids, 30))
    monkeypatch.setattr("rt_detectron.study.bootstrap._BATCH_CELLS", 1)
    for metric, values in exact_precision(matches, 30).items():
        np.testing.assert_allclose(values, whole[metric], rtol=1e-12)
        np.testing.assert_allclose(values, expected[metric], rtol=1e-12)


def area_under_precision(category, times):
    """(T,) area under the interpolated precision when images are drawn ``times`` (I,), which may be real."""
    areas = []
    for hit, ignored in zip(category.hit, category.ignored, strict=True):
        weight = times[category.image]
        precision = np.cumsum(weight * hit) / np.cumsum(weight * ~ignored)
        largest = [precision[rank:].max() for rank in range(len(hit))]
        areas.append(np.sum(weight * hit * largest) / (times @ category.objects))
    return np.array(areas)


def test_slopes_are_those_of_the_area_under_precision():
    truth, detections = random_set(7, images=25)
    category = next(c for c in match(index(truth), detections, "bbox").categories if c.ignored.any())
    category.ignored[:, 0] = False  # else precision there is 0 / 0
    slopes, once, equal = bootstrap._slopes(category), np.ones(25), 0
    area = area_under_precision(category, once)
    for image in range(25):
        # To both sides, since of two equal precisions another one may be the largest then.
        ends = [
            (area_under_precision(category, once + step * (np.arange(25) == image)) - area) / step
            for step in (-1e-6, 1e-6)
        ]
        assert (slopes[:, image] > np.minimum(*ends) - 2e-5).all()
        assert (slopes[:, image] < np.maximum(*ends) + 2e-5).all()
        equal += np.isclose(*ends, atol=2e-5).sum()
    assert equal > 0.9 * slopes.size
    assert np.abs(slopes).max() > 0.01


def test_first_order_resamples_have_the_spread_of_exact_ones():
    truth, detections = random_set(8, images=300)
    matches = match(index(truth), detections, "bbox")
    exact, fast = exact_precision(matches), first_order_precision(matches)
    assert exact.keys() == fast.keys()
    for metric in exact:
        assert fast[metric].std() == pytest.approx(exact[metric].std(), rel=0.06), metric
        assert np.corrcoef(fast[metric], exact[metric])[0, 1] > 0.97, metric
    assert fast["AP"].mean() == pytest.approx(exact["AP"].mean(), abs=0.5)
    # What intervals are made of: the spread of a difference between two models on the same images.
    others = match(index(truth), [d for d in detections if hash(d["score"]) % 3], "bbox")
    change = exact["AP"] - exact_precision(others)["AP"]
    assert (fast["AP"] - first_order_precision(others)["AP"]).std() == pytest.approx(change.std(), rel=0.1)


def test_many_detections_are_resampled_to_first_order(monkeypatch):
    truth, detections = random_set(8)
    matches = match(index(truth), detections, "bbox")
    assert np.array_equal(resampled_precision(matches)["AP"], exact_precision(matches)["AP"], equal_nan=True)
    monkeypatch.setattr(bootstrap, "EXACT_DETECTIONS", len(detections) - 1)
    found, fast = resampled_precision(matches), first_order_precision(matches)
    assert np.array_equal(found["AP"], fast["AP"])
    assert found["AP"].std() > 1


@pytest.mark.parametrize(
    ("metric", "reference"), [("top1", accuracy_score), ("mean_per_class", balanced_accuracy_score)]
)
@pytest.mark.filterwarnings("ignore:y_pred contains classes not in y_true")
def test_resampled_accuracy_is_that_of_the_drawn_images(metric, reference):
    generator = np.random.default_rng(5)
    labels = generator.integers(0, 4, 30) * 2  # indices need not be without gaps
    predicted = np.where(generator.random(30) < 0.7, labels, (labels + 2) % 8)
    found = resampled_accuracy(predicted == labels, labels, range(30), resamples=20)[metric]
    for value, counts in zip(found, image_counts(range(30), 20).T, strict=True):
        drawn = np.repeat(np.arange(30), counts)
        assert value == pytest.approx(100 * reference(labels[drawn], predicted[drawn]))


def test_f1_per_image_by_hand():
    coco = COCO()
    coco.dataset = {
        "images": [{"id": i, "width": 100, "height": 100} for i in (3, 5, 8, 9)],
        "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
        "annotations": [
            box_annotation(1, 3, 1, 0),
            box_annotation(2, 3, 2, 40),
            box_annotation(3, 5, 1, 0),
            box_annotation(4, 9, 1, 0, crowd=1),
        ],
    }
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    detections = [
        box_detection(3, 1, 0, 0.9),  # hit
        box_detection(3, 1, 40, 0.8),  # a dog called cat
        box_detection(3, 2, 40, 0.2),  # hit, but below the threshold
        box_detection(9, 1, 0, 0.9),  # on a crowd: neither hit nor false alarm
    ]
    f1 = f1_per_image(match(coco, detections, "bbox"), 0.3)
    # image 3: one hit of two shown and two objects; image 5: one object missed; image 8: nothing at all
    np.testing.assert_allclose(f1, [2 * 1 / (2 + 2), 0, np.nan, np.nan])
    assert f1_per_image(match(coco, detections, "bbox"), 0.1)[0] == 2 * 2 / (3 + 2)


def box_annotation(number, image, category, x, crowd=0):
    box = {"bbox": [x, 0, 20, 20], "area": 400, "iscrowd": crowd}
    return {"id": number, "image_id": image, "category_id": category, **box}


def box_detection(image, category, x, score):
    return {"image_id": image, "category_id": category, "bbox": [x, 0, 20, 20], "score": score}


def test_kept_matches_are_those_made_anew(tmp_path):
    """From the file of :mod:`rt_detectron.evaluation.matching`, which another program writes and reads."""
    truth, detections = random_set(2, images=30)
    coco = index(truth)
    evaluated = {"bbox": evaluate_detections(copy.deepcopy(coco), detections, "bbox", keep_matches=True)}
    write_evaluations(evaluated, tmp_path / "matches.npz")
    kept = read_matches(tmp_path / "matches.npz", {1: "c0", 6: "c1", 11: "c2"})["bbox"]
    anew = match(coco, detections, "bbox")
    assert kept.image_ids.tolist() == anew.image_ids.tolist()
    for ours, theirs in zip(kept.categories, anew.categories, strict=True):
        assert ours.name == theirs.name
        for field in ("image", "score", "hit", "ignored", "objects"):
            np.testing.assert_array_equal(getattr(ours, field), getattr(theirs, field))
