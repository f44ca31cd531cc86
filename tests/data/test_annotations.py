"""Objects that a detector could not be trained on are named before it is tried."""

import numpy as np
import pytest
from pycocotools import mask as rle_masks

from rt_detectron.data.annotations import check_objects, shape_problem
from rt_detectron.utils.errors import InputError

POLYGON = [[1.0, 1.0, 9.0, 1.0, 9.0, 9.0]]
RLE = rle_masks.encode(np.ones((20, 30), np.uint8, order="F"))


def record(**annotation):
    sound = {"bbox": [1, 1, 8, 8], "segmentation": POLYGON, "keypoints": [1, 1, 2] * 3}
    given = {key: value for key, value in {**sound, **annotation}.items() if value is not None}
    return {"file_name": "a/7.jpg", "height": 20, "width": 30, "annotations": [dict(sound), given]}


def message(**annotation) -> str:
    options = {key: annotation.pop(key) for key in ("mask_format", "keypoint_count") if key in annotation}
    with pytest.raises(InputError) as error:
        check_objects([record(**annotation)], options.get("mask_format"), options.get("keypoint_count", 0))
    return str(error.value)


def test_sound_ones_pass():
    check_objects([record()], "polygon", 3)
    check_objects([record(segmentation=RLE)], "bitmask", 3)
    check_objects(
        [{"file_name": "no objects.jpg"}, {"file_name": "none.jpg", "annotations": []}], "polygon", 3
    )
    check_objects([record(segmentation=None, keypoints=None)])  # if they are not needed
    check_objects([record(segmentation=RLE, keypoints=None, iscrowd=1)], "polygon", 3)  # crowds are dropped


@pytest.mark.parametrize("bbox", [None, [1, 2, 3], [1, 2, 3, float("inf")], [1, 2, "x", 4], 7])
def test_boxes(bbox):
    assert message(bbox=bbox).startswith("a/7.jpg: annotation 1 has no box")


@pytest.mark.parametrize(
    "segmentation", [None, [], [[1, 2, 3, 4]], [[1, 2, 3, 4, 5, 6, 7]], "x", [["x"] * 6]]
)
@pytest.mark.parametrize("mask_format", ["polygon", "bitmask"])
def test_masks(segmentation, mask_format):
    text = message(segmentation=segmentation, mask_format=mask_format)
    assert text.startswith("a/7.jpg: annotation 1 has no usable mask (")
    assert text.endswith("set MODEL.MASK_ON False")


def test_rle():
    assert "set INPUT.MASK_FORMAT bitmask" in message(segmentation=RLE, mask_format="polygon")
    turned = rle_masks.encode(np.ones((30, 20), np.uint8, order="F"))
    assert "its RLE is of the size [30, 20], its image [20, 30]" in message(
        segmentation=turned, mask_format="bitmask"
    )
    assert shape_problem({"size": [20, 30]}, 20, 30) is not None
    assert shape_problem({"size": [20, 30], "counts": [600]}, 20, 30) is None


def test_keypoints():
    for keypoints in (None, [], [1, 1, 2] * 2):
        assert "has no 3 keypoints" in message(keypoints=keypoints, keypoint_count=3)
