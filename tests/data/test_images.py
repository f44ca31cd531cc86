import io

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from small_images import as_is, encoded, jpeg

from rt_detectron.data.images import FolderDataset, check_same_classes, decode
from rt_detectron.utils.errors import InputError
from rt_detectron.utils.pictures import DepthError


def greys(images):
    return [round(image.float().mean().item()) for image in images]


class TestDecode:
    """PIL is the reference; the same pixels, whatever the format."""

    @pytest.fixture
    def pixels(self):
        return np.random.default_rng(0).integers(0, 256, (9, 7, 4), np.uint8)

    @pytest.mark.parametrize(
        ("mode", "format"),
        [
            *(("RGB", "JPEG"), ("L", "JPEG"), ("CMYK", "JPEG"), ("RGB", "PNG"), ("L", "PNG"), ("LA", "PNG")),
            *(("RGBA", "PNG"), ("P", "PNG"), ("RGB", "BMP"), ("RGB", "TIFF"), ("P", "GIF"), ("RGB", "WEBP")),
        ],
    )
    def test_equals_pil(self, pixels, mode, format):
        image = Image.fromarray(pixels, "CMYK") if mode == "CMYK" else Image.fromarray(pixels).convert(mode)
        content = encoded(image, format)
        expected = np.asarray(Image.open(io.BytesIO(content)).convert("RGB")).transpose(2, 0, 1)
        assert np.array_equal(decode(content).numpy(), expected)

    def test_a_damaged_png_is_an_error(self, pixels):  # torchvision's decoder ends the process
        content = bytearray(encoded(Image.fromarray(pixels).resize((64, 64)), "PNG"))
        for position in range(len(content) // 3, len(content), len(content) // 50):
            content[position] ^= 0xFF
        with pytest.raises(OSError, match=r"(?i)image|PNG|truncated"):
            decode(bytes(content))

    def test_an_animation_is_its_first_picture(self, pixels):
        first, second = (
            Image.fromarray(part).convert("P") for part in (pixels[..., :3], pixels[::-1, :, 1:])
        )
        content = encoded(first, "GIF", save_all=True, append_images=[second])
        expected = np.asarray(Image.open(io.BytesIO(content)).convert("RGB")).transpose(2, 0, 1)
        assert np.array_equal(decode(content).numpy(), expected)

    @pytest.mark.parametrize(
        ("dtype", "format"), [("u2", "PNG"), ("u2", "TIFF"), ("i4", "TIFF"), ("f4", "TIFF")]
    )
    def test_one_channel_of_more_than_8_bits_stops(self, dtype, format):
        """Pillow clips its values to white, torchvision scales them, and neither knows their range."""
        content = encoded(Image.fromarray(np.array([[0, 25700, 65535]], dtype)), format)
        with pytest.raises(DepthError, match=r"more than 8 bits a channel .*: convert it to 8 bits"):
            decode(content)

    def test_colours_of_16_bits_are_read_as_pillow_reads_them(self):
        cv2 = pytest.importorskip("cv2")
        values = np.array([[[0, 25700, 65535]]], np.uint16)
        for ending in (".png", ".tiff"):
            content = cv2.imencode(ending, values)[1].tobytes()
            assert decode(content).flatten().tolist() == [255, 100, 0]

    def test_whatever_pillow_raises_is_an_error_of_reading(self, pixels, monkeypatch):
        image, text = Image.fromarray(pixels).convert("RGB"), PngInfo()
        text.add_text("workflow", "x" * 2_000_000, zip=True)  # more than Pillow reads: a ValueError
        with pytest.raises(OSError, match="Decompressed data too large"):
            decode(encoded(image, "PNG", pnginfo=text))
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2)  # a DecompressionBombError, which is none either
        with pytest.raises(OSError, match="it has more than 0 million pixels"):
            decode(encoded(image, "PNG"))

    @pytest.mark.parametrize("content", [b"", b"no image", jpeg(9)[:-40], jpeg(9)[:20]])
    def test_no_image_and_half_an_image(self, content):
        with pytest.raises(OSError, match=r"(?i)image|PNG|truncated"):
            decode(content)


class TestFolderDataset:
    @pytest.fixture
    def folder(self, tmp_path):
        for name, value in (("cat", 50), ("dog", 100)):
            (tmp_path / name).mkdir()
            for i in range(3):
                (tmp_path / name / f"{i}.jpg").write_bytes(jpeg(value + i))
        return tmp_path

    def test_classes_are_the_sorted_folders(self, folder):
        dataset = FolderDataset(str(folder), 2, as_is)
        assert [label for _, label, _ in dataset] == [0, 0, 0, 1, 1, 1]
        assert greys(image for image, _, _ in dataset) == [50, 51, 52, 100, 101, 102]
        assert [key for _, _, key in dataset][::3] == ["cat/0.jpg", "dog/0.jpg"]

    def test_a_corrupt_image_stops_or_is_skipped_and_counted(self, folder):
        (folder / "cat" / "1.jpg").write_bytes(b"\xff\xd8\xff no image")
        with pytest.raises(InputError, match=r"cat/1.jpg: cannot be read .*on_corrupt=skip"):
            FolderDataset(str(folder), 2, as_is)[1]
        dataset = FolderDataset(str(folder), 2, as_is, on_corrupt="skip")
        assert greys([dataset[1][0]]) == [52]
        assert dataset.unreadable.count == 1

    def test_a_truncated_image_is_corrupt(self, folder):
        (folder / "cat" / "1.jpg").write_bytes(jpeg(9)[:-40])
        with pytest.raises(InputError, match="truncated"):
            FolderDataset(str(folder), 2, as_is)[1]

    def test_an_image_of_another_depth_is_not_skipped(self, folder):
        content = encoded(Image.fromarray(np.zeros((8, 8), np.uint16)), "PNG")
        (folder / "cat" / "1.jpg").write_bytes(content)
        with pytest.raises(InputError, match=r"cat/1.jpg: it has more than 8 bits"):
            FolderDataset(str(folder), 2, as_is, on_corrupt="skip")[1]

    def test_only_corrupt_images_are_not_looked_through_for_ever(self, folder):
        for path in folder.rglob("*.jpg"):
            path.write_bytes(b"")
        with pytest.raises(InputError, match="none of the 6 images can be read"):
            FolderDataset(str(folder), 2, as_is, on_corrupt="skip")[0]

    def test_names_that_are_no_utf8_can_be_written_anywhere(self, tmp_path):
        path = tmp_path / "caf\udce9" / "\udcff.jpg"
        path.parent.mkdir()
        path.write_bytes(jpeg(50))
        dataset = FolderDataset(str(tmp_path), 1, as_is)
        assert dataset.classes == ["caf\\xe9"]
        assert dataset[0][1:] == (0, "caf\\xe9/\\xff.jpg")
        path.write_bytes(b"no image")
        with pytest.raises(InputError, match=r"caf\\xe9/\\xff.jpg: cannot be read"):
            dataset[0]

    def test_train_and_test_folders_must_agree(self, folder, tmp_path_factory):
        other = tmp_path_factory.mktemp("other")
        for name in ("cat", "dig"):
            (other / name).mkdir()
            (other / name / "0.jpg").write_bytes(jpeg(1))
        ours, theirs = (FolderDataset(str(root), 2, as_is) for root in (folder, other))
        check_same_classes(ours, ours)
        with pytest.raises(InputError, match=r"other0 has the class 'dig', but .* does not"):
            check_same_classes(ours, theirs)

    def test_a_class_folder_without_images_is_named(self, folder):
        (folder / "eel").mkdir()
        with pytest.raises(InputError, match="no images of eel"):
            FolderDataset(str(folder), 3, as_is)

    def test_bad_folders(self, folder, tmp_path):
        (tmp_path / "empty").mkdir()
        with pytest.raises(InputError, match="no such folder"):
            FolderDataset(str(tmp_path / "nowhere"), 2, as_is)
        with pytest.raises(InputError, match="expected class folders"):
            FolderDataset(str(tmp_path / "empty"), 2, as_is)
        (tmp_path / "empty").rmdir()
        with pytest.raises(InputError, match="has 2 class folders, but num_classes is 3"):
            FolderDataset(str(folder), 3, as_is)
