import json

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as rle_masks

from rt_detectron.visualization.coco import (
    ground_truth_instances,
    load_coco,
    load_image,
    load_predictions,
    predicted_instances,
)


@pytest.fixture
def val_json(tmp_path):
    square = [[2, 2, 6, 2, 6, 6, 2, 6]]
    content = {
        "images": [{"id": i, "file_name": f"{i}.jpg", "width": 10, "height": 8} for i in range(1, 12)],
        "annotations": [
            {
                "id": i,
                "image_id": i,
                "category_id": 40,
                "bbox": [2, 2, 4, 4],
                "segmentation": square,
                "iscrowd": 0,
            }
            for i in (1, 2, 3, 5, 8, 9, 11)
        ]
        + [{"id": 90, "image_id": 1, "category_id": 3, "bbox": [0, 0, 1, 1], "iscrowd": 0}]
        + [{"id": 91, "image_id": 10, "category_id": 3, "bbox": [0, 0, 1, 1], "iscrowd": 1}],
        "categories": [{"id": 40, "name": "square"}, {"id": 3, "name": "dot"}],
    }
    file = tmp_path / "val.json"
    file.write_text(json.dumps(content))
    return file


def test_loading_is_silent(val_json, capsys):
    load_coco(val_json)
    assert capsys.readouterr().out == ""


def test_ground_truth(val_json):
    square, dot = ground_truth_instances(load_coco(val_json), 1)
    assert (square.label, square.color_index, square.box) == ("square", 1, (2, 2, 4, 4))
    expected = np.zeros((8, 10), bool)
    expected[2:6, 2:6] = True
    np.testing.assert_array_equal(square.mask, expected)
    assert (dot.label, dot.color_index, dot.mask) == ("dot", 0, None)
    assert ground_truth_instances(load_coco(val_json), 10) == []
    assert ground_truth_instances(load_coco(val_json), 4) == []


def test_predictions_of_the_images_above_the_threshold(val_json, tmp_path):
    mask = np.zeros((8, 10), np.uint8)
    mask[1, 3:7] = 1
    rle = rle_masks.encode(np.asfortranarray(mask))
    rle["counts"] = rle["counts"].decode()
    detection = {"image_id": 1, "category_id": 40, "bbox": [3, 1, 4, 1]}
    file = tmp_path / "predictions.json"
    file.write_text(
        json.dumps(
            [
                {**detection, "score": 0.5, "segmentation": rle},
                {**detection, "score": 0.499},
                {**detection, "score": 0.876, "category_id": 3},
                {**detection, "score": 0.9, "image_id": 2},
            ]
        )
    )
    detections = load_predictions(file, [1, 3])
    assert {image_id: len(found) for image_id, found in detections.items()} == {1: 3, 3: 0}
    square, dot = predicted_instances(load_coco(val_json), detections[1], threshold=0.5)
    assert (square.label, square.color_index) == ("square 50%", 1)
    np.testing.assert_array_equal(square.mask, mask.astype(bool))
    assert (dot.label, dot.mask) == ("dot 88%", None)


def test_image_is_turned_upright(val_json, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees to see it upright
    Image.new("RGB", (8, 10)).save(tmp_path / "1.jpg", exif=exif)
    assert load_image(load_coco(val_json), tmp_path, 1).size == (10, 8)
