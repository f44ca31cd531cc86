"""Pictures with every fault that a file can have, and the same pixels as Detectron2 reads."""

import io

import numpy as np
import pytest
from detectron2.data.detection_utils import read_image
from PIL import Image

from rt_detectron.utils.pictures import DepthError, read_upright, to_rgb, upright_size


def pixels(height=20, width=30) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)


def encoded(image: Image.Image, format: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_size_and_pixels_are_those_of_the_upright_picture_as_detectron2_reads_it(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "a.jpg"
    Image.fromarray(pixels()).save(path, exif=exif)
    expected = read_image(str(path), "RGB")
    assert np.array_equal(np.asarray(read_upright(path)), expected)
    with open(path, "rb") as file:
        assert upright_size(file) == expected.shape[1::-1]


@pytest.mark.parametrize("mode", ["RGB", "L", "1", "P", "LA", "RGBA", "CMYK", "YCbCr", "HSV"])
def test_ordinary_modes_become_rgb_as_pillow_makes_them(mode):
    image = Image.fromarray(pixels()).convert(mode)
    assert to_rgb(image).tobytes() == image.convert("RGB").tobytes()


@pytest.mark.parametrize("dtype", ["u2", ">u2", "i4", "f4"])
def test_one_channel_of_more_than_8_bits_stops(dtype):
    """Pillow would clip it: nearly everything becomes white."""
    deep = Image.fromarray(np.full((4, 4), 3000, dtype))
    assert deep.convert("RGB").getpixel((0, 0)) == (255, 255, 255)
    content = encoded(deep, "TIFF")
    for read in (read_upright, upright_size):
        with pytest.raises(DepthError, match="more than 8 bits a channel"):
            read(io.BytesIO(content))


class TestFaults:
    """``upright_size`` finds them without decoding a whole picture."""

    @pytest.mark.parametrize(
        ("content", "reason"),
        [
            (b"", "no image"),
            (b"<html>not found</html>", "no image"),
            (b"\xff\xd8\xff\xe0" + bytes(100), ""),
            (encoded(Image.fromarray(pixels()), "JPEG")[:-100], "truncated"),
            (encoded(Image.fromarray(pixels()), "PNG")[:-30], "truncated"),
            (encoded(Image.fromarray(pixels()), "BMP")[:-30], "truncated"),
            (encoded(Image.fromarray(pixels()), "TIFF")[:-30], ""),
            (encoded(Image.fromarray(pixels()), "GIF")[:-300], ""),
            (encoded(Image.fromarray(pixels()), "WEBP")[:-30], ""),
        ],
    )
    def test_no_image_and_half_an_image(self, content, reason):
        for read in (upright_size, read_upright):
            with pytest.raises(OSError, match=reason) as error:
                read(io.BytesIO(content))
            assert type(error.value) is OSError
            assert "\n" not in str(error.value)

    def test_a_missing_file(self, tmp_path):
        with pytest.raises(OSError, match=r"^there is no such file$"):
            read_upright(tmp_path / "nowhere.jpg")

    def test_more_pixels_than_pillow_reads(self, monkeypatch):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
        with pytest.raises(OSError, match=r"more than 0 million pixels: cut it into tiles"):
            upright_size(io.BytesIO(encoded(Image.fromarray(pixels()), "PNG")))

    @pytest.mark.parametrize("format", ["JPEG", "PNG", "MPO"])
    def test_whole_files_are_not_decoded(self, format, monkeypatch):
        content = encoded(Image.fromarray(pixels()), format)
        monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
        monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: pytest.fail("decoded"))
        assert upright_size(io.BytesIO(content)) == (30, 20)

    def test_bytes_behind_the_end_are_no_fault(self):
        """Some cameras write them."""
        content = encoded(Image.fromarray(pixels()), "JPEG") + b"SEFT and more"
        assert upright_size(io.BytesIO(content)) == (30, 20)
