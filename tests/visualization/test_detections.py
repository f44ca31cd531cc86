import numpy as np
import pytest
import torch
from detectron2.structures import Boxes, Instances
from PIL import Image

from rt_detectron.visualization.colors import color_of
from rt_detectron.visualization.detections import detected_instances, side_by_side
from rt_detectron.visualization.draw import Instance


@pytest.fixture
def instances():
    found = Instances((40, 50))
    found.pred_boxes = Boxes([[1, 2, 11, 22], [5.5, 6, 7, 8], [0, 0, 50, 40]])
    found.scores = torch.tensor([0.9, 0.5, 0.49])
    found.pred_classes = torch.tensor([1, 7, 0])
    return found


def test_boxes_names_and_scores(instances):
    first, second = detected_instances(instances, ["cat", "dog"], threshold=0.5)
    assert (first.box, first.label, first.color_index, first.mask) == ((1, 2, 10, 20), "dog 90%", 1, None)
    assert (second.box, second.label) == ((5.5, 6, 1.5, 2), "class 7 50%")  # a class without a name
    assert detected_instances(instances, [], threshold=0.95) == []


def test_masks(instances):
    instances.pred_masks = torch.rand(3, 40, 50) > 0.5
    found = detected_instances(instances, [], threshold=0)
    for instance, mask in zip(found, instances.pred_masks, strict=True):
        np.testing.assert_array_equal(instance.mask, mask.numpy())


def test_one_detector_gives_the_picture_two_a_row_with_captions():
    image = Image.new("RGB", (1000, 500), (128, 128, 128))
    found = [Instance((100, 100, 200, 100), "a", 0)]
    alone = side_by_side(image, [found], ["standard"])
    assert alone.size == (1000, 500)
    both = side_by_side(image, [found, []], ["standard", "robust"])
    assert both.width > 2 * 1000
    caption = both.height - 500
    assert caption > 0
    pixels = np.asarray(both)
    assert tuple(pixels[caption + 200, 200]) == color_of(0)
    assert tuple(pixels[caption + 200, both.width - 1000 + 200]) == (128, 128, 128)


@pytest.mark.parametrize(("size", "drawn"), [((32, 16), (960, 480)), ((4000, 3000), (1280, 960))])
def test_small_pictures_grow_and_large_ones_shrink(size, drawn):
    assert side_by_side(Image.new("RGB", size), [[]], [""]).size == drawn
