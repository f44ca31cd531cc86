"""Corruptions: all sizes and severities, the replaced ones against the originals, seeding, the mapper."""

import pickle
import random
import sys

import numpy as np
import pytest
import skimage.filters
import torch
from detectron2.data import DatasetMapper, build_detection_test_loader
from detectron2.data import transforms as T
from detectron2.data.detection_utils import read_image
from detectron2.structures import BoxMode
from PIL import Image

from rt_detectron.data import CorruptionMapper, corruption_names
from rt_detectron.data.corruptions import COMMON_CORRUPTIONS, EXTRA_CORRUPTIONS, SEVERITIES, corrupt
from rt_detectron.utils.errors import InputError

imagecorruptions = pytest.importorskip("imagecorruptions")
EVERYTHING = COMMON_CORRUPTIONS + EXTRA_CORRUPTIONS
pytestmark = pytest.mark.filterwarnings("error")  # a NaN cast to uint8 is one


@pytest.fixture(scope="module")
def photo(photograph):
    """``photo(height, width)``: H x W x 3 uint8 RGB."""
    image = Image.fromarray(photograph.numpy().transpose(1, 2, 0))
    return lambda height, width: np.array(image.resize((width, height)))


class TestNames:
    def test_they_are_the_packages(self):
        assert list(COMMON_CORRUPTIONS) == imagecorruptions.get_corruption_names("common")
        assert list(EVERYTHING) == imagecorruptions.get_corruption_names("all")

    def test_groups_expand_and_nothing_comes_twice(self):
        assert corruption_names(["common"]) == COMMON_CORRUPTIONS
        assert corruption_names(("all",)) == EVERYTHING
        assert corruption_names(["snow", "fog", "snow"]) == ("snow", "fog")
        assert corruption_names(["saturate", "common"]) == ("saturate", *COMMON_CORRUPTIONS)
        assert corruption_names([]) == ()

    def test_unknown_ones_get_near_ones(self):
        with pytest.raises(
            InputError, match="unknown corruption 'gausian_noise'; did you mean gaussian_noise"
        ):
            corruption_names(["fog", "gausian_noise"])
        with pytest.raises(InputError, match="'zzz'; known are common, all, gaussian_noise, "):
            corruption_names(["zzz"])


class TestCorrupt:
    @pytest.mark.parametrize("name", EVERYTHING)
    def test_every_size_and_severity(self, photo, name):
        for shape in [(32, 32), (33, 47), (101, 32)]:
            image = photo(*shape)
            for severity in SEVERITIES:
                before = image.copy()
                corrupted = corrupt(image, name, severity, seed=1)
                assert (corrupted.shape, corrupted.dtype) == (image.shape, np.uint8)
                assert (image == before).all()
                if name != "spatter":  # which may put no drop on a small image
                    assert (corrupted != image).any()

    @pytest.mark.parametrize("name", EVERYTHING)
    def test_it_hangs_on_its_arguments_only(self, photo, name):
        image = photo(64, 48)
        once = corrupt(image, name, 3, 7, "a.jpg")
        np.random.seed(5)
        random.seed(5)
        states = pickle.dumps(np.random.get_state()), random.getstate()
        again = corrupt(image, name, 3, 7, "a.jpg")
        assert (pickle.dumps(np.random.get_state()), random.getstate()) == states
        assert (again == once).all()

    @pytest.mark.parametrize(
        "name", ["gaussian_noise", "impulse_noise", "glass_blur", "fog", "frost", "snow"]
    )
    def test_each_argument_chooses_other_random_numbers(self, photo, name):
        image = photo(64, 48)
        results = [corrupt(image, name, 3, *rest) for rest in [(0, 1), (1, 1), (0, 2), (0, "b.jpg")]]
        assert len({result.tobytes() for result in results}) == len(results)

    def test_mistakes_are_one_line(self, photo):
        with pytest.raises(InputError, match="an image of 40 x 31 pixels is too small"):
            corrupt(photo(31, 40), "fog", 1)
        with pytest.raises(InputError, match="severity 6: severities are 1, 2, 3, 4 and 5"):
            corrupt(photo(32, 32), "fog", 6)
        with pytest.raises(InputError, match="did you mean fog"):
            corrupt(photo(32, 32), "fogg", 1)

    def test_a_missing_package_names_the_extra(self, photo, monkeypatch):
        monkeypatch.setitem(sys.modules, "imagecorruptions.corruptions", None)
        with pytest.raises(InputError, match='pip install "imagecorruptions'):
            corrupt(photo(32, 32), "fog", 1)
        with pytest.raises(InputError, match="pip install"):
            CorruptionMapper(None, "gaussian_noise", 1)


class TestReplacements:
    """The originals, helped over what is gone from numpy and scikit-image, give the same pixels."""

    @pytest.fixture
    def original(self, monkeypatch):
        def gaussian(image, sigma, multichannel=False, **kwargs):
            channel_axis = -1 if multichannel else None
            return skimage.filters.gaussian(image, sigma, channel_axis=channel_axis, **kwargs)

        monkeypatch.setattr(imagecorruptions.corruptions, "gaussian", gaussian)
        monkeypatch.setattr(np, "float_", np.float64, raising=False)
        return imagecorruptions.corrupt

    @pytest.mark.parametrize("name", [name for name in EVERYTHING if name != "impulse_noise"])
    @pytest.mark.parametrize("severity", SEVERITIES)
    def test_same_pixels(self, photo, original, monkeypatch, name, severity):
        monkeypatch.setattr("rt_detectron.data.corruptions._numpy_seeded", lambda *key: np.errstate())
        image = photo(57, 72)
        np.random.seed(3)
        ours = corrupt(image, name, severity)
        np.random.seed(3)
        np.testing.assert_array_equal(ours, original(image, severity, name))

    @pytest.mark.parametrize(("severity", "amount"), [(1, 0.03), (5, 0.27)])
    def test_impulse_noise(self, severity, amount):  # whose original cannot be seeded any more
        grey = np.full((300, 300, 3), 128, np.uint8)
        corrupted = corrupt(grey, "impulse_noise", severity)
        for value in (0, 255):  # salt and pepper in equal parts, in each colour by itself
            assert (corrupted == value).mean() == pytest.approx(amount / 2, rel=0.05)
        assert set(np.unique(corrupted)) == {0, 128, 255}

    def test_no_spatter_leaves_the_image(self, photo, monkeypatch):
        image = photo(32, 32)
        monkeypatch.setattr("rt_detectron.data.corruptions._numpy_seeded", lambda *key: np.errstate())
        np.random.seed(35)
        with np.errstate(invalid="ignore"):
            assert np.isnan(imagecorruptions.corruptions.spatter(Image.fromarray(image), 1)).all()
        np.random.seed(35)
        assert (corrupt(image, "spatter", 1) == image).all()


class TestMapper:
    @pytest.fixture
    def dataset(self, tmp_path, photo):
        """Four images of two sizes, the last one turned by its EXIF tag."""
        exif = Image.Exif()
        exif[0x0112] = 6
        dicts = []
        for number, shape in enumerate([(48, 64), (64, 40), (48, 64), (40, 64)]):
            path = tmp_path / f"{number}.png"
            Image.fromarray(photo(*shape)).save(path, exif=exif if number == 3 else Image.Exif())
            height, width = shape[::-1] if number == 3 else shape
            dicts.append({"file_name": str(path), "image_id": 10 + number, "height": height, "width": width})
        return dicts

    @staticmethod
    def mapper(image_format="BGR"):
        return DatasetMapper(False, augmentations=[T.ResizeShortestEdge(80)], image_format=image_format)

    @pytest.mark.parametrize("image_format", ["BGR", "RGB"])
    def test_it_is_the_mapper_on_the_corrupted_image(self, dataset, tmp_path, photo, image_format):
        image = corrupt(photo(48, 64), "brightness", 5, 2, 10)
        Image.fromarray(image).save(tmp_path / "corrupted.png")
        mapper = self.mapper(image_format)
        expected = mapper({**dataset[0], "file_name": str(tmp_path / "corrupted.png")})
        mapped = CorruptionMapper(mapper, "brightness", 5, seed=2)(dataset[0])
        assert torch.equal(mapped.pop("image"), expected.pop("image"))
        assert mapped == {**expected, "file_name": dataset[0]["file_name"]}

    @pytest.mark.parametrize("image_format", ["BGR", "RGB"])
    @pytest.mark.parametrize("name", ["contrast", "gaussian_noise", "jpeg_compression", "glass_blur"])
    def test_it_equals_the_mapper_on_a_corrupted_file(self, dataset, tmp_path, name, image_format):
        """The reference writes every corrupted image to a lossless file, which the mapper then reads."""
        mapper = self.mapper(image_format)
        in_memory = CorruptionMapper(mapper, name, 3, seed=5)
        for given in dataset:
            image = corrupt(read_image(given["file_name"], "RGB"), name, 3, 5, given["image_id"])
            path = tmp_path / "corrupted.bmp"
            Image.fromarray(image).save(path)
            expected = mapper({**given, "file_name": str(path)})
            mapped = in_memory(given)
            assert torch.equal(mapped.pop("image"), expected.pop("image"))
            assert mapped == {**expected, "file_name": given["file_name"]}

    def test_annotations_are_transformed_as_without_corruption(self, dataset):
        mapper = DatasetMapper(True, augmentations=[T.ResizeShortestEdge(80)], image_format="RGB")
        annotation = {"bbox": [4, 8, 20, 10], "bbox_mode": BoxMode.XYWH_ABS, "category_id": 1}
        given = {**dataset[0], "annotations": [annotation]}
        plain, corrupted = mapper(given), CorruptionMapper(mapper, "fog", 3)(given)
        assert torch.equal(plain["instances"].gt_boxes.tensor, corrupted["instances"].gt_boxes.tensor)
        assert not torch.equal(plain["image"], corrupted["image"])
        assert len(mapper.augmentations.augs) == 1  # the mapper itself is left alone

    def test_another_channel_order_is_refused(self, dataset):
        with pytest.raises(InputError, match=r"INPUT\.FORMAT is 'L'; it must be RGB or BGR"):
            CorruptionMapper(self.mapper("L"), "fog", 1)(dataset[0])

    def test_workers_and_order_change_nothing(self, dataset):
        mapper = CorruptionMapper(self.mapper(), "gaussian_noise", 3, seed=1)
        expected = {dict_["image_id"]: mapper(dict_)["image"] for dict_ in reversed(dataset)}
        assert not torch.equal(expected[10], expected[12])  # one size and content, another id
        for workers in (0, 2):
            loader = build_detection_test_loader(
                dataset, mapper=pickle.loads(pickle.dumps(mapper)), num_workers=workers
            )
            found = {inputs[0]["image_id"]: inputs[0]["image"] for inputs in loader}
            assert found.keys() == expected.keys()
            assert all(torch.equal(found[key], expected[key]) for key in found)

    def test_an_image_turned_by_its_tag_is_turned_once(self, dataset):
        image = CorruptionMapper(self.mapper(), "contrast", 1)(dataset[3])["image"]
        assert image.shape[1] / image.shape[2] == 64 / 40

    def test_without_an_id_the_files_name_counts(self, dataset, tmp_path):
        mapper = CorruptionMapper(self.mapper(), "gaussian_noise", 3)
        del dataset[0]["image_id"]
        moved = tmp_path / "elsewhere" / "0.png"
        moved.parent.mkdir()
        moved.write_bytes((tmp_path / "0.png").read_bytes())
        assert torch.equal(
            mapper(dataset[0])["image"], mapper({**dataset[0], "file_name": str(moved)})["image"]
        )
        renamed = moved.with_name("1.png")
        moved.rename(renamed)
        other = mapper({**dataset[0], "file_name": str(renamed)})["image"]
        assert not torch.equal(mapper(dataset[0])["image"], other)

    def test_too_small_an_image_is_named(self, tmp_path, photo):
        path = tmp_path / "small.png"
        Image.fromarray(photo(20, 64)).save(path)
        with pytest.raises(InputError, match=r"small\.png: an image of 64 x 20 pixels is too small"):
            CorruptionMapper(self.mapper(), "fog", 1)({"file_name": str(path)})

    def test_mistakes_are_said_at_once(self):
        with pytest.raises(InputError, match="did you mean fog"):
            CorruptionMapper(None, "fogg", 1)
        with pytest.raises(InputError, match="severity 0"):
            CorruptionMapper(None, "fog", 0)
