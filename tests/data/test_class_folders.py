import os
import pickle
import shutil

import pytest
import torch
from torchvision.datasets import ImageFolder

from rt_detectron.data import class_folders
from rt_detectron.data.class_folders import list_images
from rt_detectron.utils.errors import InputError

NAMES = ("b/2.jpg", "b/1.JPEG", "b/deep/er/3.png", "a/caf\udce9.webp", "a/x.txt", "c/0.bmp", "c/.hidden.jpg")


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """Class folders that are old enough, and large enough, for their list to be kept."""
    monkeypatch.setenv("RT_DETECTRON_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(class_folders, "WORTH_KEEPING", 1)
    root = tmp_path / "images"
    for name in NAMES:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    age(root)
    return root


def age(root):
    """Make all folders an hour older."""
    for folder, _, _ in os.walk(root):
        before = os.stat(folder).st_mtime_ns - 3600 * 10**9
        os.utime(folder, ns=(before, before))


def files(tmp_path):
    return list((tmp_path / "cache").rglob("*.pt"))


def count_reads(monkeypatch):
    reads = []
    read = class_folders._read
    monkeypatch.setattr(class_folders, "_read", lambda *args: reads.append(args) or read(*args))
    return reads


def test_lists_what_torchvision_lists(tree):
    expected = ImageFolder(str(tree))
    for _ in range(2):  # read, and from the file
        classes, images = list_images(str(tree))
        assert classes == expected.classes
        assert list(images) == expected.samples
    assert images[-1] == expected.samples[-1]
    assert images[1:3] == expected.samples[1:3]
    with pytest.raises(IndexError):
        images[len(images)]
    assert list(pickle.loads(pickle.dumps(images))) == expected.samples


def test_it_is_read_once_and_mapped_into_memory(tree, tmp_path, monkeypatch):
    reads = count_reads(monkeypatch)
    first, second = list_images(str(tree))[1], list_images(str(tree))[1]
    assert len(reads) == len(files(tmp_path)) == 1
    with open("/proc/self/maps") as maps:  # both of them, from the same file
        assert sum(files(tmp_path)[0].name in line for line in maps) >= 2
    assert list(first) == list(second)


@pytest.mark.parametrize("change", ["added", "deleted", "deep", "class", "renamed"])
def test_a_change_is_seen(tree, change):
    list_images(str(tree))
    if change == "added":
        (tree / "c" / "9.jpg").touch()
    elif change == "deleted":
        (tree / "b" / "1.JPEG").unlink()
    elif change == "deep":
        (tree / "b" / "deep" / "er" / "4.png").touch()
    elif change == "class":
        shutil.copytree(tree / "b", tree / "d")
    else:
        (tree / "b" / "2.jpg").rename(tree / "b" / "5.jpg")
    assert list(list_images(str(tree))[1]) == ImageFolder(str(tree)).samples


def test_a_folder_that_changed_just_now_is_not_kept(tree, tmp_path):
    """Another change in the same tick of the clock would not show."""
    (tree / "c" / "9.jpg").touch()
    assert len(list_images(str(tree))[1]) == 7
    assert not files(tmp_path)


def test_a_file_system_without_times_is_not_kept(tree, tmp_path):
    os.utime(tree / "a", ns=(0, 0))
    list_images(str(tree))
    assert not files(tmp_path)


def test_small_sets_leave_no_file(tree, tmp_path, monkeypatch):
    monkeypatch.setattr(class_folders, "WORTH_KEEPING", 1000)
    assert len(list_images(str(tree))[1]) == 6
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("content", [b"", b"no list", None])
def test_a_damaged_or_older_file_is_made_anew(tree, tmp_path, content):
    list_images(str(tree))
    (path,) = files(tmp_path)
    if content is None:
        torch.save({"version": 0}, path)
    else:
        path.write_bytes(content)
    assert list(list_images(str(tree))[1]) == ImageFolder(str(tree)).samples
    assert torch.load(path, weights_only=True)["version"] > 0


def test_it_works_without_a_cache(tree, monkeypatch, caplog):
    monkeypatch.setenv("RT_DETECTRON_CACHE", "/dev/null/nowhere")
    assert len(list_images(str(tree))[1]) == 6
    assert "is not kept: cannot make the cache" in caplog.text


def test_an_empty_class_is_named(tree):
    (tree / "eel").mkdir()
    age(tree)
    for _ in range(2):
        with pytest.raises(InputError, match="no images of eel"):
            list_images(str(tree))


def private_growth(images) -> int:
    """Bytes that a forked process copies when it reads all of ``images``."""

    def private():
        with open("/proc/self/smaps_rollup") as file:
            return 1024 * sum(int(line.split()[1]) for line in file if line.startswith("Private_Dirty"))

    receiver, sender = os.pipe()
    if not (child := os.fork()):
        before = private()
        for i in range(len(images)):
            _path, _label = images[i]
        os.write(sender, str(private() - before).encode())
        os._exit(0)
    os.waitpid(child, 0)
    growth = int(os.read(receiver, 100))
    os.close(receiver), os.close(sender)
    return growth


def test_a_worker_does_not_copy_it(tmp_path):
    """Of 40,000 names a list's copy takes 8 MB."""
    names = [f"n01440764/n01440764_{i:08d}.JPEG" for i in range(40_000)]
    ends = torch.tensor([len(name) for name in names]).cumsum(0)
    blob = torch.frombuffer(bytearray("".join(names), "ascii"), dtype=torch.uint8)
    images = class_folders.ImageList("/data/train", blob, ends, torch.zeros(40_000, dtype=torch.int32))
    samples = list(images)
    assert samples[77] == (f"/data/train/{names[77]}", 0)
    assert private_growth(images) < 1.5e6
    assert private_growth(samples) > 4e6
