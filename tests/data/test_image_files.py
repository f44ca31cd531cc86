"""Every fault of an image file is told before a training starts, or when the image is read, by its name."""

import json
import logging
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.data import DatasetMapper, build_detection_test_loader, build_detection_train_loader
from detectron2.data.transforms import ResizeShortestEdge
from detectron2.utils import comm
from detectron2.utils.serialize import PicklableWrapper
from PIL import Image

from rt_detectron.data import image_files
from rt_detectron.data.corruptions import CorruptionMapper
from rt_detectron.data.image_files import CheckedMapper, check_image, check_images
from rt_detectron.utils.errors import InputError

FAULTS = ("missing", "empty", "text", "truncated", "huge")


@pytest.fixture
def records(tmp_path):
    """Five pictures as dataset dicts."""
    made = []
    for number in range(5):
        path = tmp_path / f"{number}.jpg"
        pixels = np.random.default_rng(number).integers(0, 256, (40, 60, 3), np.uint8)
        Image.fromarray(pixels).save(path)
        made.append(
            {"file_name": str(path), "image_id": number, "height": 40, "width": 60, "annotations": []}
        )
    return made


@pytest.fixture
def spoil(tmp_path, monkeypatch):
    """``spoil(fault)``: 2.jpg gets it."""

    def spoil(fault: str) -> None:
        path = tmp_path / "2.jpg"
        content = path.read_bytes()
        if fault == "missing":
            path.unlink()
        elif fault == "huge":
            monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2000)
            Image.new("RGB", (60, 40)).resize((600, 400)).save(path)
        elif fault == "broken inside":  # header and end are sound; PNG has a checksum for each part
            Image.open(path).save(path, "PNG")
            content = bytearray(path.read_bytes())
            content[len(content) // 2] ^= 0xFF
            path.write_bytes(content)
        else:
            path.write_bytes(
                {"empty": b"", "text": b"<html>", "truncated": content[: len(content) // 2]}[fault]
            )

    return spoil


def mapper(**options) -> DatasetMapper:
    return DatasetMapper(**{"is_train": True, "augmentations": [], "image_format": "RGB", **options})


class TestCheckImages:
    @pytest.mark.parametrize("fault", FAULTS)
    def test_a_fault_stops_or_is_skipped(self, records, spoil, fault, caplog):
        assert check_images(records) == records
        spoil(fault)
        with pytest.raises(InputError) as error:
            check_images(records)
        assert f"{records[2]['file_name']}: cannot be read (" in str(error.value)
        assert str(error.value).endswith("; repair or delete it, or set INPUT.ON_CORRUPT skip")
        with caplog.at_level(logging.WARNING):
            kept = check_images(records, "skip")
        assert kept == [*records[:2], *records[3:]]
        assert "Skipped 1 of 5 images" in caplog.text

    def test_all_faults_are_counted(self, records):
        for record in records[1:]:
            open(record["file_name"], "w").close()
        with pytest.raises(InputError, match=r"1\.jpg: .* \(3 more images have such faults\)"):
            check_images(records)
        assert check_images(records, "skip") == records[:1]
        open(records[0]["file_name"], "w").close()
        with pytest.raises(InputError, match="none of the 5 images can be read"):
            check_images(records, "skip")

    def test_another_size_than_in_the_annotations_is_never_skipped(self, records):
        records[3]["width"] = 61
        with pytest.raises(
            InputError, match=r"3\.jpg: is 60 x 40 pixels, turned upright, but 61 x 40 in its"
        ):
            check_images(records, "skip")

    def test_the_size_is_that_of_the_upright_picture(self, records):
        path = records[1]["file_name"]
        exif = Image.Exif()
        exif[0x0112] = 6
        Image.open(path).transpose(Image.Transpose.ROTATE_90).save(path, exif=exif)
        check_images(records)
        records[1].update(width=40, height=60)
        with pytest.raises(InputError, match=r"1\.jpg: is 60 x 40 .* remove the EXIF tag"):
            check_images(records)

    def test_one_channel_of_16_bits_is_never_skipped(self, records):
        Image.fromarray(np.zeros((40, 60), np.uint16)).save(records[0]["file_name"], "PNG")
        with pytest.raises(InputError, match=r"0\.jpg: it has more than 8 bits a channel"):
            check_images(records, "skip")

    def test_it_stops_looking_when_its_time_is_over(self, records, spoil, caplog):
        spoil("empty")
        with caplog.at_level(logging.INFO):
            assert check_images(records, seconds=-1.0) == records
        assert "the others are checked when they are read" in caplog.text

    def test_an_unknown_policy(self, records):
        with pytest.raises(InputError, match=r"INPUT\.ON_CORRUPT is 'ignore'; use 'stop' or 'skip'"):
            check_images(records, "ignore")


class TestCheckedMapper:
    def test_it_gives_what_the_mapper_gives(self, records):
        for record in records:
            expected, found = mapper()(record), CheckedMapper(mapper())(record)
            assert torch.equal(found["image"], expected["image"])
            assert found.keys() == expected.keys()

    def test_a_narrow_image_is_named(self, records):
        Image.new("RGB", (2000, 1)).save(records[1]["file_name"])
        records[1].update(width=2000, height=1)
        resizing = CheckedMapper(mapper(augmentations=[ResizeShortestEdge(64, 128)]))
        with pytest.raises(InputError, match=r"1\.jpg: its 2000 x 1 pixels are so narrow that none is left"):
            resizing(records[1])

    @pytest.mark.parametrize("fault", [*FAULTS, "broken inside"])
    def test_an_image_that_cannot_be_read_is_named_or_skipped(self, records, spoil, fault):
        spoil(fault)
        with pytest.raises(InputError, match=r"2\.jpg: cannot be read .* or set INPUT\.ON_CORRUPT skip"):
            CheckedMapper(mapper())(records[2])
        skipping = CheckedMapper(mapper(), "skip")
        assert skipping(records[2]) is None
        assert skipping.unreadable.count == 1

    def test_it_can_be_pickled_as_detectron2_does_for_workers_that_are_not_forked(self, records):
        again = pickle.loads(pickle.dumps(PicklableWrapper(CheckedMapper(mapper(), "skip"))))
        assert torch.equal(again(records[0])["image"], mapper()(records[0])["image"])

    def test_what_is_broken_inside_passes_the_check_beforehand(self, records, spoil):
        spoil("broken inside")
        check_image(records[2])  # so that the test above shows more than the check of headers

    def test_test_images_have_no_way_to_be_skipped(self, records, spoil):
        spoil("empty")
        loader = build_detection_test_loader(
            records, mapper=CheckedMapper(mapper(is_train=False), skipping="")
        )
        with pytest.raises(InputError, match=r"2\.jpg: cannot be read \(.*\); repair or delete it$"):
            list(loader)

    def test_a_training_goes_on_without_a_skipped_image(self, records, spoil):
        spoil("truncated")
        loader = build_detection_train_loader(
            records, mapper=CheckedMapper(mapper(), "skip"), total_batch_size=5, aspect_ratio_grouping=False
        )
        batches = iter(loader)
        seen = [image["image_id"] for _ in range(3) for image in next(batches)]
        assert len(seen) == 15
        assert set(seen) == {0, 1, 3, 4}

    def test_corrupted_images_too(self, records, spoil):
        pytest.importorskip("imagecorruptions")
        spoil("text")
        corrupting = CheckedMapper(
            CorruptionMapper(mapper(augmentations=[ResizeShortestEdge(40)]), "contrast", 1)
        )
        assert corrupting(records[1])["image"].shape == (3, 40, 60)
        with pytest.raises(InputError, match=r"2\.jpg: cannot be read"):
            corrupting(records[2])

    def test_another_missing_file_is_named_as_well(self, records):
        with pytest.raises(InputError, match=r"0\.jpg: .*semantic\.png"):
            CheckedMapper(mapper(), "skip")({**records[0], "sem_seg_file_name": "semantic.png"})

    def test_errors_of_the_mapper_itself_keep_their_traceback(self, records):
        def broken(record):
            raise RuntimeError("a bug")

        with pytest.raises(RuntimeError, match="a bug"):
            CheckedMapper(broken, "skip")(records[0])


def check_in_one_of_two(records: list[dict], folder: str) -> None:
    """Writes what this process looked at, what it was told, and what it keeps."""
    looked_at = []
    original = image_files.check_image
    image_files.check_image = lambda record: looked_at.append(record["image_id"]) or original(record)
    try:
        check_images(records)
    except InputError as error:
        told = str(error)
    kept = [record["image_id"] for record in check_images(records, "skip")]
    content = {"looked_at": sorted(looked_at), "told": told, "kept": kept}
    Path(folder, f"{comm.get_rank()}.json").write_text(json.dumps(content))


def test_processes_share_the_images_and_all_are_told_of_a_fault(records, spoil, launch, tmp_path):
    spoil("truncated")
    launch(check_in_one_of_two, records, str(tmp_path))
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    assert [each["looked_at"] for each in found] == [[0, 0, 2, 2, 4, 4], [1, 1, 3, 3]]  # twice each
    for each in found:
        assert "2.jpg: cannot be read" in each["told"]
        assert each["kept"] == [0, 1, 3, 4]
