"""Files that cannot be converted end in one line that names them, whatever they hold, and cost little."""

import io
import json
import math
import pickle
import resource
import struct
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from rt_detectron import load_backbone, load_classifier
from rt_detectron.checkpoint.convert import convert_checkpoint
from rt_detectron.checkpoint.formats import write_pickle
from rt_detectron.checkpoint.metadata import Metadata
from rt_detectron.utils.errors import InputError

GIB = 1 << 30
METADATA = Metadata(
    "tiny", "l2", 3.0, "RGB", (123.675, 116.28, 103.53), (58.395, 57.12, 57.375), False, "c.pth"
)


def saved(content, **kwargs) -> bytes:
    file = io.BytesIO()
    torch.save(content, file, **kwargs)
    return file.getvalue()


def assert_one_line(path, message="", **kwargs):
    """The conversion stops, in one line that names the file, and writes nothing."""
    output = path.with_name("output.pkl")
    with pytest.raises(InputError, match=message) as error:
        convert_checkpoint(path, output, **kwargs)
    assert str(path) in str(error.value)
    assert str(error.value).isprintable()
    assert not output.exists()


def itself() -> dict:
    content: dict = {}
    content["model"] = content
    return content


def nested(depth: int) -> dict:
    content: dict = {}
    for _ in range(depth):
        content = {"": content}
    return content


CONTENTS = {
    "list": [1, 2],
    "tuple": (torch.ones(2),),
    "text": "resnet50",
    "number": 7,
    "none": None,
    "tensor": torch.ones(3, 3),
    "path": Path("resnet50.pth"),
    "module": torch.nn.Linear(2, 2),
    "empty dict": {},
    "numbers as names": {1: torch.ones(2), 2: torch.ones(2)},
    "model is a path": {"model": Path("resnet50.pth")},
    "model is a list": {"model": [torch.ones(2)]},
    "model is none": {"model": None},
    "model is a module": {"model": torch.nn.Linear(2, 2)},
    "model is empty": {"model": {}},
    "itself": itself(),
    "100 deep": nested(100),
    "other tensors": {"weight": torch.ones(2, 2), "bias": torch.ones(2)},
    "only a mean": {"mean": torch.ones(3), "std": torch.ones(3)},
}


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("name", CONTENTS)
def test_contents_that_are_no_network(tmp_path, name, zipped):
    path = tmp_path / "c.pth"
    path.write_bytes(saved(CONTENTS[name], _use_new_zipfile_serialization=zipped))
    assert_one_line(path)


@pytest.mark.parametrize("name", [name for name in CONTENTS if "module" not in name])
def test_pickles_that_are_no_backbone(tmp_path, name):
    path = tmp_path / "c.pkl"
    path.write_bytes(pickle.dumps(CONTENTS[name]))
    assert_one_line(path.rename(tmp_path / "b.pkl"))
    with pytest.raises(InputError, match=r"b\.pkl"):
        load_backbone(tmp_path / "b.pkl")


@pytest.mark.parametrize("argument", [["c.pth"], None, 7, b"c.pth", {"a": 1}], ids=repr)
@pytest.mark.parametrize(
    "load", [load_backbone, load_classifier, lambda path: convert_checkpoint(path, "b.pkl")]
)
def test_arguments_that_are_no_file_name(load, argument):
    with pytest.raises(InputError, match="is no file name: give one file of weights"):
        load(argument)


def test_paths_are_file_names(tiny, tmp_path):
    torch.save(tiny().state_dict(), tmp_path / "c.pth")
    convert_checkpoint(tmp_path / "c.pth", tmp_path / "b.pkl")
    assert load_backbone(tmp_path / "b.pkl").metadata.arch == "tiny"
    assert load_classifier(tmp_path / "c.pth").num_classes == 5


TENSORS = {
    "sparse": lambda tensor: tensor.to_sparse(),
    "quantised": lambda tensor: torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8),
    "without data": lambda tensor: tensor.to("meta"),
    "complex": lambda tensor: tensor.to(torch.complex64),
    "integers": lambda tensor: tensor.to(torch.int8),
    "truth values": lambda tensor: tensor > 0,
    "NaN": lambda tensor: tensor * math.nan,
    "infinity": lambda tensor: tensor + math.inf,
    "transposed": lambda tensor: tensor.transpose(0, 1),
    "empty": lambda tensor: tensor[:0],
    "one number": lambda tensor: tensor.sum(),
    "text": str,
    "expanded": lambda tensor: tensor[:1, :1, :1, :1].expand(1 << 12, 1 << 12, 1 << 5, 1 << 5),
}


@pytest.mark.filterwarnings("ignore:.*quantiz", "ignore:.*TypedStorage")
@pytest.mark.parametrize("kind", TENSORS)
def test_tensors_that_are_no_weights(tiny, tmp_path, kind):
    tensors = tiny().state_dict()
    tensors["features.3.0.weight"] = TENSORS[kind](tensors["features.3.0.weight"])
    path = tmp_path / "c.pth"
    path.write_bytes(saved({"model": tensors}))
    assert_one_line(path, r"features\.3\.0\.weight")


@pytest.mark.parametrize(
    "array",
    [
        np.array(["a"]),
        np.array([None]),
        np.zeros(2, "V8"),
        np.zeros(2, "M8[s]"),
    ],
    ids=lambda array: str(array.dtype),
)
def test_arrays_that_are_no_weights(tiny, tmp_path, array):
    content = {"model": {"trunk.features.0.0.weight": array}, "rt_detectron": METADATA.to_dict()}
    path = tmp_path / "c.pkl"
    path.write_bytes(pickle.dumps(content))
    assert_one_line(path, r"features\.0\.0\.weight")


KEYS = list(METADATA.to_dict())
# What some key may be is no mistake there: eps may be 7, a name any text.
ODD = [None, 7, True, [], {}, "", "x", "x\ny", "x" * 10_000, math.nan, 10**400, [1, 2, 3, 4], [math.nan] * 3]
ODD += [np.ones(3), np.float64(1), torch.ones(3), torch.tensor(1.0), Path("x"), ["1", "2", "3"], "123"]
GOOD = {("norm", None), ("eps", 7), ("source", "x"), ("source", "123"), ("stride_in_1x1", True)}


@pytest.mark.parametrize("key", KEYS)
def test_odd_metadata(tiny, tmp_path, key):
    """Each value that a key cannot have, in each of the formats that can hold it."""
    state_dict = tiny().state_dict()
    for value in ODD:
        content = {"model": state_dict, "rt_detectron": {**METADATA.to_dict(), key: value}}
        path = tmp_path / "c.pth"
        path.write_bytes(saved(content))
        if isinstance(value, str | int | None) and (key, value) in GOOD:
            convert_checkpoint(path, tmp_path / "good.pkl")
        else:
            assert_one_line(path, r"c\.pth: (its metadata is damaged|unknown architecture|.* has no )")


@pytest.mark.parametrize("metadata", [None, 7, "resnet50", [], [1], {}, {1: 2}, torch.ones(2)], ids=repr)
def test_metadata_that_is_none(tiny, tmp_path, metadata):
    path = tmp_path / "c.pth"
    path.write_bytes(saved({"model": tiny().state_dict(), "rt_detectron": metadata}))
    assert_one_line(path, r"c\.pth: its metadata is damaged")


def text_of(content: bytes, name="data.pkl") -> bytes:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return next(archive.read(entry) for entry in archive.namelist() if entry.endswith(name))


def zip_file(compression=zipfile.ZIP_STORED, **records) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, data in records.items():
            archive.writestr(f"archive/{name.replace('__', '/').replace('_', '.')}", data)
    return file.getvalue()


def tar_file() -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz") as archive:
        archive.addfile(tarfile.TarInfo("weights.pth"), io.BytesIO())
    return file.getvalue()


NETWORK = saved({"model": {"conv1.weight": torch.ones(64, 3, 7, 7)}})
OTHER_FILES = {
    "empty": b"",
    "blank": b" \n",
    "zeros": bytes(5000),
    "text": b"Dear user,\nthis is no checkpoint.\n",
    "json": json.dumps({"model": "resnet50"}).encode(),
    "web page": b"<html>sign in</html>",
    "picture": b"\x89PNG\r\n\x1a\n" + bytes(100),
    "tar": tar_file(),
    "zip of something else": zip_file(readme_txt=b"hello"),
    "zip without tensors": zip_file(data_pkl=text_of(NETWORK), version=b"3\n"),
    "zip that is cut": NETWORK[:-100],
    "zip without its end": NETWORK[:1000],
    "pickle of a number": pickle.dumps(7),
    "pickle that is cut": pickle.dumps({"model": [1] * 1000})[:-5],
    "pickle that never ends": b"\x80\x04" + b"(" * 10_000,
    "pickle of nothing": b"\x80\x04.",
    "a pickle that runs code": b"cos\nsystem\n(S'true'\ntR.",
    "utf-16": "model".encode("utf-16"),
}


@pytest.mark.parametrize("ending", [".pth", ".ckpt", ".pkl", ".safetensors", ".tar", ""])
def test_files_of_another_kind(tmp_path, ending):
    for content in OTHER_FILES.values():
        path = tmp_path / f"c{ending}"
        path.write_bytes(content)
        assert_one_line(path)


def array_pickle(program: bytes) -> bytes:
    """A pickle of {"model": {"w": what ``program`` leaves on the stack}, "__author__": "x"}."""
    return b"\x80\x04}(X\x05\0\0\0model}X\x01\0\0\0w" + program + b"sX\x0a\0\0\0__author__X\x01\0\0\0xu."


def number(value: int) -> bytes:
    data = value.to_bytes(8, "little")
    return b"\x8a\x08" + data


def safetensors(header: dict) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(8)


def inflating() -> bytes:
    with io.BytesIO() as file:
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("archive/data.pkl", text_of(NETWORK))
            archive.writestr("archive/data/0", bytes(GIB // 8))
            archive.writestr("archive/version", b"3\n")
        return file.getvalue()


def encoded_again_and_again() -> bytes:
    """One text of a megabyte and 10,000 calls that make bytes of it."""
    text = b"X" + struct.pack("<I", 1 << 20) + b"x" * (1 << 20)
    return array_pickle(
        b"c_codecs\nencode\nq\0" + text + b"q\1X\6\0\0\0latin1q\2(l" + b"h\0h\1h\2\x86Ra" * 10_000
    )


def legacy_storage() -> bytes:
    """Of four numbers, as which a pickle states 64 GiB."""
    content = saved({"w": torch.ones(4)}, _use_new_zipfile_serialization=False)
    assert content.count(b"K\x04Nt") == 1
    return content.replace(b"K\x04Nt", b"\x8a\x05" + (16 * GIB).to_bytes(5, "little") + b"Nt")


MULTIARRAY = b"cnumpy.core.multiarray\n"
REPEATED = {"w": torch.ones(1).expand(16 * GIB)}
LARGE = {
    "an empty array of 64 GiB.pkl": array_pickle(
        b"cnumpy\nndarray\n" + number(8 * GIB) + b"\x85X\2\0\0\0f8\x86R"
    ),
    "an array that is to be filled.pkl": array_pickle(
        MULTIARRAY + b"_reconstruct\n(cnumpy\nndarray\n" + number(64 * GIB) + b"\x85C\1btR"
    ),
    "a scalar of 2 GiB.pkl": array_pickle(
        MULTIARRAY + b"scalar\n(cnumpy\ndtype\n(X\x0b\0\0\0V2147483647tRtR"
    ),
    "bytes that are not there.pkl": array_pickle(b"\x8e" + struct.pack("<Q", 64 * GIB)),
    "a byte array that is not there.pkl": b"\x80\5\x96" + struct.pack("<Q", GIB) + b".",
    "one text again and again.pkl": encoded_again_and_again(),
    "one number again and again.pth": saved(REPEATED),
    "the same in torch's older format.pth": saved(REPEATED, _use_new_zipfile_serialization=False),
    "a storage that is not there.pth": legacy_storage(),
    "a zip that inflates.pth": inflating(),
    "a tensor that is not there.safetensors": safetensors(
        {"w": {"dtype": "F32", "shape": [16 * GIB], "data_offsets": [0, 64 * GIB]}}
    ),
    "a header that is not there.safetensors": struct.pack("<Q", 64 * GIB) + b"{}",
}


@pytest.mark.parametrize("name", LARGE)
def test_small_files_that_ask_for_much_memory(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(LARGE[name])
    assert len(LARGE[name]) < 4 << 20
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB
    assert_one_line(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 << 10


def test_the_same_array_twice_is_stored_once(tiny, tmp_path):
    """Sharing is no reason to refuse a file."""
    weight = np.ones((64, 64), np.float32)
    path = tmp_path / "b.pkl"
    path.write_bytes(pickle.dumps({"model": {"a": weight, "b": weight, "c": [weight] * 1000}}))
    assert_one_line(path, "was not written by rt_detectron")
    state_dict = {f"trunk.{n}": t for n, t in tiny().state_dict().items() if n.startswith("features.")}
    write_pickle({n: t for n, t in state_dict.items() if "tracked" not in n}, METADATA, str(path))
    convert_checkpoint(path, tmp_path / "c.pth")
