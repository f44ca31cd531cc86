"""Objects that a detector could not be trained on are named before it is tried."""

import numpy as np
import pytest
from detectron2.structures import BoxMode
from pycocotools import mask as rle_masks

from rt_detectron.data.annotations import check_objects, shape_problem, warn_of_boxes_outside
from rt_detectron.utils.errors import InputError

POLYGON = [[1.0, 1.0, 9.0, 1.0, 9.0, 9.0]]
RLE = rle_masks.encode(np.ones((20, 30), np.uint8, order="F"))


def record(**annotation):
    sound = {
        "bbox": [1, 1, 8, 8],
        "bbox_mode": BoxMode.XYWH_ABS,
        "segmentation": POLYGON,
        "keypoints": [1, 1, 2] * 3,
    }
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


def test_boxes_inside_out():
    assert "has a box of negative width or height" in message(bbox=[5, 5, -3, 3])
    assert "has a box of negative width or height" in message(bbox=[5, 5, 3, 9], bbox_mode=BoxMode.XYXY_ABS)


@pytest.mark.parametrize("iscrowd", ["text", 2, float("nan"), [], None])
def test_what_is_neither_a_crowd_nor_not(iscrowd):
    """Detectron2's mapper would take it for a crowd, its evaluator not."""
    annotated = record()
    annotated["annotations"][1]["iscrowd"] = iscrowd
    with pytest.raises(InputError, match="annotation 1 has 'iscrowd'"):
        check_objects([annotated])


@pytest.mark.parametrize(
    ("bbox", "is_odd"),
    [
        *(([1, 1, 8, 8], False), ([-0.5, 0, 31, 20.5], False)),
        *(([20, 10, 28, 15], True), ([-5, 0, 9, 9], True), ([1, 1, 0, 5], True)),
    ],
)
def test_boxes_outside_of_the_image_are_counted(bbox, is_odd, caplog):
    warn_of_boxes_outside([record(bbox=bbox)], "mine")
    assert ("mine: 1 of 2 boxes have no area or reach out" in caplog.text) == is_odd
