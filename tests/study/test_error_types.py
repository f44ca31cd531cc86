import contextlib
import io

import numpy as np
import pytest
from pycocotools.coco import COCO

from rt_detectron.study.bootstrap import match, precision_at_recall
from rt_detectron.study.error_types import ERROR_TYPES, error_gains

TASKS = pytest.mark.parametrize("task", ["bbox", "segm"])
CAT, DOG = 1, 2


def polygon(box):
    x, y, width, height = box
    return [x, y, x + width, y, x + width, y + height, x, y + height]


def index(objects, images=(1,)):
    """An index of (image, category, box) or (image, category, box, 1) for a crowd region."""
    coco = COCO()
    coco.dataset = {
        "images": [{"id": image, "width": 200, "height": 100} for image in images],
        "categories": [{"id": number, "name": f"c{number}"} for number in (1, 2, 3)],
        "annotations": [
            {
                "id": number,
                "image_id": image,
                "category_id": category,
                "bbox": box,
                "area": box[2] * box[3],
                "iscrowd": int(any(crowd)),
                "segmentation": [polygon(box)],
            }
            for number, (image, category, box, *crowd) in enumerate(objects, start=1)
        ],
    }
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco


def results(coco, detections, task):
    """The entries of a results file, of (image, category, box, score)."""
    found = [
        {"image_id": image, "category_id": category, "bbox": box, "score": score}
        for image, category, box, score in detections
    ]
    for one in found if task == "segm" else ():
        one["segmentation"] = coco.annToRLE({**one, "segmentation": [polygon(one["bbox"])]})
    return found


LEFT, RIGHT = [0, 0, 40, 40], [100, 0, 40, 40]
NEAR = [120, 0, 40, 40]  # overlaps RIGHT by a third
# Two cats, of which one is found by the surest detection. What else is found -> what mending that gains.
CASES = {
    "nothing": ([], {"missed": 100 - 51 / 1.01}),
    "class": ([(1, DOG, RIGHT, 0.5)], {"class": 100 - 51 / 1.01}),
    "localisation": ([(1, CAT, NEAR, 0.5)], {"localisation": 100 - 51 / 1.01}),
    "of two the surer": (
        [(1, CAT, NEAR, 0.5), (1, DOG, RIGHT, 0.6)],
        {"class": 100 - 51 / 1.01},  # so mending the place only takes a false positive behind all hits away
    ),
    "crowd": ([(1, CAT, [0, 60, 20, 20], 0.99)], {"missed": 100 - 51 / 1.01}),
}


@TASKS
@pytest.mark.parametrize("case", CASES)
def test_what_mending_one_error_gains(case, task):
    more, expected = CASES[case]
    objects = [(1, CAT, LEFT), (1, CAT, RIGHT), (1, CAT, [0, 50, 60, 40], 1)]
    coco = index(objects)
    found = error_gains(coco, results(coco, [(1, CAT, LEFT, 0.9), *more], task), task)
    # Half of the objects: precision 1 up to a recall of 0.5, which are 51 of the 101 points.
    assert found.pop("AP50") == pytest.approx(51 / 1.01)
    assert found == pytest.approx({**dict.fromkeys(ERROR_TYPES, 0.0), **expected})


@TASKS
@pytest.mark.parametrize(
    ("kind", "category", "box"),
    [
        ("duplicate", CAT, [2, 0, 40, 40]),
        ("background", CAT, [60, 60, 20, 20]),
        ("both", DOG, [20, 0, 40, 40]),
    ],
)
def test_what_taking_one_false_positive_away_gains(kind, category, box, task):
    """A false positive between two hits, or the surest of a dog that is found, too."""
    coco = index([(1, CAT, LEFT), (1, CAT, RIGHT), (1, DOG, [0, 50, 40, 40])])
    detections = [
        (1, CAT, LEFT, 0.9),
        (1, category, box, 0.8),
        (1, CAT, RIGHT, 0.7),
        (1, DOG, [0, 50, 40, 40], 0.6),
    ]
    found = error_gains(coco, results(coco, detections, task), task)
    expected = {"duplicate": (100 - (51 + 50 * 2 / 3) / 1.01) / 2, "both": 25.0}
    expected["background"] = expected["duplicate"]
    assert found.pop("AP50") == pytest.approx(100 - expected[kind])
    assert found == pytest.approx({**dict.fromkeys(ERROR_TYPES, 0.0), kind: expected[kind]})


def test_nothing_found_and_nothing_there():
    coco = index([(1, CAT, LEFT)])
    assert error_gains(coco, [], "bbox") == {
        "AP50": 0.0, **dict.fromkeys(ERROR_TYPES, 0.0), "missed": 100.0,
    }  # fmt: skip
    empty = error_gains(index([]), results(coco, [(1, CAT, LEFT, 0.5)], "bbox"), "bbox")
    assert np.isnan(list(empty.values())).all()


def random_set(seed, images=14, crowds=0.0):
    """Objects of three classes, some crowds, and detections of all kinds; no two scores are equal."""
    random = np.random.RandomState(seed)  # its numbers are the same in every version of NumPy
    objects, detections = [], []
    for image in range(1, images + 1):
        for _ in range(random.randint(0, 5)):
            box = [
                random.uniform(0, 150),
                random.uniform(0, 60),
                random.uniform(10, 45),
                random.uniform(10, 35),
            ]
            category, crowd = random.randint(1, 4), random.uniform() < crowds
            objects.append((image, category, box, crowd))
            for _ in range(random.randint(0, 4)):
                near = [max(0.0, value + random.normal(0, 6)) + (k > 1) for k, value in enumerate(box)]
                other = random.randint(1, 4) if random.uniform() < 0.4 else category
                detections.append((image, other, near, random.uniform(0.05, 1)))
        for _ in range(random.randint(0, 3)):
            box = [
                random.uniform(0, 150),
                random.uniform(0, 60),
                random.uniform(10, 45),
                random.uniform(10, 35),
            ]
            detections.append((image, random.randint(1, 4), box, random.uniform(0.05, 1)))
    return objects, detections


# By tidecv 1.0.1 (TIDE().evaluate(..., mode=TIDE.BOX)): AP50, then the gains in the order of ERROR_TYPES.
BY_TIDECV = {
    0: (21.446365, 6.475760, 14.065449, 3.798725, 0.000000, 1.528738, 8.071700),
    7: (17.242915, 8.978993, 28.437767, 3.898661, 0.160433, 1.653832, 3.630363),
    11: (20.969526, 2.538111, 21.490721, 3.363336, 0.459046, 4.032832, 1.701599),
}


@pytest.mark.parametrize("seed", BY_TIDECV)
def test_gains_are_those_of_tidecv(seed):
    objects, detections = random_set(seed)
    coco = index(objects, range(1, 15))
    found = error_gains(coco, results(coco, detections, "bbox"), "bbox")
    assert list(found.values()) == pytest.approx(BY_TIDECV[seed], abs=1e-5)


@TASKS
def test_ap50_is_that_of_the_report(task):
    objects, detections = random_set(3, images=30, crowds=0.3)
    coco = index(objects, range(1, 31))
    detections = results(coco, detections, task)
    expected = 100 * precision_at_recall(match(coco, detections, task)).mean()
    assert expected > 5
    assert error_gains(coco, detections, task)["AP50"] == pytest.approx(expected)
