"""Reading classifiers: every layout in the wild, damaged files, and files that want to run code."""

import argparse
import os
import pickle
import subprocess
import zipfile
from collections import OrderedDict

import dill
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from rt_detectron.checkpoint.convert import read_network
from rt_detectron.checkpoint.formats import read_pickle, read_weights
from rt_detectron.checkpoint.metadata import Metadata
from rt_detectron.utils.errors import InputError

MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)


@pytest.fixture
def state_dict(tiny):
    return tiny().state_dict()


def prefixed(state_dict, prefix):
    return OrderedDict((prefix + name, tensor) for name, tensor in state_dict.items())


def robustness_layout(state_dict, inner="", key="model", **extra):
    """The layout that the robustness package writes; its attacker's copy is spoiled, to be told apart."""
    spoiled = {name: torch.zeros_like(tensor) for name, tensor in state_dict.items()}
    shape = (3, 1, 1)
    tensors = {
        **prefixed(spoiled, f"module.attacker.model.{inner}"),
        "module.normalizer.new_mean": torch.tensor([0.485, 0.456, 0.406]).view(shape),
        "module.normalizer.new_std": torch.tensor([0.229, 0.224, 0.225]).view(shape),
        "module.attacker.normalize.new_mean": torch.tensor([0.485, 0.456, 0.406]).view(shape),
        "module.attacker.normalize.new_std": torch.tensor([0.229, 0.224, 0.225]).view(shape),
        **prefixed(state_dict, f"module.model.{inner}"),
    }
    return {key: OrderedDict(tensors), "optimizer": {"state": {}}, "epoch": 90, "amp": None, **extra}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=0)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("key", ["model", "state_dict"])
@pytest.mark.parametrize("inner", ["", "model."], ids=["plain", "wrapped"])
def test_robustness_layouts(tmp_path, state_dict, zipped, key, inner):
    path = str(tmp_path / "resnet18_l2_eps3.ckpt")
    content = robustness_layout(state_dict, inner, key)
    torch.save(content, path, pickle_module=dill, _use_new_zipfile_serialization=zipped)
    weights = read_network(path)
    assert_same(weights.state_dict, state_dict)
    assert (weights.metadata.pixel_mean, weights.metadata.pixel_std) == (MEAN, STD)
    assert weights.pixels_are_known


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_dill_saved_functions_are_left_out(tmp_path, state_dict, zipped):
    path = str(tmp_path / "resnet18_l2_eps3.ckpt")
    offset = 3
    content = robustness_layout(
        state_dict,
        schedule=lambda epoch: 0.1 ** (epoch // 30) + offset,
        args=argparse.Namespace(lr=0.1, device=torch.device("cpu")),
    )
    torch.save(content, path, pickle_module=dill, _use_new_zipfile_serialization=zipped)
    with pytest.raises(pickle.UnpicklingError):
        torch.load(path, weights_only=True)
    assert_same(read_network(path).state_dict, state_dict)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_the_layout_of_stylized_imagenet(tmp_path, state_dict, zipped):
    """As PyTorch's ImageNet example saves a network under DataParallel, with the optimizer's tensors."""
    path = str(tmp_path / "resnet50_train_60_epochs-c8e5653e.pth.tar")
    content = {
        "epoch": 60,
        "arch": "resnet50",
        "state_dict": prefixed(state_dict, "module."),
        "best_prec1": torch.tensor(60.2),
        "optimizer": {"state": {0: {"momentum_buffer": torch.ones(2)}}, "param_groups": [{"lr": 0.001}]},
    }
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    weights = read_network(path)
    assert_same(weights.state_dict, state_dict)
    assert weights.metadata.pixel_mean == MEAN
    assert not weights.pixels_are_known


def test_parameters_are_read_as_tensors(tmp_path, state_dict):
    path = str(tmp_path / "c.pth")
    parameters = {n: torch.nn.Parameter(t) if t.is_floating_point() else t for n, t in state_dict.items()}
    torch.save({"model": parameters, "schedule": print}, path)
    assert_same(read_network(path).state_dict, state_dict)


def test_safetensors(tmp_path, state_dict):
    path = str(tmp_path / "resnet18.safetensors")
    save_file(dict(state_dict), path)
    assert_same(read_network(path).state_dict, state_dict)


def test_metadata_of_our_pretraining(tmp_path, state_dict):
    path = str(tmp_path / "classifier.pth")
    pixels = {"pixel_mean": (125.3, 123.0, 113.9), "pixel_std": (63.0, 62.1, 66.7)}
    metadata = Metadata("tiny", "l2", 0.5, "RGB", **pixels, stride_in_1x1=False, source="pretraining")
    torch.save({"model": state_dict, "rt_detectron": metadata.to_dict()}, path)
    assert read_weights(path).metadata == metadata


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_become_float32(tmp_path, state_dict, dtype):
    path = str(tmp_path / "c.pth")
    torch.save({n: t.to(dtype) if t.is_floating_point() else t for n, t in state_dict.items()}, path)
    found = read_network(path).state_dict["features.0.0.weight"]
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, state_dict["features.0.0.weight"].to(dtype).float(), rtol=0, atol=0)


class Payload:
    """Unpickles as a call of ``function(*args)``."""

    def __init__(self, function, *args):
        self.call = (function, args)

    def __reduce__(self):
        return self.call


def payloads(folder):
    """Files named ran-* appear in ``folder`` if a payload runs."""
    touch = f"open({str(folder / 'ran-eval')!r}, 'w')"
    return {
        "os.system": Payload(os.system, f"touch {folder / 'ran-system'}"),
        "eval": Payload(eval, touch),
        "exec": Payload(exec, touch),
        "popen": Payload(subprocess.Popen, ["touch", str(folder / "ran-popen")]),
        "open": Payload(open, str(folder / "ran-open"), "w"),
    }


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("name", ["os.system", "eval", "exec", "popen", "open"])
@pytest.mark.parametrize("place", ["schedule", "model", "key"])
def test_payloads_do_not_run(tmp_path, state_dict, zipped, name, place):
    path = str(tmp_path / "evil.ckpt")
    payload = payloads(tmp_path)[name]
    content = robustness_layout(state_dict)
    if place == "schedule":
        content["schedule"] = [payload, {"nested": payload}]
    elif place == "model":
        content["model"]["module.extra"] = payload
    else:
        content[payload] = 1
    pickle_module = dill if place == "schedule" else pickle
    torch.save(content, path, pickle_module=pickle_module, _use_new_zipfile_serialization=zipped)
    assert_same(read_network(path).state_dict, state_dict)
    assert not list(tmp_path.glob("ran-*"))


def test_payloads_do_run_elsewhere(tmp_path):
    """The payloads above are live: the ordinary unpickler runs them."""
    path = tmp_path / "evil.ckpt"
    for payload in payloads(tmp_path).values():
        torch.save(payload, path)
        torch.load(path, weights_only=False)
    assert {p.name for p in tmp_path.glob("ran-*")} >= {"ran-system", "ran-eval", "ran-open"}


class Stateful:
    """Pickles with a state and with list and dict items, as arbitrary objects may."""

    def __reduce_ex__(self, protocol):
        return (Stateful, (), ({"a": 1}, {"b": 2}), iter([1, 2]), iter([("k", "v")]))


@pytest.mark.parametrize("protocol", [2, 4])
def test_arbitrary_objects_are_left_out(tmp_path, state_dict, protocol):
    path = str(tmp_path / "c.ckpt")
    torch.save(
        robustness_layout(state_dict, schedule=Stateful(), cls=Stateful), path, pickle_protocol=protocol
    )
    assert_same(read_network(path).state_dict, state_dict)


def test_allowed_functions_cannot_be_changed(tmp_path):
    allowed = torch._utils._rebuild_tensor_v2
    before = dict(vars(allowed)), allowed.__defaults__
    state = pickle.dumps((None, {"__defaults__": (1,), "planted": 2}), 2)[2:-1]
    program = b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n" + state + b"b."
    path = str(tmp_path / "c.ckpt")
    torch.save({"model": {}, "x": print}, path)
    rewrite_pickle(path, program)
    with pytest.raises(InputError, match="holds no state dict"):
        read_weights(path)
    assert before == (vars(allowed), allowed.__defaults__)


def rewrite_pickle(path, program):
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in records.items():
            archive.writestr(name, program if name.endswith("data.pkl") else data)


def test_torchscript_is_refused(tmp_path):
    path = str(tmp_path / "scripted.pth")
    torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2)), path)
    with pytest.raises(InputError, match="not a checkpoint"):
        read_weights(path)


def test_whole_model_is_refused(tmp_path):
    path = str(tmp_path / "model.pth")
    torch.save(torch.nn.Linear(2, 2), path)
    with pytest.raises(InputError, match="state_dict"):
        read_weights(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty"),
        (b"\n<!DOCTYPE html><html>sign in</html>", "web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        (b"not a checkpoint at all", "damaged or not a checkpoint"),
    ],
)
@pytest.mark.parametrize("ending", [".ckpt", ".safetensors"])
def test_files_that_are_no_checkpoints(tmp_path, content, message, ending):
    path = tmp_path / f"c{ending}"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message) as error:
        read_weights(str(path))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
def test_truncated_files(tmp_path, state_dict, zipped, share):
    path = tmp_path / "c.ckpt"
    torch.save(robustness_layout(state_dict, schedule=print), path, _use_new_zipfile_serialization=zipped)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(InputError, match="damaged or not a checkpoint"):
        read_weights(str(path))


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(InputError, match=r"cannot read .*No such file"):
        read_weights(str(tmp_path / "none.ckpt"))
    with pytest.raises(InputError, match="is a folder"):
        read_weights(str(tmp_path))


def test_nan_is_named(tmp_path, state_dict):
    path = str(tmp_path / "c.pth")
    bad = {**state_dict, "features.2.0.weight": state_dict["features.2.0.weight"] * float("nan")}
    torch.save(bad, path)
    with pytest.raises(InputError, match=r"features\.2\.0\.weight holds NaN"):
        read_network(path)


@pytest.mark.parametrize("archive", ["weights_only", "refused"])
def test_a_flipped_bit_in_a_weight_is_seen(tmp_path, state_dict, archive):
    path = tmp_path / "c.ckpt"
    torch.save(robustness_layout(state_dict, schedule=print if archive == "refused" else None), path)
    content = path.read_bytes()
    weights = state_dict["features.0.0.weight"].numpy().tobytes()
    start = content.index(weights)
    for place in np.random.default_rng(0).integers(len(weights), size=20):
        flipped = bytearray(content)
        flipped[start + place] ^= 0x10
        path.write_bytes(flipped)
        with pytest.raises(InputError, match=r"is damaged \(.* has a wrong checksum\)"):
            read_weights(str(path))
    path.write_bytes(content)
    assert_same(read_network(path).state_dict, state_dict)


@pytest.mark.parametrize(
    ("content", "message"),
    [([1, 2], "holds no state dict"), ({"epoch": 3}, "no tensors"), ({"model": {}}, "no tensors")],
)
def test_files_without_a_network(tmp_path, content, message):
    path = str(tmp_path / "c.pth")
    torch.save(content, path)
    with pytest.raises(InputError, match=message):
        read_weights(path)


ARRAYS = {
    "weight": np.arange(6, dtype=np.float32).reshape(2, 3),
    "columns": np.asfortranarray(np.arange(6, dtype=np.float16).reshape(2, 3)),
    "big endian": np.arange(3, dtype=">f4"),
    "counter": np.array(7),
    "scalar": np.float64(0.5),
    "nested": OrderedDict(list=[1, 2.5, "text", None, True], tuple=(b"\xff\x00", np.int64(3))),
}


def assert_same_arrays(found):
    assert list(found) == list(ARRAYS)
    for name in list(ARRAYS)[:5]:
        assert found[name].dtype.newbyteorder("=") == ARRAYS[name].dtype.newbyteorder("=")
        np.testing.assert_array_equal(found[name], ARRAYS[name])
    assert found["nested"] == ARRAYS["nested"]


@pytest.mark.parametrize("core", [b"numpy.core", b"numpy._core"])
@pytest.mark.parametrize("protocol", [2, 5])
def test_pickled_arrays(tmp_path, core, protocol):
    path = tmp_path / "weights.pkl"
    content = pickle.dumps(ARRAYS, protocol)
    home = np.zeros(1).__reduce__()[0].__module__.removesuffix(".multiarray").encode()
    if protocol == 2:  # lines; later protocols prefix the length of a name
        content = content.replace(b"c" + home + b".", b"c" + core + b".")
        assert b"c" + core + b".multiarray\n_reconstruct\n" in content
    path.write_bytes(content)
    assert_same_arrays(read_pickle(str(path)))


def test_arrays_pickled_by_python_2(tmp_path):
    """As in Detectron2's model zoo: array data is a byte string, not bytes."""
    path = tmp_path / "weights.pkl"
    path.write_bytes(
        b"\x80\x02}U\x01wcnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\x00\x85U\x01btR"
        b"(K\x01K\x02\x85cnumpy\ndtype\n(U\x02f4K\x00K\x01tR(K\x03U\x01<NNNJ\xff\xff\xff\xffJ\xff\xff"
        b"\xff\xffK\x00tb\x89U\x08\x00\x00\x80?\x00\x00\xc0\xbftbs."
    )
    np.testing.assert_array_equal(read_pickle(str(path))["w"], np.array([1, -1.5], np.float32))


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize(
    ("name", "global_"),
    [
        ("os.system", r"\w+\.system"),
        ("eval", r"\w+\.eval"),
        ("exec", r"\w+\.exec"),
        ("popen", r"\w+\.Popen"),
        ("open", r"\w+\.open"),
    ],
)
def test_payloads_in_pickles_are_refused(tmp_path, name, global_, protocol):
    path = tmp_path / "evil.pkl"
    content = {"model": {"w": payloads(tmp_path)[name]}, "__author__": "me"}
    path.write_bytes(pickle.dumps(content, protocol))
    with pytest.raises(InputError, match=rf"evil\.pkl was refused for {global_}, .*that you trust$"):
        read_pickle(str(path))
    assert not list(tmp_path.glob("ran-*"))


@pytest.mark.parametrize(
    ("program", "message"),
    [
        pytest.param(b"\x80\x02c_codecs\nencode\nU\x01aU\x03hex\x86R.", "unknown spelling", id="codec"),
        pytest.param(b"\x80\x02cnumpy\nload\nU\x01a\x85R.", r"for numpy\.load,", id="numpy.load"),
        pytest.param(b"\x80\x04\x8c\x05numpy\x8c\x0cndarray.dump\x93.", r"numpy\.ndarray\.dump", id="dotted"),
        pytest.param(b"\x80\x04\x8c\x02os\x8c\x07sys\n em\x93.", r"os\.sys\?\?em,", id="line end"),
        pytest.param(b"\x80\x02U\x01aQ.", "not a checkpoint", id="persistent id"),
        pytest.param(b"\x80\x02\x82\x01.", "not a checkpoint", id="extension"),
        pytest.param(b"", "empty", id="empty"),
        pytest.param(pickle.dumps(ARRAYS, 4)[:-20], "damaged", id="truncated"),
    ],
)
def test_bad_pickles_are_one_line(tmp_path, program, message):
    path = tmp_path / "bad.pkl"
    path.write_bytes(program)
    with pytest.raises(InputError, match=message) as error:
        read_pickle(str(path))
    assert "\n" not in str(error.value)


def test_numpy_functions_cannot_be_changed(tmp_path):
    frombuffer = np.zeros(1).__reduce_ex__(5)[0]
    before = dict(vars(frombuffer)), frombuffer.__defaults__
    path = tmp_path / "evil.pkl"
    state = pickle.dumps((None, {"__defaults__": (1,), "planted": 2}), 2)[2:-1]
    path.write_bytes(b"\x80\x02cnumpy.core.numeric\n_frombuffer\n" + state + b"b.")
    read_pickle(str(path))
    assert before == (vars(frombuffer), frombuffer.__defaults__)
