import numpy as np
from PIL import Image

from rt_detectron.visualization.draw import Instance
from rt_detectron.visualization.explanations import Explanation, explained, gradient_picture


def test_gradients_are_grey_where_they_are_zero_and_clipped_at_three_deviations():
    gradient = np.zeros((10, 10, 3), np.float32)
    gradient[0, 0] = (1, -1, 0)
    spread = gradient.std()
    gradient[5, 5, 2] = spread  # changes the deviation by less than a grey level
    pixels = np.asarray(gradient_picture(gradient))
    assert tuple(pixels[9, 9]) == (128, 128, 128)
    assert tuple(pixels[0, 0]) == (255, 0, 128)
    assert abs(int(pixels[5, 5, 2]) - (128 + 128 / 3)) < 3
    np.testing.assert_array_equal(np.asarray(gradient_picture(1e-9 * gradient)), pixels)  # scale has no say
    assert gradient_picture(np.zeros((4, 6, 3))).getcolors() == [(24, (128, 128, 128))]


def test_a_row_for_each_detector():
    image = Image.new("RGB", (100, 50), (10, 20, 30))
    inverted = np.full((32, 64, 3), 1.5)  # beyond white
    rows = {
        name: Explanation([Instance((10, 10, 20, 20), "a", 0)], gradient, inverted, "res5", 0.25)
        for name, gradient in (("standard", np.ones((32, 64, 3))), ("robust", np.zeros((32, 64, 3))))
    }
    picture = explained(image, rows)
    width, height = 480, 240
    captions = (picture.height - 2 * height - 6) // 2
    assert picture.width == 3 * width + 2 * 6
    pixels = np.asarray(picture)
    for top in (captions, picture.height - height):
        assert tuple(pixels[top + 200, 400]) == (10, 20, 30)  # the image, without a gradient and white
        assert tuple(pixels[top + 5, -5]) == (255, 255, 255)
    assert tuple(pixels[-5, width + 20]) == (128, 128, 128)
    assert (pixels[: captions - 1, :480] > 200).any()  # something is written
