"""The transfer sets in their true layouts on disk, a few images each, against torchvision's own reading."""

import hashlib
import json
import logging
import os
import pickle
import re
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat
from torch.utils.data import default_collate
from torchvision import datasets as tv
from torchvision.transforms import v2 as T
from torchvision.transforms.v2.functional import pil_to_tensor

from rt_detectron.data.loader import TrainLoader, build_test_loader
from rt_detectron.transfer import sets
from rt_detectron.transfer.datasets import classification_dataset
from rt_detectron.transfer.sets import TRANSFER_SETS
from rt_detectron.utils.errors import InputError

REPOSITORY = Path(__file__).parents[2]
MODES = ("RGB", "L", "CMYK")  # web images are of all three


def picture(path: Path) -> None:
    """A JPEG of pixels that follow from its path, so that no two are alike, in each of the modes by turns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    seed = int(hashlib.sha256(str(path)[-40:].encode()).hexdigest()[:8], 16)
    pixels = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(MODES[seed % 3]).save(path, "JPEG", quality=95)


def pictures(folder: Path, names) -> None:
    for name in names:
        picture(folder / name)


def lines(path: Path, *content: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(line + "\n" for line in content))


def mat(path: Path, **variables) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    savemat(path, variables)


def md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest()


def write_aircraft(root: Path, patch) -> None:
    data = root / "fgvc-aircraft-2013b" / "data"
    lines(data / "variants.txt", "707-320", "A300B4 mod")
    lines(data / "images_variant_trainval.txt", "003 A300B4 mod", "001 707-320", "002 707-320")
    lines(data / "images_variant_test.txt", "004 707-320", "005 A300B4 mod")
    pictures(data / "images", [f"00{i}.jpg" for i in range(1, 6)])


def write_birdsnap(root: Path, patch) -> None:
    folder = root / "birdsnap"
    lines(folder / "test_images.txt", "path", "Blue_Jay/2.jpg", "Brant/5.jpg", "Brant/gone.jpg")
    pictures(folder / "download" / "images", [f"Blue_Jay/{i}.jpg" for i in range(3)])
    pictures(folder / "download" / "images", [f"Brant/{i}.jpg" for i in (2, 5, 6)])


def write_caltech101(root: Path, patch) -> None:
    folder = root / "caltech101" / "101_ObjectCategories"
    for name, count in (("BACKGROUND_Google", 1), ("accordion", 33), ("Faces", 31)):
        pictures(folder / name, [f"image_{i:04d}.jpg" for i in range(1, count + 1)])


def write_caltech256(root: Path, patch) -> None:
    folder = root / "caltech256" / "256_ObjectCategories"
    for number, name, count in ((1, "001.ak47", 62), (2, "002.american-flag", 65)):
        pictures(folder / name, [f"{number:03d}_{i:04d}.jpg" for i in range(1, count + 1)])
    lines(folder / "002.american-flag" / "RENAME2", "as in the published archive")


def write_cars(root: Path, patch) -> None:
    folder = root / "stanford_cars"
    columns = [("fname", object), ("class", np.uint8)]
    train = np.array([("1.jpg", 2), ("2.jpg", 1), ("3.jpg", 2)], columns)
    test = np.array([("1.jpg", 1), ("2.jpg", 2)], columns)
    mat(folder / "devkit" / "cars_train_annos.mat", annotations=train)
    mat(folder / "devkit" / "cars_meta.mat", class_names=np.array(["AM General Hummer", "Audi R8"], object))
    mat(folder / "cars_test_annos_withlabels.mat", annotations=test)
    pictures(folder / "cars_train", [f"{i}.jpg" for i in (1, 2, 3)])
    pictures(folder / "cars_test", [f"{i}.jpg" for i in (1, 2)])


def write_cifar(root: Path, patch, torchvision_class, meta: dict, key: str, batches: list) -> None:
    folder = root / torchvision_class.base_folder
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    sums = {}
    for name, labels in batches:
        pixels = generator.integers(0, 256, (len(labels), 3072), dtype=np.uint8)
        (folder / name).write_bytes(pickle.dumps({"data": pixels, key: labels}))
        sums[name] = md5(folder / name)
    file = folder / torchvision_class.meta["filename"]
    file.write_bytes(pickle.dumps(meta))
    patch.setattr(torchvision_class, "meta", {**torchvision_class.meta, "md5": md5(file)})
    train = [[name, sums[name]] for name, _ in batches[:-1]]
    patch.setattr(torchvision_class, "train_list", train)
    patch.setattr(torchvision_class, "test_list", [[batches[-1][0], sums[batches[-1][0]]]])


def write_cifar10(root: Path, patch) -> None:
    batches = [(f"data_batch_{i}", [i % 3, (i + 1) % 3]) for i in range(1, 6)] + [("test_batch", [2, 0, 1])]
    write_cifar(root, patch, tv.CIFAR10, {"label_names": ["plane", "auto", "bird"]}, "labels", batches)


def write_cifar100(root: Path, patch) -> None:
    batches = [("train", [0, 1, 1, 0]), ("test", [1, 0])]
    meta = {"fine_label_names": ["apple", "fish"], "coarse_label_names": ["food"]}
    write_cifar(root, patch, tv.CIFAR100, meta, "fine_labels", batches)


def write_dtd(root: Path, patch) -> None:
    folder = root / "dtd" / "dtd"
    split = {"train": (1, 2), "val": (3,), "test": (4, 5)}
    for name, numbers in split.items():
        listed = [f"{c}/{c}_{i:04d}.jpg" for c in ("banded", "woven") for i in numbers]
        lines(folder / "labels" / f"{name}1.txt", *listed)
        lines(folder / "labels" / f"{name}2.txt")  # another partition, not to be taken
        pictures(folder / "images", listed)


def write_flowers(root: Path, patch) -> None:
    folder = root / "flowers-102"
    mat(folder / "imagelabels.mat", labels=np.array([[1, 77, 1, 77, 1, 77, 102]], np.uint8))
    mat(folder / "setid.mat", trnid=[[4, 1]], valid=[[3, 2]], tstid=[[5, 7, 6]])
    pictures(folder / "jpg", [f"image_{i:05d}.jpg" for i in range(1, 8)])
    files = {"label": "imagelabels.mat", "setid": "setid.mat"}
    sums = {key: (name, md5(folder / name)) for key, name in files.items()}
    patch.setattr(tv.Flowers102, "_file_dict", {**tv.Flowers102._file_dict, **sums})


def write_food101(root: Path, patch) -> None:
    folder = root / "food-101"
    for split, numbers in (("train", (7, 3, 5)), ("test", (4, 9))):
        listed = {name: [f"{name}/{i}" for i in numbers] for name in ("waffles", "apple_pie")}
        lines(folder / "meta" / f"{split}.json", json.dumps(listed))
        pictures(folder / "images", [f"{image}.jpg" for images in listed.values() for image in images])


def write_pets(root: Path, patch) -> None:
    folder = root / "oxford-iiit-pet"
    listed = {"trainval": ("Abyssinian_1 1 1 1", "great_pyrenees_2 2 2 1", "Abyssinian_3 1 1 1")}
    listed["test"] = ("great_pyrenees_4 2 2 1", "Abyssinian_5 1 1 1")
    for split, content in listed.items():
        lines(folder / "annotations" / f"{split}.txt", *content)
        pictures(folder / "images", [f"{line.split()[0]}.jpg" for line in content])


def write_sun397(root: Path, patch) -> None:
    folder = root / "SUN397"
    lines(folder / "ClassName.txt", "/a/abbey", "/a/apartment_building/outdoor")
    pictures(folder / "a" / "abbey", [f"sun_a{i:03d}.jpg" for i in range(100)])
    pictures(folder / "a" / "apartment_building" / "outdoor", [f"sun_b{i:03d}.jpg" for i in range(107)])


class Birds:
    """Birdsnap by torchvision's ImageFolder and a plain loop."""

    def __init__(self, root: Path, test: bool):
        everything = tv.ImageFolder(root / "birdsnap" / "download" / "images")
        listed = (root / "birdsnap" / "test_images.txt").read_text().splitlines()[1:]
        self.classes = everything.classes
        self.items = [
            everything[i]
            for i, (path, _) in enumerate(everything.samples)
            if ("/".join(Path(path).parts[-2:]) in listed) == test
        ]

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index]


# What writes the set, and torchvision's own data sets that make up its training and its test images; for one
# without a division the first holds everything.
REFERENCES = {
    "aircraft": (
        write_aircraft,
        lambda root: [tv.FGVCAircraft(root, split="trainval")],
        lambda root: [tv.FGVCAircraft(root, split="test")],
    ),
    "birdsnap": (write_birdsnap, lambda root: [Birds(root, False)], lambda root: [Birds(root, True)]),
    "caltech101": (write_caltech101, lambda root: [tv.Caltech101(root)], None),
    "caltech256": (write_caltech256, lambda root: [tv.Caltech256(root)], None),
    "cars": (
        write_cars,
        lambda root: [tv.StanfordCars(root, split="train")],
        lambda root: [tv.StanfordCars(root, split="test")],
    ),
    "cifar10": (write_cifar10, lambda root: [tv.CIFAR10(root, True)], lambda root: [tv.CIFAR10(root, False)]),
    "cifar100": (
        write_cifar100,
        lambda root: [tv.CIFAR100(root, True)],
        lambda root: [tv.CIFAR100(root, False)],
    ),
    "dtd": (
        write_dtd,
        lambda root: [tv.DTD(root, split="train", partition=1), tv.DTD(root, split="val", partition=1)],
        lambda root: [tv.DTD(root, split="test", partition=1)],
    ),
    "flowers": (
        write_flowers,
        lambda root: [tv.Flowers102(root, split="train"), tv.Flowers102(root, split="val")],
        lambda root: [tv.Flowers102(root, split="test")],
    ),
    "food101": (
        write_food101,
        lambda root: [tv.Food101(root, split="train")],
        lambda root: [tv.Food101(root, split="test")],
    ),
    "pets": (
        write_pets,
        lambda root: [tv.OxfordIIITPet(root, split="trainval")],
        lambda root: [tv.OxfordIIITPet(root, split="test")],
    ),
    "sun397": (write_sun397, lambda root: [tv.SUN397(root)], None),
}
DRAWN = {"caltech101": (30, {3, 1}), "caltech256": (60, {2, 5}), "sun397": (50, {50})}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """All twelve sets."""
    folder = tmp_path_factory.mktemp("datasets")
    with pytest.MonkeyPatch.context() as patch:
        for write, *_ in REFERENCES.values():
            write(folder, patch)
        yield folder


def items(parts) -> list[tuple[bytes, int]]:
    """Pixels and labels of torchvision's (PIL image, label), always RGB."""
    return [
        (pil_to_tensor(image.convert("RGB")).numpy().tobytes(), int(label))
        for part in parts
        for image, label in (part[i] for i in range(len(part)))
    ]


def own_items(dataset) -> list[tuple[bytes, int]]:
    for image, label, _ in (dataset[i] for i in range(len(dataset))):
        assert image.dtype == torch.uint8
        assert image.shape[0] == 3
        assert type(label) is int
    return [(dataset[i][0].numpy().tobytes(), dataset[i][1]) for i in range(len(dataset))]


class TestTheTwelve:
    def test_are_those_of_the_publication(self):
        assert TRANSFER_SETS.keys() == {*REFERENCES, "folder", "shards"}

    @pytest.mark.parametrize("name", sorted(REFERENCES.keys() - DRAWN.keys()))
    @pytest.mark.parametrize("split", ["train", "test"])
    def test_hold_what_torchvision_reads_in_its_order(self, root, name, split):
        parts = REFERENCES[name][1 if split == "train" else 2](root)
        dataset = classification_dataset(name, split, root=str(root))
        assert own_items(dataset) == items(parts)
        assert dataset.labels == [label for _, label in items(parts)]
        assert dataset.classes == list(parts[0].classes)
        assert dataset.name == name

    @pytest.mark.parametrize("name", DRAWN)
    def test_without_a_division_get_a_fixed_one_of_the_usual_size(self, root, name):
        (everything,) = REFERENCES[name][1](root)
        train, test = (classification_dataset(name, split, root=str(root)) for split in ("train", "test"))
        assert train.classes == list(getattr(everything, "classes", None) or everything.categories)
        num_train, num_test = DRAWN[name]
        assert set(Counter(train.labels).values()) == {num_train}
        assert set(Counter(test.labels).values()) == num_test
        chosen = own_items(train) + own_items(test)
        assert len(set(chosen)) == len(chosen)
        assert set(chosen) <= set(items([everything]))
        again = classification_dataset(name, "train", root=str(root))
        assert again.keys == train.keys

    def test_a_drawn_division_does_not_depend_on_the_root_and_mixes(self, root, tmp_path):
        write_caltech101(tmp_path / "elsewhere", None)
        here, there = (
            classification_dataset("caltech101", "train", root=str(folder))
            for folder in (root, tmp_path / "elsewhere")
        )
        assert here.keys == there.keys
        numbers = [
            int(re.search(r"accordion/image_(\d+)", key)[1]) for key in here.keys if "accordion" in key
        ]
        assert sorted(numbers) != list(range(1, 31))

    @pytest.mark.parametrize("name", REFERENCES)
    def test_have_keys_that_name_one_image_each_below_the_root(self, root, name):
        datasets = [classification_dataset(name, split, root=str(root)) for split in ("train", "test")]
        keys = [key for dataset in datasets for key in dataset.keys]
        assert len(set(keys)) == len(keys)
        assert datasets[0][1][2] == datasets[0].keys[1]
        if "cifar" not in name:
            assert all((root / key).is_file() for key in keys)

    def test_are_scored_as_in_the_literature(self, root):
        per_class = {"aircraft", "caltech101", "caltech256", "flowers", "pets"}
        for name in REFERENCES:
            metric = classification_dataset(name, "test", root=str(root)).metric
            assert metric == ("mean_per_class" if name in per_class else "top1"), name

    def test_say_so_where_images_are_missing(self, root, caplog):
        with caplog.at_level(logging.WARNING):
            classification_dataset("birdsnap", "test", root=str(root))
        assert "2 images for test, where the literature has 2443" in caplog.text

    def test_labels_need_no_image(self, root, tmp_path):
        write_pets(tmp_path, None)
        for file in (tmp_path / "oxford-iiit-pet" / "images").iterdir():
            file.write_bytes(b"")
        assert classification_dataset("pets", "test", root=str(tmp_path)).labels == [1, 0]

    def test_are_in_the_readme(self):
        """Its table repeats what TRANSFER_SETS says."""
        text = (REPOSITORY / "datasets" / "README.md").read_text()
        words = {"mean_per_class": "mean per class", "top1": "top-1"}
        for name in REFERENCES:
            entry = TRANSFER_SETS[name]
            row = next(line for line in text.splitlines() if line.startswith(f"| `{name}` |"))
            cells = [cell.strip() for cell in row.split("|")]
            assert f"`{entry.folder}/`" in cells[2], name
            assert cells[4:7] == [
                words[entry.metric],
                str(entry.num_classes),
                "{:,} / {:,}".format(*entry.sizes),
            ], name


class TestSplits:
    @pytest.fixture
    def folder(self, tmp_path):
        """An ImageFolder tree with 10, 2 and 1 training images of its classes."""
        for name, count in (("cat", 10), ("dog", 2), ("emu", 1)):
            pictures(tmp_path / "train" / name, [f"{i}.jpg" for i in range(count)])
            pictures(tmp_path / "val" / name, ["a.jpg"])
        return tmp_path

    def test_fit_and_held_out_divide_each_class_of_train(self, folder):
        train, fit, held_out = (
            classification_dataset("folder", split, root=str(folder))
            for split in ("train", "fit", "held_out")
        )
        assert Counter(held_out.labels) == {0: 2, 1: 1}
        assert Counter(fit.labels) == {0: 8, 1: 1, 2: 1}
        assert sorted(fit.keys + held_out.keys) == sorted(train.keys)
        assert held_out.classes == train.classes == ["cat", "dog", "emu"]
        assert classification_dataset("folder", "held_out", root=str(folder)).keys == held_out.keys

    def test_few_images_of_each_class_are_always_the_same(self, folder):
        whole, few, fit, held_out, test = (
            classification_dataset("folder", split, root=str(folder), per_class=number)
            for split, number in (("train", None), ("train", 4), ("fit", 4), ("held_out", 4), ("test", 1))
        )
        assert max(Counter(few.labels).values()) == 4
        assert set(few.keys) < set(whole.keys)
        assert sorted(fit.keys + held_out.keys) == sorted(few.keys)
        assert len(test) == len(classification_dataset("folder", "test", root=str(folder)))

    def test_the_literatures_test_images_are_held_out_of_both(self, root):
        fit, held_out, test = (
            classification_dataset("sun397", split, root=str(root)) for split in ("fit", "held_out", "test")
        )
        assert (len(fit), len(held_out), len(test)) == (80, 20, 100)
        assert not set(fit.keys + held_out.keys) & set(test.keys)

    def test_test_is_preferred_to_val(self, folder):
        assert classification_dataset("folder", "test", root=str(folder)).keys[0] == "val/cat/a.jpg"
        for name in ("cat", "dog", "emu"):
            picture(folder / "test" / name / "b.jpg")
        assert classification_dataset("folder", "test", root=str(folder)).keys[0] == "test/cat/b.jpg"

    def test_folders_that_disagree_on_the_classes_are_refused(self, folder):
        picture(folder / "train" / "fox" / "0.jpg")
        with pytest.raises(InputError, match="has the class 'fox'"):
            classification_dataset("folder", "test", root=str(folder))


class TestClasses:
    @pytest.mark.parametrize("classes", [[2, 0], ["bird", "plane"], ["bird", 0]])
    def test_are_renumbered_in_the_order_given(self, root, classes):
        everything = classification_dataset("cifar10", "train", root=str(root))
        dataset = classification_dataset("cifar10", "train", root=str(root), classes=classes)
        assert dataset.classes == ["bird", "plane"]
        expected = [
            (key, {2: 0, 0: 1}[y])
            for key, y in zip(everything.keys, everything.labels, strict=True)
            if y != 1
        ]
        assert list(zip(dataset.keys, dataset.labels, strict=True)) == expected

    @pytest.mark.parametrize(
        ("classes", "message"),
        [
            (["brid"], r"cifar10 has no class 'brid';.*0\.\.2; did you mean bird\?"),
            ([3], r"no class 3; .*0\.\.2"),
            ([-1], "no class -1"),
            ([1.0], r"no class 1\.0"),
            ([0, "plane"], "none of them twice"),
            ([], "at least one"),
        ],
    )
    def test_bad_ones_are_one_line(self, root, classes, message):
        with pytest.raises(InputError, match=message):
            classification_dataset("cifar10", "train", root=str(root), classes=classes)


class TestImages:
    def test_are_downscaled_before_the_transform(self, tmp_path, photograph):
        for split in ("train", "test"):
            (tmp_path / split / "a").mkdir(parents=True)
            T.functional.to_pil_image(photograph).save(tmp_path / split / "a" / "0.png")
        up = T.Resize(48)
        (image, _, _) = classification_dataset("folder", "test", str(tmp_path), transform=up, downscale=32)[0]
        assert image.shape == (3, 48, 63)  # 96 x 128 by way of 32 x 42
        torch.testing.assert_close(image, up(T.Resize(32, antialias=True)(photograph)), rtol=0, atol=0)
        (small, _, _) = classification_dataset("folder", "test", str(tmp_path), downscale=200)[0]
        torch.testing.assert_close(small, photograph, rtol=0, atol=0)

    def test_feed_the_loaders_of_pretraining(self, root):
        dataset = classification_dataset("sun397", "fit", str(root), transform=T.RandomHorizontalFlip())
        images, labels, keys = next(iter(TrainLoader(dataset, 16, num_workers=0, seed=1)))
        assert images.shape == (16, 3, 6, 8)
        by_key = dict(zip(dataset.keys, dataset.labels, strict=True))
        assert [by_key[key] for key in keys] == labels.tolist()
        batches = list(build_test_loader(dataset, 32, num_workers=1))
        assert [key for _, _, keys in batches for key in keys] == dataset.keys

    def test_a_truncated_one_is_named(self, tmp_path):
        write_cars(tmp_path, None)
        file = tmp_path / "stanford_cars" / "cars_test" / "2.jpg"
        file.write_bytes(file.read_bytes()[:200])
        dataset = classification_dataset("cars", "test", root=str(tmp_path))
        dataset[0]
        with pytest.raises(InputError, match=r"cars: stanford_cars/cars_test/2\.jpg cannot be read"):
            dataset[1]
        file.unlink()
        with pytest.raises(InputError, match=r"cars_test/2\.jpg cannot be read .*No such file"):
            dataset[1]
        with pytest.raises(IndexError):
            dataset[2]


class TestBadInput:
    def test_an_unknown_name(self):
        with pytest.raises(InputError, match=r"unknown data set 'cifar';.*sun397.*; did you mean .*cifar10"):
            classification_dataset("cifar", "train")

    def test_an_unknown_split(self, root):
        with pytest.raises(InputError, match="unknown split 'val' of pets: train, test, fit, held_out"):
            classification_dataset("pets", "val", root=str(root))

    def test_an_impossible_size(self, root):
        with pytest.raises(InputError, match="downscale is 0"):
            classification_dataset("pets", "test", root=str(root), downscale=0)
        with pytest.raises(InputError, match="per_class is 0"):
            classification_dataset("pets", "test", root=str(root), per_class=0)

    @pytest.mark.parametrize("name", REFERENCES)
    def test_a_missing_set_is_one_line_and_leaves_nothing(self, tmp_path, name):
        with pytest.raises(InputError) as caught:
            classification_dataset(name, "train", root=str(tmp_path))
        (line,) = str(caught.value).splitlines()
        assert f"{name} is not in {tmp_path}: expected {tmp_path}/{TRANSFER_SETS[name].folder}/" in line
        assert "datasets/README.md" in line
        assert ("dataset.download=true" in line) == (name not in ("birdsnap", "cars"))
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize(("name", "reason"), [("cars", "links are dead"), ("birdsnap", "from Flickr")])
    def test_what_cannot_be_downloaded_says_so(self, tmp_path, name, reason):
        with pytest.raises(InputError, match=f"not to be downloaded here, .*{reason}"):
            classification_dataset(name, "train", root=str(tmp_path), download=True)

    def test_a_failing_download_is_one_line(self, tmp_path, monkeypatch):
        monkeypatch.setattr(tv.DTD, "_URL", "http://127.0.0.1:9/dtd.tar.gz")  # nobody listens there
        with pytest.raises(InputError, match=r"dtd in .* cannot be downloaded \(.*refused") as caught:
            classification_dataset("dtd", "train", root=str(tmp_path), download=True)
        assert "\n" not in str(caught.value)

    def test_a_download_is_torchvisions(self, tmp_path, monkeypatch):
        monkeypatch.setattr(tv.OxfordIIITPet, "_download", lambda self: write_pets(Path(self.root), None))
        assert len(classification_dataset("pets", "train", root=str(tmp_path), download=True)) == 3

    def test_a_set_without_its_lists(self, root, tmp_path):
        write_aircraft(tmp_path, None)
        (tmp_path / "fgvc-aircraft-2013b" / "data" / "images_variant_test.txt").unlink()
        with pytest.raises(InputError, match=r"aircraft in .* cannot be read \(.*variant_test.*expected"):
            classification_dataset("aircraft", "test", root=str(tmp_path))

    def test_a_damaged_mat_file(self, tmp_path):
        write_cars(tmp_path, None)
        (tmp_path / "stanford_cars" / "devkit" / "cars_train_annos.mat").write_bytes(b"no mat" * 50)
        with pytest.raises(InputError, match=r"cars in .* cannot be read"):
            classification_dataset("cars", "train", root=str(tmp_path))

    @pytest.mark.parametrize("file", ["data_batch_3", "test_batch", "batches.meta"])
    def test_cifar_that_is_not_the_published_is_never_unpickled(self, tmp_path, monkeypatch, file):
        write_cifar10(tmp_path, monkeypatch)

        class Bomb:
            def __reduce__(self):
                return os.mkdir, (str(tmp_path / "exploded"),)

        (tmp_path / "cifar-10-batches-py" / file).write_bytes(pickle.dumps(Bomb()))
        with pytest.raises(InputError, match=r"cifar10 in .* cannot be read .*corrupted"):
            classification_dataset("cifar10", "train", root=str(tmp_path))
        assert not (tmp_path / "exploded").exists()

    def test_parts_that_disagree_on_the_classes(self, tmp_path):
        write_dtd(tmp_path, None)
        path = tmp_path / "dtd" / "dtd" / "labels" / "val1.txt"
        lines(path, "banded/banded_0003.jpg")
        with pytest.raises(InputError, match=r"dtd in .* different classes"):
            classification_dataset("dtd", "train", root=str(tmp_path))

    def test_a_folder_that_is_no_tree(self, tmp_path):
        with pytest.raises(InputError, match=r"train: no such folder.*README"):
            classification_dataset("folder", "train", root=str(tmp_path))
        with pytest.raises(InputError, match="folder is not in"):
            classification_dataset("folder", "train", root=str(tmp_path / "nowhere"))


def write_shard(path: Path, samples: dict[str, tuple[bytes, str]]) -> None:
    with tarfile.open(path, "w") as tar:
        for key, (image, label) in samples.items():
            for ending, content in (("jpg", image), ("cls", label.encode())):
                (path.parent / "member").write_bytes(content)
                tar.add(path.parent / "member", f"{key}.{ending}")
    (path.parent / "member").unlink()


class TestShards:
    @pytest.fixture
    def shards(self, tmp_path):
        """Two training shards and one for tests, and files that are neither."""
        pictures(tmp_path, [f"{i}.jpg" for i in range(7)])
        images = [(tmp_path / f"{i}.jpg").read_bytes() for i in range(7)]
        folder = tmp_path / "set"
        folder.mkdir()
        write_shard(folder / "carnival-train-0.tar", {"a": (images[0], "2"), "b": (images[1], "0")})
        write_shard(folder / "carnival-train-1.tar", {"c": (images[2], "0"), "d": (images[3], "2\n")})
        write_shard(folder / "carnival-val-0.tar", {"a": (images[4], "1"), "e": (images[5], "0")})
        lines(folder / "train.json", "{}")
        return folder, images

    def test_become_map_style(self, shards):
        folder, _ = shards
        train, test = (
            classification_dataset("shards", split, root=str(folder)) for split in ("train", "test")
        )
        assert train.labels == [2, 0, 0, 2]
        assert test.labels == [1, 0]
        assert train.classes == test.classes == ["0", "1", "2"]
        assert train.keys[3] == "carnival-train-1.tar: d"
        assert default_collate([train[3]])[0].shape == (1, 3, 6, 8)
        reference = pil_to_tensor(Image.open(folder.parent / "3.jpg").convert("RGB"))
        torch.testing.assert_close(train[3][0], reference, rtol=0, atol=0)

    def test_are_read_once(self, shards, monkeypatch):
        folder, _ = shards
        count = Counter()
        read = sets.ShardDataset.read

        def counting(self, urls):
            count.update(urls)
            return read(self, urls)

        monkeypatch.setattr(sets.ShardDataset, "read", counting)
        for split in ("train", "test", "held_out"):
            classification_dataset("shards", split, root=str(folder))
        assert set(count.values()) == {1}
        write_shard(folder / "carnival-val-0.tar", {"z": ((folder.parent / "6.jpg").read_bytes(), "2")})
        assert classification_dataset("shards", "test", root=str(folder)).labels == [2]

    def test_bad_ones_are_named(self, shards):
        folder, images = shards
        write_shard(folder / "carnival-val-0.tar", {"a": (images[0][:100], "1")})
        dataset = classification_dataset("shards", "test", root=str(folder))
        with pytest.raises(InputError, match=r"shards: carnival-val-0\.tar: a cannot be read"):
            dataset[0]
        write_shard(folder / "carnival-val-0.tar", {"a": (images[0], "one")})
        with pytest.raises(InputError, match=r"carnival-val-0\.tar: a has the class 'one'"):
            classification_dataset("shards", "train", root=str(folder))
        (folder / "carnival-val-0.tar").write_bytes(b"no tar")
        with pytest.raises(InputError, match=r"carnival-val-0\.tar: cannot be read"):
            classification_dataset("shards", "train", root=str(folder))
        (folder / "carnival-val-0.tar").unlink()
        with pytest.raises(InputError, match=r"holds no shards \*test-\*\.tar"):
            classification_dataset("shards", "train", root=str(folder))

    def test_of_cifar10_against_a_plain_loop(self, tmp_path):
        source = Path(os.getenv("DETECTRON2_DATASETS", "datasets")).expanduser() / "cifar10"
        if not (source / "cifar10-val-000000.tar.gz").is_file():
            pytest.skip("DETECTRON2_DATASETS holds no cifar10/cifar10-val-000000.tar.gz")
        for name in ("cifar10-train-000000.tar.gz", "cifar10-val-000000.tar.gz"):  # of 12 in all
            (tmp_path / name).symlink_to(source.absolute() / name)
        dataset = classification_dataset("shards", "test", root=str(tmp_path), classes=[6, 7, 8, 9])
        expected = {}
        with tarfile.open(source / "cifar10-val-000000.tar.gz") as tar:
            for member in tar:
                key, ending = member.name.split(".")
                expected.setdefault(key, {})[ending] = tar.extractfile(member).read()
        kept = [(key, int(sample["cls"]) - 6) for key, sample in expected.items() if int(sample["cls"]) > 5]
        names = [key.split(": ")[1] for key in dataset.keys]
        assert list(zip(names, dataset.labels, strict=True)) == kept
        assert dataset.classes == ["6", "7", "8", "9"]
        assert dataset[5][0].shape == (3, 32, 32)
