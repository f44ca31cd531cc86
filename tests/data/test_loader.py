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
from small_images import as_is, encoded, jpeg
from torch.utils.data import Subset
from torchvision.transforms import v2 as T

from rt_detectron.data.augmentation import ColorNoise
from rt_detectron.data.images import FolderDataset
from rt_detectron.data.loader import TrainLoader, build_test_loader, collate, in_order, share, to_device
from rt_detectron.data.shards import ShardDataset
from rt_detectron.utils.errors import InputError


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


class TestShardDataset:
    @pytest.mark.parametrize("num_workers", [0, 1, 2, 3])
    def test_evaluation_gives_every_sample_once(self, shards, num_workers):
        loader = build_test_loader(shard_dataset(shards / "train-*.tar.gz"), 4, num_workers)
        batches = list(loader)
        labels = torch.cat([labels for _, labels, _ in batches]).tolist()
        assert sorted(grey for images, _, _ in batches for grey in greys(images)) == list(range(0, 200, 10))
        assert sorted(labels) == sorted(2 * list(range(10)))
        assert any(key.endswith("train-000001.tar.gz: 0007") for _, _, keys in batches for key in keys)

    @pytest.mark.parametrize("images", [20, 10, 8, 3, 1])
    @pytest.mark.parametrize("world_size", [1, 2, 3, 8])
    def test_so_many_evenly_spaced_whatever_the_processes_and_workers(
        self, shards, monkeypatch, images, world_size
    ):
        dataset = shard_dataset(shards / "train-*.tar.gz")
        dataset.choose(images)
        assert len(dataset) == images
        seen, shares = [], []
        monkeypatch.setattr("detectron2.utils.comm.get_world_size", lambda: world_size)
        for rank in range(world_size):
            monkeypatch.setattr("detectron2.utils.comm.get_rank", lambda rank=rank: rank)
            mine = greys(image for image, _, _ in dataset)
            seen += mine
            shares.append(len(mine))
        expected = [10 * -(-i * 20 // images) for i in range(images)]
        assert sorted(seen) == expected
        assert max(shares) - min(shares) <= 1

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
        assert dataset.unreadable.count == 1

    def test_a_truncated_shard_stops_or_is_skipped(self, shards):
        whole = (shards / "train-000000.tar.gz").read_bytes()
        (shards / "train-000000.tar.gz").write_bytes(whole[: len(whole) // 2])
        with pytest.raises(InputError, match=r"train-000000.tar.gz: cannot be read"):
            list(shard_dataset(shards / "train-*.tar.gz"))
        dataset = shard_dataset(shards / "train-*.tar.gz", on_corrupt="skip")
        assert 15 <= len(list(dataset)) < 20
        assert dataset.unreadable.count == 1

    @pytest.mark.parametrize(
        ("samples", "words"),
        [
            ([("a", jpeg(1), "10")], r"a has the class '10'; num_classes=10 allows 0..9"),
            ([("a", jpeg(1), "cat")], r"class 'cat'"),
            ([("a", jpeg(1), None)], r"a lacks an image or its .cls, and has .jpg: KEY.jpg"),
            ([("a", None, "1")], r"a lacks an image or its .cls, and has .cls"),
            ([("photo.v1", jpeg(1), "1")], r"photo lacks .* has .v1.jpg, .v1.cls: .* with no dot in KEY"),
            ([("a", jpeg(1), None), ("b", jpeg(1), "1"), ("a", None, "1")], "a lacks .* side by side"),
            (
                [("a", jpeg(1), None), ("a", jpeg(1), "1")],
                r"x.tar: cannot be read \([^(]*duplicate file",
            ),
            ([], "no samples, KEY.jpg with KEY.cls"),
        ],
    )
    def test_bad_samples_are_one_line(self, tmp_path, samples, words):
        write_shard(tmp_path / "x.tar", samples)
        with pytest.raises(InputError, match=words) as error:
            list(shard_dataset(tmp_path / "x.tar"))
        assert "\n" not in str(error.value)

    def test_odd_members_are_passed_over_and_odd_names_read(self, tmp_path):
        """Hidden files of macOS, endings in capitals, other formats, names that are no UTF-8."""
        with tarfile.open(tmp_path / "x.tar", "w") as tar:
            webp = encoded(Image.new("RGB", (8, 8), (70, 70, 70)), "WEBP", lossless=True)
            for name, content in {
                "._a.jpg": b"junk",
                "a.JPG": jpeg(50),
                "a.CLS": b"1\n",
                "a.json": b"{}",
                "caf\udce9.webp": webp,
                "caf\udce9.cls": b"2",
            }.items():
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
        found = [(*greys([image]), label, key) for image, label, key in shard_dataset(tmp_path / "x.tar")]
        assert found == [(50, 1, f"{tmp_path}/x.tar: a"), (70, 2, f"{tmp_path}/x.tar: caf\\xe9")]

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

    @pytest.mark.parametrize("num_workers", [0, 2])
    def test_colour_noise_is_drawn_with_each_image_and_resumed_bit_by_bit(self, dataset, num_workers):
        """Of a batch's images, wherever it begins, in parts of it, and whenever it is finished."""
        loader = TrainLoader(dataset, 5, num_workers, 3, ColorNoise(0.4, 0.4, 0.4, lighting=0.1))

        def finished(start):
            batches = [images for (images, _, _), _ in zip(loader.batches(start), range(3), strict=False)]
            first = [to_device((images, torch.zeros(5)), torch.device("cpu"))[0] for images in batches]
            assert all(
                torch.equal(one[1::2], images[1::2].finish())
                for one, images in zip(first, batches, strict=True)
            )
            return first

        whole, resumed = finished(0), finished(2)
        assert torch.equal(whole[2], resumed[0])
        plain = next(TrainLoader(dataset, 5, num_workers, 3).batches())[0] / 255
        shifts = (whole[0] - plain).mean((1, 2, 3))
        assert len(set(shifts.tolist())) == 5  # each image has its own

    def test_processes_draw_the_same_colour_noise_as_one(self, folder, monkeypatch):
        noise = ColorNoise(0.4, 0.4, 0.4, lighting=0.1)
        alone = next(TrainLoader(folder, 10, 0, batch_transform=noise).batches())[0].finish()
        monkeypatch.setattr("detectron2.utils.comm.get_world_size", lambda: 2)
        for rank in range(2):
            monkeypatch.setattr("detectron2.utils.comm.get_rank", lambda rank=rank: rank)
            mine = next(TrainLoader(folder, 10, 0, batch_transform=noise).batches())[0].finish()
            torch.testing.assert_close(mine, alone[rank::2], rtol=0, atol=1e-6)

    @pytest.mark.parametrize(
        "wrong",
        [{"num_workers": -1}, {"num_workers": 1.0}, {"prefetch_factor": 0}, {"prefetch_factor": None}],
    )
    def test_wrong_numbers_are_one_line(self, folder, wrong):
        with pytest.raises(InputError, match=rf"{next(iter(wrong))} is .*a whole number >= [01]"):
            TrainLoader(folder, 5, **wrong)

    def test_memory_is_pinned_for_a_gpu_only(self, folder):
        assert TrainLoader(folder, 5, device="cuda:1").pin_memory
        assert not TrainLoader(folder, 5, device="cpu").pin_memory

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
        assert "hold 20 samples, but num_samples=100 means about 100" in caplog.text

    def test_workers_beyond_the_shards_are_not_started(self, shards):
        loader = TrainLoader(shard_dataset(shards / "train-000000.tar.gz"), 5, num_workers=3)
        assert loader.num_workers == 1
        assert sorted(take(loader, 1)[0]) == [0, 10, 20, 30, 40]

    def test_it_is_logged_how_many_shards_a_worker_has(self, shards, caplog, monkeypatch):
        caplog.set_level("INFO")
        dataset = shard_dataset(shards / "train-*.tar.gz")
        TrainLoader(dataset, 6, num_workers=3)
        assert "4 shards: 1 or 2 for each of 3 loader processes" in caplog.text
        monkeypatch.setattr("detectron2.utils.comm.get_world_size", lambda: 2)
        TrainLoader(dataset, 6, num_workers=3)
        assert "4 shards for 2 processes feed 2 of num_workers=3 each" in caplog.text
        assert "4 shards: 1 for each of 4 loader processes" in caplog.text

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


@pytest.mark.parametrize("images", [1, 2, 7, 20])
def test_processes_interleave_the_test_images_and_put_them_in_order(shards, monkeypatch, images):
    dataset = Subset(FolderDataset(str(shards_as_folder(shards)), 1, as_is), range(images))
    monkeypatch.setattr("detectron2.utils.comm.get_world_size", lambda: 3)
    gathered, counts = [], []
    for rank in range(3):
        monkeypatch.setattr("detectron2.utils.comm.get_rank", lambda rank=rank: rank)
        batches = list(build_test_loader(dataset, batch_size=2, num_workers=0))
        gathered.append([np.array(keys) for _, _, keys in batches])
        counts.append([share(first) for first in range(images + 1)])
        assert sum(map(len, gathered[rank])) == share(images)
    assert in_order(gathered).tolist() == [f"0/{i:04d}.jpg" for i in range(images)]
    assert [sum(row) for row in zip(*counts, strict=True)] == list(range(images + 1))


def shards_as_folder(shards):
    """The same images as files of a single class."""
    (shards / "folder" / "0").mkdir(parents=True)
    for i in range(20):
        (shards / "folder" / "0" / f"{i:04d}.jpg").write_bytes(jpeg(10 * i))
    return shards / "folder"


def test_images_of_two_sizes_are_named():
    samples = [(torch.zeros(3, 4, 4), 0, "a.jpg"), (torch.zeros(3, 4, 4), 1, "b.jpg")]
    images, labels, keys = collate(samples)
    assert (images.shape, labels.tolist(), list(keys)) == ((2, 3, 4, 4), [0, 1], ["a.jpg", "b.jpg"])
    with pytest.raises(InputError, match=r"a.jpg is 3x4x4 and c.jpg 3x4x5: end the transform in"):
        collate([*samples, (torch.zeros(3, 4, 5), 1, "c.jpg")])


def test_colours_that_lie_side_by_side_stay_so():
    decoded = [torch.randint(0, 256, (4, 5, 3), dtype=torch.uint8).permute(2, 0, 1) for _ in range(3)]
    images, labels, _, extra = collate([(image, 1, "a", torch.ones(2)) for image in decoded])
    assert torch.equal(images, torch.stack(decoded))
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert (labels.tolist(), extra.shape) == ([1, 1, 1], (3, 2))
    assert to_device((images, labels), torch.device("cpu"))[0].is_contiguous()  # as networks take them


def test_normalised_images_are_one_line():
    with pytest.raises(InputError, match="leave normalisation to the model"):
        to_device((torch.randn(2, 3, 4, 4), torch.zeros(2)), torch.device("cpu"))


def test_a_batch_goes_to_the_device_with_or_without_keys():
    images, labels = torch.randint(0, 256, (6, 3, 4, 4), dtype=torch.uint8), torch.arange(6)
    keys = [f"0/{i}.png" for i in range(6)]
    for batch in ((images, labels), (images, labels, keys), [images / 255, labels, keys]):
        found, found_labels = to_device(batch, torch.device("cpu"))
        assert found.dtype == torch.float32
        assert torch.equal(found, images / 255)
        assert torch.equal(found_labels, labels)
    assert to_device((images, labels), torch.device("meta"))[0].is_meta
