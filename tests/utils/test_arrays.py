import random

import numpy as np
import pytest

from rt_detectron.utils.arrays import read_arrays, write_arrays
from rt_detectron.utils.errors import InputError


@pytest.mark.parametrize("compressed", [False, True])
def test_arrays_come_back(tmp_path, compressed):
    arrays = {"a/b": np.arange(6, dtype=np.float32).reshape(2, 3), "names": np.array(["x", "yy"])}
    write_arrays(tmp_path / "x.npz", arrays, compressed)
    found = read_arrays(tmp_path / "x.npz")
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array)
    assert [path.name for path in tmp_path.iterdir()] == ["x.npz"]


def test_no_objects(tmp_path):
    with pytest.raises(ValueError, match="pickle"):
        write_arrays(tmp_path / "x.npz", {"a": np.array([{}])})
    assert not [*tmp_path.iterdir()]


def test_a_missing_file_is_told_from_a_damaged_one(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_arrays(tmp_path / "x.npz")


@pytest.mark.parametrize("compressed", [False, True])
def test_every_damage_is_one_line(tmp_path, compressed):
    """A broken zip, zlib's own error, unknown compression: NumPy passes on what each layer raises."""
    path = tmp_path / "x.npz"
    write_arrays(path, {"a": np.arange(500) % 7, "b": np.array(["x", "yy"])}, compressed)
    whole, choose = path.read_bytes(), random.Random(0)
    messages = set()
    for turn in range(400):
        content = bytearray(whole)
        if turn % 2:
            content = content[: choose.randrange(len(whole))]
        else:
            content[choose.randrange(len(whole))] ^= choose.randrange(1, 256)
        path.write_bytes(content)
        try:
            read_arrays(path)  # some bytes mean nothing, such as dates
        except InputError as error:
            messages.add(str(error))
    assert len(messages) > 2
    assert all(message.startswith(f"{path} is damaged (") and "\n" not in message for message in messages)


def test_one_array_alone_is_no_such_file(tmp_path):
    np.save(tmp_path / "x.npy", np.arange(3))
    with pytest.raises(InputError, match="is damaged"):
        read_arrays(tmp_path / "x.npy")
