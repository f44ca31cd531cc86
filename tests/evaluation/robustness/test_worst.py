"""The worst case, against COCO's evaluation of the predictions chosen by hand."""

import contextlib
import copy
import io

import numpy as np
import pytest
from pycocotools.coco import COCO

from rt_detectron.evaluation import evaluate_detections
from rt_detectron.evaluation.coco import metrics_of
from rt_detectron.evaluation.matching import chosen_matches
from rt_detectron.evaluation.robustness.worst import worst_case

SEEDS = (1, 2, 3, 4)


def coco_of(dataset):
    coco = COCO()
    coco.dataset = copy.deepcopy(dataset)
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco


@pytest.fixture(params=SEEDS)
def attacked(draw, request):
    """A set and what two attacks left of its detections: each spares other images."""
    drawn = draw(request.param)
    coco = coco_of(drawn.dataset)
    ids = sorted(coco.imgs)
    rng = np.random.default_rng(0)
    left = [
        [result for result in drawn.results if (ids.index(result["image_id"]) + i) % 2 or rng.random() < 0.2]
        for i in (0, 1)
    ]
    return coco, ids, left


def matched(coco, results):
    return evaluate_detections(coco, results, "bbox", keep_matches=True).eval["matches"]


def test_it_is_as_if_the_chosen_predictions_were_evaluated(attacked):
    coco, ids, left = attacked
    parts = [matched(coco, results) for results in left]
    choice = np.arange(len(ids)) % 2
    by_hand = [
        result
        for i, results in enumerate(left)
        for result in results
        if choice[ids.index(result["image_id"])] == i
    ]
    evaluation = evaluate_detections(coco, by_hand, "bbox")
    names = [category["name"] for category in coco.dataset["categories"]]
    metrics = metrics_of(chosen_matches(parts, choice), evaluation.params.iouThrs, "bbox", names)
    expected = [100 * value if value >= 0 else np.nan for value in evaluation.stats[:6]]
    np.testing.assert_allclose([metrics[k] for k in ("AP", "AP50", "AP75", "APs", "APm", "APl")], expected)
    for k, name in enumerate(names):
        precision = evaluation.eval["precision"][:, :, k, 0, -1]
        of_class = 100 * precision[precision > -1].mean() if (precision > -1).any() else np.nan
        assert metrics.get(f"AP-{name}", of_class) == pytest.approx(of_class, nan_ok=True)


def test_no_attack_alone_leaves_less(attacked):
    coco, ids, left = attacked
    parts = [{"bbox": matched(coco, results)} for results in left]
    params = evaluate_detections(coco, left[0], "bbox").params
    names = [str(number) for number in params.catIds]

    def ap(part):
        return metrics_of(part["bbox"], params.iouThrs, "bbox", names)["AP"]

    worst = worst_case(parts, len(ids), len(names))
    assert ap(worst) <= min(map(ap, parts))
    same = worst_case([parts[0], parts[0]], len(ids), len(names))
    assert ap(same) == ap(parts[0])


def test_each_image_has_the_attack_that_does_most_harm(draw):
    """Two attacks that each spare half of the images leave nothing together."""
    drawn = draw(3)
    for annotation in drawn.dataset["annotations"]:
        annotation["iscrowd"] = 0
    coco = coco_of(drawn.dataset)
    ids = sorted(coco.imgs)
    perfect = [
        {key: a[key] for key in ("image_id", "category_id", "bbox")} | {"score": 1.0}
        for a in drawn.dataset["annotations"]
    ]
    halves = [[r for r in perfect if ids.index(r["image_id"]) % 2 == i] for i in (0, 1)]
    parts = [{"bbox": matched(coco, half)} for half in halves]
    worst = worst_case(parts, len(ids), len(coco.cats))
    assert not worst["bbox"].hit.any()  # but for boxes of no size, which match nothing
    assert len(worst["bbox"].object_image) == len(perfect)
