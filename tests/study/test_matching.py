import contextlib
import io

import numpy as np
from pycocotools.coco import COCO

from rt_detectron.study.matching import f1_per_image, match


def test_f1_per_image_by_hand():
    coco = COCO()
    coco.dataset = {
        "images": [{"id": i, "width": 100, "height": 100} for i in (3, 5, 8, 9)],
        "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
        "annotations": [
            annotation(1, 3, 1, 0),
            annotation(2, 3, 2, 40),
            annotation(3, 5, 1, 0),
            annotation(4, 9, 1, 0, crowd=1),
        ],
    }
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    detections = [
        detection(3, 1, 0, 0.9),  # hit
        detection(3, 1, 40, 0.8),  # a dog called cat
        detection(3, 2, 40, 0.2),  # hit, but below the threshold
        detection(9, 1, 0, 0.9),  # on a crowd: neither hit nor false alarm
    ]
    f1 = f1_per_image(match(coco, detections, "bbox"), 0.3)
    # image 3: one hit of two shown and two objects; image 5: one object missed; image 8: nothing at all
    np.testing.assert_allclose(f1, [2 * 1 / (2 + 2), 0, np.nan, np.nan])
    assert f1_per_image(match(coco, detections, "bbox"), 0.1)[0] == 2 * 2 / (3 + 2)


def annotation(number, image, category, x, crowd=0):
    box = {"bbox": [x, 0, 20, 20], "area": 400, "iscrowd": crowd}
    return {"id": number, "image_id": image, "category_id": category, **box}


def detection(image, category, x, score):
    return {"image_id": image, "category_id": category, "bbox": [x, 0, 20, 20], "score": score}
