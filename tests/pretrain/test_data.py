import io
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2 as T

from rt_detectron.errors import InputError
from rt_detectron.pretrain.data import (
    FolderDataset,
    Lighting,
    ShardDataset,
    build_test_loader,
    build_train_loader,
)

to_tensor = T.PILToTensor()


def jpeg(value: int) -> bytes:
    """A grey 8x8 JPEG; its grey value tells the images apart."""
    buffer = io.BytesIO()
    Image.fromarray(np.full((8, 8, 3), value, np.uint8)).save(buffer, "JPEG", quality=100)
    return buffer.getvalue()


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
def shards(tmp_path):
    """Four shards of five images; image i has the grey value 10*i and the class i % 10."""
    for shard in range(4):
        numbers = range(5 * shard, 5 * shard + 5)
        write_shard(
            tmp_path / f"train-{shard:06d}.tar.gz", [(f"{i:04d}", jpeg(10 * i), str(i % 10)) for i in numbers]
        )
    return tmp_path


def shard_dataset(urls, training=False, **kwargs):
    return ShardDataset(
        str(urls), num_samples=20, num_classes=10, transform=to_tensor, training=training, **kwargs
    )


def greys(images):
    return [round(image.float().mean().item()) for image in images]


class TestFolderDataset:
    @pytest.fixture
    def folder(self, tmp_path):
        for name, value in (("cat", 50), ("dog", 100)):
            (tmp_path / name).mkdir()
            for i in range(3):
                (tmp_path / name / f"{i}.jpg").write_bytes(jpeg(value + i))
        return tmp_path

    def test_classes_are_the_sorted_folders(self, folder):
        dataset = FolderDataset(str(folder), 2, to_tensor)
        assert [label for _, label in dataset] == [0, 0, 0, 1, 1, 1]
        assert greys(image for image, _ in dataset) == [50, 51, 52, 100, 101, 102]

    def test_a_corrupt_image_stops_or_is_skipped_and_counted(self, folder):
        (folder / "cat" / "1.jpg").write_bytes(b"\xff\xd8\xff no image")
        with pytest.raises(InputError, match=r"cat/1.jpg: cannot be read .*on_corrupt=skip"):
            FolderDataset(str(folder), 2, to_tensor)[1]
        dataset = FolderDataset(str(folder), 2, to_tensor, on_corrupt="skip")
        assert greys([dataset[1][0]]) == [52]
        assert dataset.corrupt.count == 1

    def test_a_truncated_image_is_corrupt(self, folder):
        (folder / "cat" / "1.jpg").write_bytes(jpeg(9)[:-40])
        with pytest.raises(InputError, match="truncated"):
            FolderDataset(str(folder), 2, to_tensor)[1]

    def test_bad_folders(self, folder, tmp_path):
        (tmp_path / "empty").mkdir()
        with pytest.raises(InputError, match="no such folder"):
            FolderDataset(str(tmp_path / "nowhere"), 2, to_tensor)
        with pytest.raises(InputError, match="expected class folders"):
            FolderDataset(str(tmp_path / "empty"), 2, to_tensor)
        (tmp_path / "empty").rmdir()
        with pytest.raises(InputError, match="has 2 class folders, but num_classes is 3"):
            FolderDataset(str(folder), 3, to_tensor)


class TestShardDataset:
    @pytest.mark.parametrize("num_workers", [0, 1, 2, 3])
    def test_evaluation_gives_every_sample_once(self, shards, num_workers):
        loader = build_test_loader(shard_dataset(shards / "train-*.tar.gz"), 4, num_workers)
        batches = list(loader)
        labels = torch.cat([labels for _, labels in batches]).tolist()
        assert sorted(grey for images, _ in batches for grey in greys(images)) == [10 * i for i in range(20)]
        assert sorted(labels) == sorted(2 * list(range(10)))

    def test_brace_ranges_are_expanded(self, shards):
        assert len(shard_dataset(shards / "train-{000000..000003}.tar.gz").urls) == 4

    @pytest.mark.parametrize("num_workers", [0, 2])
    def test_training_never_ends_and_every_epoch_is_the_whole_set_in_another_order(self, shards, num_workers):
        loader = build_train_loader(shard_dataset(shards / "train-*.tar.gz", training=True), 10, num_workers)
        stream = iter(loader)
        epochs = [[grey for _ in range(2) for grey in greys(next(stream)[0])] for _ in range(3)]
        assert epochs[0] != epochs[1]
        assert epochs[0] != sorted(epochs[0])
        if num_workers == 0:
            assert all(sorted(epoch) == [10 * i for i in range(20)] for epoch in epochs)

    def test_the_order_follows_the_seed(self, shards):
        def first(seed):
            dataset = shard_dataset(shards / "train-*.tar.gz", training=True, seed=seed)
            return greys(next(iter(build_train_loader(dataset, 20, 0)))[0])

        assert first(1) == first(1)
        assert first(1) != first(2)

    def test_a_corrupt_jpeg_stops_or_is_skipped_and_counted_across_workers(self, shards):
        write_shard(
            shards / "train-000004.tar.gz", [("bad", b"\xff\xd8\xff no image", "3"), ("good", jpeg(200), "3")]
        )
        with pytest.raises(InputError, match=r"bad: cannot be read .*on_corrupt=skip"):
            list(shard_dataset(shards / "train-000004.tar.gz"))
        dataset = shard_dataset(shards / "train-*.tar.gz", on_corrupt="skip")
        batches = list(build_test_loader(dataset, 4, num_workers=2))
        assert sum(len(labels) for _, labels in batches) == 21
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
            ([], "no readable sample"),
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

    def test_workers_beyond_the_shards_are_not_started(self, shards):
        dataset = shard_dataset(shards / "train-000000.tar.gz", training=True)
        loader = build_train_loader(dataset, 5, num_workers=3)
        assert loader.num_workers == 1
        assert sorted(greys(next(iter(loader))[0])) == [0, 10, 20, 30, 40]


def test_the_unknown_policy_is_refused(shards):
    with pytest.raises(InputError, match="use 'stop' or 'skip'"):
        shard_dataset(shards / "train-*.tar.gz", on_corrupt="ignore")


def test_a_batch_larger_than_the_set_is_refused(shards):
    with pytest.raises(InputError, match="exceeds the 20 training images"):
        build_train_loader(shard_dataset(shards / "train-*.tar.gz", training=True), 21)


class TestLighting:
    def test_shifts_the_whole_image_by_one_colour(self):
        torch.manual_seed(0)
        shift = Lighting(0.5)(torch.full((3, 4, 4), 0.5)) - 0.5
        assert torch.allclose(shift, shift[:, :1, :1].expand_as(shift))
        assert shift.abs().max() > 0.01

    def test_the_colours_have_the_covariance_of_the_eigenvectors(self):
        torch.manual_seed(0)
        shifts = torch.stack([Lighting(0.1)(torch.full((3, 1, 1), 0.5)).flatten() - 0.5 for _ in range(4000)])
        vectors, values = Lighting.EIGENVECTORS, Lighting.EIGENVALUES
        expected = vectors @ torch.diag((0.1 * values) ** 2) @ vectors.T
        assert torch.allclose(torch.cov(shifts.T), expected, atol=3e-5)
