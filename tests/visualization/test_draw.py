import numpy as np
import pytest
from PIL import Image

from rt_detectron.visualization.colors import PALETTE, color_of, readable_on
from rt_detectron.visualization.draw import Instance, draw_instances, panel

GREY = (128, 128, 128)


def grey(width, height):
    return Image.new("RGB", (width, height), GREY)


def test_box_is_drawn_where_it_is_in_its_category_colour():
    picture = draw_instances(grey(100, 50), [Instance((20, 20, 40, 20), "a", 2)], long_side=200)
    assert picture.size == (200, 100)
    pixels = np.asarray(picture)
    assert tuple(pixels[80, 60]) == color_of(2)  # middle of the bottom edge, y = 2 * (20 + 20)
    assert tuple(pixels[60, 120]) == color_of(2)  # middle of the right edge
    assert tuple(pixels[60, 80]) == GREY  # inside
    assert tuple(pixels[95, 190]) == GREY  # outside


def test_mask_tints_its_pixels_only():
    mask = np.zeros((100, 200), bool)
    mask[40:60, 50:150] = True
    pixels = np.asarray(draw_instances(grey(200, 100), [Instance((1, 1, 2, 2), "", 0, mask)], long_side=200))
    expected = 0.45 * np.array(color_of(0)) + 0.55 * np.array(GREY)
    np.testing.assert_allclose(pixels[50, 100], expected, atol=2)
    assert tuple(pixels[80, 100]) == GREY


def test_source_image_stays_untouched():
    image = grey(50, 50)
    draw_instances(image, [Instance((0, 0, 50, 50), "a", 0)])
    assert image.getcolors() == [(2500, GREY)]


@pytest.mark.parametrize("box", [(-10, -10, 500, 500), (49, 49, 0, 0), (0, 0, 0.2, 0.2), (48, 0, 2, 50)])
def test_boxes_at_and_over_the_edge(box):
    label = "a very long category name that fits no picture at all " * 3
    assert draw_instances(grey(50, 50), [Instance(box, label, 9)], long_side=120).size == (120, 120)


def test_labels_keep_clear_of_each_other():
    same = [Instance((20, 60, 100, 80), "mm", index) for index in range(4)]
    picture = draw_instances(grey(200, 200), same, long_side=200)
    pixels = np.asarray(picture)
    tops = (60 - 22, 60, 140 - 22, 140)  # above the box, inside it at its top and its bottom, below it
    for index, top in enumerate(tops):
        assert tuple(pixels[top + 3, 22]) == color_of(index)


def test_image_of_another_mode_and_extreme_shape():
    assert draw_instances(Image.new("L", (400, 1)), [], long_side=200).size == (200, 1)


def test_panel_puts_pictures_side_by_side_under_captions():
    row = panel(
        [Image.new("RGB", (60, 40), (255, 0, 0)), Image.new("RGB", (80, 30), (0, 0, 255))], ["a", "b" * 50]
    )
    assert row.width == 60 + 6 + 80
    assert row.height > 40
    pixels = np.asarray(row)
    caption = row.height - 40
    assert tuple(pixels[caption, 0]) == (255, 0, 0)
    assert tuple(pixels[caption + 29, row.width - 1]) == (0, 0, 255)
    assert (pixels[:caption, :60] > 200).any()  # something is written


def test_panel_wants_a_caption_for_each_picture():
    with pytest.raises(ValueError, match="zip"):
        panel([grey(9, 9)], [])


def test_colours_repeat_and_text_on_them_has_contrast():
    assert color_of(len(PALETTE)) == PALETTE[0]
    assert len(set(PALETTE)) == len(PALETTE)
    assert readable_on((255, 255, 255)) == (0, 0, 0)
    assert readable_on((0, 0, 0)) == (255, 255, 255)
    assert readable_on((0, 0, 139)) == (255, 255, 255)
