import itertools

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import ks_2samp
from small_images import encoded
from torchvision.transforms import v2 as T
from torchvision.transforms.v2 import functional as F

from rt_detectron.data.augmentation import (
    ColorNoise,
    Lighting,
    RandomResizedCrop,
    UnfinishedImages,
    scaled_box,
)
from rt_detectron.data.images import decode, load
from rt_detectron.utils.errors import InputError
from rt_detectron.utils.pictures import DepthError


def picture(width, height):
    """Smooth shapes with edges, so that a picture of half the size shows the same."""
    y, x = np.mgrid[:height, :width] / 60
    waves = [np.sin(x + y), np.cos(x * 2 - y), np.sin(3 * x) * np.cos(2 * y) + (x % 2 > 1)]
    return Image.fromarray((np.stack(waves, -1) * 60 + 120).clip(0, 255).astype(np.uint8))


@pytest.fixture(scope="module")
def photo():
    return encoded(picture(417, 333), "JPEG", quality=95)


class Box(RandomResizedCrop):
    """One that takes always the same crop: top, left, height, width."""

    def __init__(self, box, size, **kwargs):
        super().__init__(size, **kwargs)
        self.box = box

    def _box(self, width, height):
        return self.box


class TestRandomResizedCrop:
    @pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
    def test_equals_torchvision_where_all_is_decoded(self, format):
        crop, reference = RandomResizedCrop(200), T.RandomResizedCrop(200, antialias=True)
        content = encoded(picture(311, 233), format)
        for seed in range(5):
            found = []
            for make in (
                lambda: crop.from_encoded(content),
                lambda: crop(decode(content)),
                lambda: reference(decode(content)),
            ):
                torch.manual_seed(seed)
                found.append(make())
            assert torch.equal(found[0], found[2])
            assert torch.equal(found[1], found[2])
            assert found[0].dtype == torch.uint8

    @pytest.mark.parametrize(
        ("height", "width", "factor"),
        [
            *((39, 80, 1), (40, 39, 1), (40, 40, 2), (79, 500, 2), (80, 80, 4), (159, 160, 4)),
            *((160, 160, 8), (9999, 9999, 8), (3, 3, 1)),
        ],
    )
    def test_never_decodes_fewer_pixels_than_the_output_has(self, height, width, factor):
        assert RandomResizedCrop(20).factor(height, width) == factor

    @pytest.mark.parametrize("size", [(150, 120), (60, 75), (31, 40), (100, 30)])
    @pytest.mark.parametrize("box", [(0, 0, 333, 417), (13, 57, 320, 360), (33, 17, 300, 400)])
    def test_a_scaled_picture_gives_nearly_the_same_pixels_of_the_same_place(self, photo, box, size):
        crop = Box(box, size)
        assert crop.factor(*box[2:]) > 1
        found = crop.from_encoded(photo).int()
        expected = F.resized_crop(decode(photo), *box, list(size), antialias=True).int()
        assert found.shape == expected.shape == (3, *size)
        assert (found - expected).abs().float().mean() < 3  # half a pixel away, at most
        # A crop that lies a few pixels away is farther off by far.
        elsewhere = F.resized_crop(decode(photo), *_moved(box), list(size), antialias=True).int()
        assert (found - elsewhere).abs().float().mean() > 20

    def test_scaled_decoding_can_be_left_out(self, photo):
        found = []
        for transform in (
            RandomResizedCrop(20, scaled_decoding=False),
            T.RandomResizedCrop(20, antialias=True),
        ):
            torch.manual_seed(0)
            found.append(load(photo, transform))
        assert torch.equal(*found)
        torch.manual_seed(0)
        assert not torch.equal(load(photo, RandomResizedCrop(20)), found[0])

    def test_boxes_in_smaller_pictures(self):
        assert scaled_box((10, 20, 100, 50), 2, (200, 100)) == (5, 10, 55, 35)
        assert scaled_box((0, 0, 417, 333), 2, (209, 167)) == (0, 0, 208, 166)
        for factor in (2, 4, 8):
            for width, start in itertools.product((97, 98, 101), (0, 1, 5)):
                smaller = -(-width // factor)
                left, _, right, _ = scaled_box((start, 0, width - start, 8), factor, (smaller, 9))
                assert 0 <= left < right <= smaller
                assert abs(left * factor - start) <= factor
                assert abs(right * factor - width) <= factor

    def test_a_box_at_the_edge_is_inside(self, photo):
        for left, top in itertools.product(range(4), range(4)):
            box = (333 - 161 - top, 417 - 161 - left, 161, 161)
            assert Box(box, 20).from_encoded(photo).shape == (3, 20, 20)

    @pytest.mark.parametrize("mode", ["L", "CMYK"])
    def test_other_colours(self, mode):
        image = picture(160, 160).convert(mode)
        content = encoded(image, "JPEG", quality=95)
        found = Box((0, 0, 160, 160), 40).from_encoded(content).int()
        expected = F.resize(decode(content), [40, 40], antialias=True).int()
        assert (found - expected).abs().float().mean() < 2

    def test_truncated_damaged_and_deep_files(self, photo):
        crop = RandomResizedCrop(20)
        for content in (photo[: len(photo) // 2], photo[:30], b"\xff\xd8\xff no image", b""):
            with pytest.raises(OSError, match=r"(?i)image|PNG|truncated"):
                crop.from_encoded(content)
        with pytest.raises(DepthError):
            crop.from_encoded(encoded(Image.fromarray(np.zeros((9, 9), np.uint16)), "PNG"))

    def test_it_is_found_at_the_head_of_a_transform(self, photo, monkeypatch):
        crop, flip = Box((0, 0, 320, 400), 80), T.RandomHorizontalFlip(1.0)
        expected = crop.from_encoded(photo)
        assert torch.equal(load(photo, T.Identity()), decode(photo))
        monkeypatch.setattr("rt_detectron.data.images.decode", None)
        assert torch.equal(load(photo, crop), expected)
        assert torch.equal(load(photo, T.Compose([crop, flip])), expected.flip(2))


def _moved(box):
    """The same crop, a fifth of its size smaller and away."""
    top, left, height, width = box
    return top + height // 5, left + width // 5, height * 4 // 5, width * 4 // 5


def one_by_one(images, factors):
    """torchvision's functions, image by image, with the same factors."""
    adjust = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation)
    finished = []
    for image, its in zip(images.float() / 255, factors.tolist(), strict=True):
        for kind, factor in zip(its[:3], its[3:6], strict=True):
            image = adjust[int(kind)](image, factor)
        finished.append((image + torch.tensor(its[6:]).view(3, 1, 1)).clamp(0, 1))
    return torch.stack(finished)


class TestLighting:
    def test_shifts_the_whole_image_by_one_colour(self):
        torch.manual_seed(0)
        shift = Lighting(0.5)(torch.full((3, 4, 4), 0.5)) - 0.5
        assert torch.allclose(shift, shift[:, :1, :1].expand_as(shift))
        assert shift.abs().max() > 0.01

    def test_takes_bytes_too(self):
        image = torch.randint(0, 256, (3, 4, 4), dtype=torch.uint8)
        torch.testing.assert_close(Lighting(0.0)(image), image / 255)

    def test_the_colours_have_the_covariance_of_the_eigenvectors(self):
        torch.manual_seed(0)
        shifts = torch.stack([Lighting(0.1)(torch.full((3, 1, 1), 0.5)).flatten() - 0.5 for _ in range(4000)])
        vectors, values = Lighting.EIGENVECTORS, Lighting.EIGENVALUES
        expected = vectors @ torch.diag((0.1 * values) ** 2) @ vectors.T
        assert torch.allclose(torch.cov(shifts.T), expected, atol=3e-5)


class TestColorNoise:
    @pytest.fixture
    def images(self):
        generator = torch.Generator().manual_seed(0)
        return torch.randint(0, 256, (24, 3, 9, 7), dtype=torch.uint8, generator=generator)

    @pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
    def test_equals_torchvision_with_the_same_factors(self, images, layout):
        torch.manual_seed(0)
        noise = ColorNoise(0.9, 0.8, 0.7, lighting=0.5)
        factors = torch.stack([noise.draw() for _ in images])
        assert len({tuple(order) for order in factors[:, :3].tolist()}) == 6
        found = noise(images.contiguous(memory_format=layout), factors)
        assert found.is_contiguous()
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, one_by_one(images, factors), rtol=0, atol=1e-6)
        assert found.min() == 0
        assert found.max() == 1  # some are clamped on the way

    def test_no_noise_changes_nothing(self, images):
        noise = ColorNoise()
        found = noise(images, torch.stack([noise.draw() for _ in images]))
        torch.testing.assert_close(found, images / 255, rtol=0, atol=1e-7)

    def test_its_distribution_is_that_of_the_per_image_transforms(self):
        """Of the pixels of a picture, against ColorJitter and Lighting on floats."""
        torch.manual_seed(1)
        image = torch.tensor([[[30, 220]], [[90, 100]], [[200, 60]]], dtype=torch.uint8)
        noise = ColorNoise(0.4, 0.5, 0.6, lighting=0.1)
        reference = T.Compose(
            [T.ToDtype(torch.float32, scale=True), T.ColorJitter(0.4, 0.5, 0.6), Lighting(0.1)]
        )
        count = 1500
        found = noise(image.expand(count, -1, -1, -1), torch.stack([noise.draw() for _ in range(count)]))
        expected = torch.stack([reference(image) for _ in range(count)])
        assert _least_p(found, expected) > 1e-3
        other = ColorNoise(0.3, 0.5, 0.6, lighting=0.1)  # the test tells such a difference
        found = other(image.expand(count, -1, -1, -1), torch.stack([other.draw() for _ in range(count)]))
        assert _least_p(found, expected) < 1e-5

    def test_the_factors_have_their_ranges(self):
        torch.manual_seed(0)
        noise = ColorNoise(0.1, 2.0, 0.0, lighting=0.1)
        drawn = torch.stack([noise.draw() for _ in range(500)])
        by_kind = torch.gather(drawn[:, 3:6], 1, drawn[:, :3].long().argsort(1))
        low, high = by_kind.aminmax(dim=0)
        assert torch.allclose(low, torch.tensor([0.9, 0.0, 1.0]), atol=0.02)
        assert torch.allclose(high, torch.tensor([1.1, 3.0, 1.0]), atol=0.02)

    def test_runs_on_a_device_whose_values_cannot_be_read(self, images):
        batch = UnfinishedImages(images, ColorNoise(0.1).draw().expand(24, -1), ColorNoise(0.1))
        assert batch.to(torch.device("meta"))[::2].finish().shape == (12, 3, 9, 7)

    def test_autocast_does_not_touch_it(self, images):
        noise = ColorNoise(0.4, 0.4, 0.4, lighting=0.1)
        factors = torch.stack([noise.draw() for _ in images])
        with torch.autocast("cpu", torch.bfloat16):
            found = noise(images, factors)
        assert torch.equal(found, noise(images, factors))

    def test_images_that_are_floats_already_are_refused(self, images):
        noise = ColorNoise()
        with pytest.raises(InputError, match=r"ColorNoise takes uint8 images.*float32.*ToDtype"):
            noise(images / 255, noise.draw().expand(24, -1))

    @pytest.mark.parametrize(
        "wrong", [{"brightness": -0.1}, {"lighting": "0.1"}, {"contrast": True}, {"saturation": float("inf")}]
    )
    def test_wrong_values_are_one_line(self, wrong):
        with pytest.raises(InputError, match=rf"ColorNoise: {next(iter(wrong))} is .*a number >= 0"):
            ColorNoise(**wrong)


def _least_p(some, others):
    """Of Kolmogorov-Smirnov tests, one for each channel of each pixel in a row."""
    some, others = (images.flatten(1).T for images in (some, others))
    return min(ks_2samp(one, other).pvalue for one, other in zip(some, others, strict=True))
