import functools
import io
import tarfile
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from itertools import chain

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2 as T

from rt_detectron.pretrain.data import (
    FolderDataset,
    Lighting,
    ShardDataset,
    TrainLoader,
    build_test_loader,
    check_same_classes,
    decode,
)
from rt_detectron.utils.errors import InputError

as_is = T.Identity()


def encoded(image: Image.Image, format: str, **kwargs) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **kwargs)
    return buffer.getvalue()


def jpeg(value: int) -> bytes:
    """A grey 8x8 JPEG; its grey value tells the images apart."""
    return encoded(Image.fromarray(np.full((8, 8, 3), value, np.uint8)), "JPEG", quality=100)


def write_shard(path, samples):
    """``samples``: (key, image bytes or None, class text or None)."""
    with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w") as tar:
        for key, image, label in samples:
            for ending, content in (("jpg", image), ("cls", label and label.encode())):
                if content is not None:
                    info = tarfile.TarInfo(f"{key}.{ending}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))


@pytest.fixture
def server():
    """``server(folder)``: the address of an HTTP server for it."""
    servers = []

    def serve(folder):
        handler = functools.partial(SimpleHTTPRequestHandler, directory=str(folder))
        servers.append(ThreadingHTTPServer(("127.0.0.1", 0), handler))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_port}"

    yield serve
    for one in servers:
        one.shutdown()
        one.server_close()


@pytest.fixture
def shards(tmp_path):
    """Four shards of five images; image i has the grey value 10*i and the class i % 10."""
    for shard in range(4):
        numbers = range(5 * shard, 5 * shard + 5)
        write_shard(
            tmp_path / f"train-{shard:06d}.tar.gz", [(f"{i:04d}", jpeg(10 * i), str(i % 10)) for i in numbers]
        )
    return tmp_path


def shard_dataset(urls, **kwargs):
    return ShardDataset(str(urls), **{"num_samples": 20, "num_classes": 10, "transform": as_is, **kwargs})


def greys(images):
    return [round(image.float().mean().item()) for image in images]


def take(loader, number, start=0):
    """The grey values of ``number`` batches, a list for each."""
    return [greys(images) for (images, _, _), _ in zip(loader.batches(start), range(number), strict=False)]


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

    def test_an_animation_is_its_first_picture(self, pixels):
        first, second = (
            Image.fromarray(part).convert("P") for part in (pixels[..., :3], pixels[::-1, :, 1:])
        )
        content = encoded(first, "GIF", save_all=True, append_images=[second])
        expected = np.asarray(Image.open(io.BytesIO(content)).convert("RGB")).transpose(2, 0, 1)
        assert np.array_equal(decode(content).numpy(), expected)

    def test_sixteen_bits(self):
        values = np.array([[0, 257 * 100, 65535]], np.uint16)
        assert decode(encoded(Image.fromarray(values), "PNG"))[0].tolist() == [[0, 100, 255]]

    @pytest.mark.parametrize("content", [b"", b"no image", jpeg(9)[:-40], jpeg(9)[:20]])
    def test_no_image_and_half_an_image(self, content):
        with pytest.raises((OSError, SyntaxError)):
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
        assert dataset.corrupt.count == 1

    def test_a_truncated_image_is_corrupt(self, folder):
        (folder / "cat" / "1.jpg").write_bytes(jpeg(9)[:-40])
        with pytest.raises(InputError, match="truncated"):
            FolderDataset(str(folder), 2, as_is)[1]

    def test_only_corrupt_images_are_not_looked_through_for_ever(self, folder):
        for path in folder.rglob("*.jpg"):
            path.write_bytes(b"")
        with pytest.raises(InputError, match="none of the 6 images can be read"):
            FolderDataset(str(folder), 2, as_is, on_corrupt="skip")[0]

    def test_train_and_test_folders_must_agree(self, folder, tmp_path_factory):
        other = tmp_path_factory.mktemp("other")
        for name in ("cat", "dig"):
            (other / name).mkdir()
            (other / name / "0.jpg").write_bytes(jpeg(1))
        ours, theirs = (FolderDataset(str(root), 2, as_is) for root in (folder, other))
        check_same_classes(ours, ours)
        with pytest.raises(InputError, match=r"other0 has the class 'dig' and .* has not"):
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


class TestShardDataset:
    @pytest.mark.parametrize("num_workers", [0, 1, 2, 3])
    def test_evaluation_gives_every_sample_once(self, shards, num_workers):
        loader = build_test_loader(shard_dataset(shards / "train-*.tar.gz"), 4, num_workers)
        batches = list(loader)
        labels = torch.cat([labels for _, labels, _ in batches]).tolist()
        assert sorted(grey for images, _, _ in batches for grey in greys(images)) == list(range(0, 200, 10))
        assert sorted(labels) == sorted(2 * list(range(10)))
        assert any(key.endswith("train-000001.tar.gz: 0007") for _, _, keys in batches for key in keys)

    def test_brace_ranges_are_expanded(self, shards):
        assert len(shard_dataset(shards / "train-{000000..000003}.tar.gz").urls) == 4

    def test_chosen_classes_are_renumbered_in_their_order(self, shards):
        dataset = shard_dataset(shards / "train-*.tar.gz", classes=[7, 2], num_classes=2, num_samples=4)
        assert [(grey, label) for (image, label, _) in dataset for grey in greys([image])] == [
            (20, 1), (70, 0), (120, 1), (170, 0),
        ]  # fmt: skip
        images = [image for batch in take(TrainLoader(dataset, 2, num_workers=0), 2) for image in batch]
        assert sorted(images) == [20, 70, 120, 170]

    @pytest.mark.parametrize("classes", [[1], [1, 1], [1, 2, 3]])
    def test_chosen_classes_must_be_as_many_as_the_classifier_has(self, shards, classes):
        with pytest.raises(InputError, match=r"give 2 \(num_classes\) different ones"):
            shard_dataset(shards / "train-*.tar.gz", classes=classes, num_classes=2)

    def test_a_corrupt_jpeg_stops_or_is_skipped_and_counted_across_workers(self, shards):
        write_shard(
            shards / "train-000004.tar.gz", [("bad", b"\xff\xd8\xff no image", "3"), ("good", jpeg(200), "3")]
        )
        with pytest.raises(InputError, match=r"bad: cannot be read .*on_corrupt=skip"):
            list(shard_dataset(shards / "train-000004.tar.gz"))
        dataset = shard_dataset(shards / "train-*.tar.gz", on_corrupt="skip")
        batches = list(build_test_loader(dataset, 4, num_workers=2))
        assert sum(len(labels) for _, labels, _ in batches) == 21
        assert dataset.corrupt.count == 1

    def test_a_truncated_shard_stops_or_is_skipped(self, shards):
        whole = (shards / "train-000000.tar.gz").read_bytes()
        (shards / "train-000000.tar.gz").write_bytes(whole[: len(whole) // 2])
        with pytest.raises(InputError, match=r"train-000000.tar.gz: cannot be read"):
            list(shard_dataset(shards / "train-*.tar.gz"))
        dataset = shard_dataset(shards / "train-*.tar.gz", on_corrupt="skip")
        assert 15 <= len(list(dataset)) < 20
        assert dataset.corrupt.count == 1

    @pytest.mark.parametrize(
        ("samples", "words"),
        [
            ([("a", jpeg(1), "10")], r"a has the class '10'; num_classes=10 allows 0..9"),
            ([("a", jpeg(1), "cat")], r"class 'cat'"),
            ([("a", jpeg(1), None)], r"lacks an image .* or its .cls"),
            ([("a", None, "1")], r"lacks an image"),
            ([], "no samples, KEY.jpg with KEY.cls"),
        ],
    )
    def test_bad_samples_are_one_line(self, tmp_path, samples, words):
        write_shard(tmp_path / "x.tar", samples)
        with pytest.raises(InputError, match=words) as error:
            list(shard_dataset(tmp_path / "x.tar"))
        assert "\n" not in str(error.value)

    def test_missing_shards(self, tmp_path):
        with pytest.raises(InputError, match="no such shard"):
            shard_dataset(tmp_path / "none-*.tar")

    def test_the_unknown_policy_is_refused(self, shards):
        with pytest.raises(InputError, match="use 'stop' or 'skip'"):
            shard_dataset(shards / "train-*.tar.gz", on_corrupt="ignore")

    def test_shards_are_read_from_a_server(self, shards, server):
        dataset = shard_dataset(f"{server(shards)}/train-{{000000..000003}}.tar.gz")
        assert greys(image for image, _, _ in dataset) == [10 * i for i in range(20)]

    def test_a_shard_that_the_server_lacks(self, shards, server):
        with pytest.raises(InputError, match=r"train-000009.tar.gz: cannot be read"):
            list(shard_dataset(f"{server(shards)}/train-000009.tar.gz"))


class TestTrainLoader:
    @pytest.fixture
    def folder(self, tmp_path):
        for i in range(20):
            (tmp_path / str(i % 2)).mkdir(exist_ok=True)
            (tmp_path / str(i % 2) / f"{i:02d}.jpg").write_bytes(jpeg(10 * i))
        return FolderDataset(str(tmp_path), 2, as_is)

    @pytest.fixture(params=["folder", "shards"])
    def dataset(self, request, shards):
        if request.param == "folder":
            return request.getfixturevalue("folder")
        return shard_dataset(shards / "train-*.tar.gz", shuffle_buffer=3)

    @pytest.mark.parametrize("num_workers", [0, 2])
    def test_every_epoch_is_the_whole_set_in_another_order(self, dataset, num_workers):
        loader = TrainLoader(dataset, 5, num_workers)
        batches = take(loader, 12)
        epochs = [list(chain(*batches[i : i + 4])) for i in (0, 4, 8)]
        assert loader.iterations_per_epoch == 4
        assert epochs[0] != epochs[1] != epochs[2]
        for epoch in epochs:
            assert sorted(epoch) == list(range(0, 200, 10)) != epoch

    @pytest.mark.parametrize("num_workers", [0, 1, 2, 3])
    @pytest.mark.parametrize("start", [0, 1, 3, 4, 6, 9])
    def test_an_interrupted_stream_goes_on_as_if_it_had_not_been(self, dataset, num_workers, start):
        loader = TrainLoader(dataset, 5, num_workers, seed=3)
        assert take(loader, 4, start) == take(loader, start + 4)[start:]

    def test_the_augmentation_is_resumed_too(self, dataset):
        dataset.transform = lambda image: image + torch.randint(10, ())
        loader = TrainLoader(dataset, 5, seed=3, num_workers=0)
        first, again, other = (take(one, 9) for one in (loader, loader, TrainLoader(dataset, 5, 0, seed=4)))
        assert first == again != other
        assert take(loader, 4, 5) == first[5:]
        assert any(grey % 10 for batch in first for grey in batch)

    def test_the_global_random_numbers_are_neither_used_nor_disturbed(self, dataset):
        dataset.transform = T.RandomHorizontalFlip()
        torch.manual_seed(1)
        expected = torch.rand(3)
        torch.manual_seed(1)
        first = take(TrainLoader(dataset, 5, num_workers=0), 3)
        assert torch.equal(torch.rand(3), expected)
        assert first == take(TrainLoader(dataset, 5, num_workers=0), 3)

    def test_processes_together_see_what_one_sees(self, folder, monkeypatch):
        alone = take(TrainLoader(folder, 10, num_workers=0), 4)
        monkeypatch.setattr("detectron2.utils.comm.get_world_size", lambda: 2)
        shares = []
        for rank in range(2):
            monkeypatch.setattr("detectron2.utils.comm.get_rank", lambda rank=rank: rank)
            shares.append(take(TrainLoader(folder, 10, num_workers=0), 4))
        for batch, first, second in zip(alone, *shares, strict=True):
            assert (batch[0::2], batch[1::2]) == (first, second)

    @pytest.mark.parametrize("num_workers", [0, 2])
    def test_processes_and_workers_share_the_shards(self, shards, monkeypatch, num_workers):
        dataset = shard_dataset(shards / "train-*.tar.gz")
        monkeypatch.setattr("detectron2.utils.comm.get_world_size", lambda: 2)
        seen = []
        for rank in range(2):
            monkeypatch.setattr("detectron2.utils.comm.get_rank", lambda rank=rank: rank)
            seen += chain(*take(TrainLoader(dataset, 10, num_workers), 2))
        assert sorted(seen) == list(range(0, 200, 10))

    def test_a_corrupt_image_is_replaced_and_the_others_keep_their_turn(self, shards):
        write_shard(shards / "broken.tar", [(f"{i:04d}", jpeg(10 * i), "0") for i in range(5)])
        whole = take(TrainLoader(shard_dataset(shards / "broken.tar", num_samples=5), 5, 0), 2)
        write_shard(
            shards / "broken.tar", [(f"{i:04d}", jpeg(10 * i) if i != 2 else b"x", "0") for i in range(5)]
        )
        dataset = shard_dataset(shards / "broken.tar", num_samples=5, on_corrupt="skip")
        batches = take(TrainLoader(dataset, 5, num_workers=0), 2)
        for expected, batch in zip(whole, batches, strict=True):
            assert 20 not in batch
            assert [b for a, b in zip(expected, batch, strict=True) if a != 20] == [
                a for a in expected if a != 20
            ]

    def test_a_shard_of_corrupt_images_ends(self, shards):
        write_shard(shards / "broken.tar", [(str(i), b"no image", "0") for i in range(5)])
        dataset = shard_dataset(shards / "broken.tar", num_samples=5, on_corrupt="skip")
        with pytest.raises(InputError, match="none of the images can be read"):
            take(TrainLoader(dataset, 5, num_workers=0), 1)

    def test_an_empty_shard_is_named(self, shards):
        write_shard(shards / "empty.tar", [])
        with pytest.raises(InputError, match=r"empty.tar: .*no samples"):
            take(TrainLoader(shard_dataset(shards / "empty.tar"), 5, num_workers=0), 1)
        with pytest.raises(InputError, match=r"empty.tar: no readable sample"):
            take(TrainLoader(shard_dataset(shards / "empty.tar", on_corrupt="skip"), 5, num_workers=0), 1)

    def test_a_wrong_number_of_samples_is_doubted(self, shards, caplog):
        dataset = shard_dataset(shards / "train-*.tar.gz", num_samples=100)
        take(TrainLoader(dataset, 10, num_workers=0), 4)
        assert "hold 20 samples, where num_samples=100 lets expect 100" in caplog.text

    def test_workers_beyond_the_shards_are_not_started(self, shards):
        loader = TrainLoader(shard_dataset(shards / "train-000000.tar.gz"), 5, num_workers=3)
        assert loader.num_workers == 1
        assert sorted(take(loader, 1)[0]) == [0, 10, 20, 30, 40]

    def test_impossible_batches(self, folder, shards, monkeypatch):
        with pytest.raises(InputError, match="exceeds the 20 training images"):
            TrainLoader(folder, 21)
        with pytest.raises(InputError, match="total_batch_size 0 is not"):
            TrainLoader(folder, 0)
        monkeypatch.setattr("detectron2.utils.comm.get_world_size", lambda: 8)
        with pytest.raises(InputError, match="total_batch_size 12 is not a multiple of the 8 processes"):
            TrainLoader(folder, 12)
        with pytest.raises(InputError, match="4 shards cannot feed 8 processes"):
            TrainLoader(shard_dataset(shards / "train-*.tar.gz"), 16)


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
