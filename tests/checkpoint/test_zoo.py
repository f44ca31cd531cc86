"""The table of published checkpoints, and robust:// paths from a mirror, the cache and a server."""

import builtins
import errno
import hashlib
import io
import logging
import os
import pickle
import random
import re
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from detectron2.utils.file_io import PathManager
from tool_process import ToolProcess

from rt_detectron import load_classifier
from rt_detectron.checkpoint import zoo
from rt_detectron.checkpoint.architectures import ARCHITECTURES, get_architecture, split_timm
from rt_detectron.checkpoint.convert import convert_checkpoint, parse_threat_model
from rt_detectron.utils.errors import InputError

HUB = "madrylab/robust-imagenet-models"
NAME = "shufflenet_l2_eps0"  # the smallest of the published networks; its SHA-256 is not recorded
COMMIT = zoo.find(NAME).revision
ON_THE_HUB = zoo.list(source="madrylab")
NEWER = [entry for entry in zoo.list() if entry not in ON_THE_HUB]
FILE = f"{NAME}.ckpt"
ON_HUB = f"{HUB}/{FILE}"


def layout(network: torch.nn.Module, inner: str = "model.") -> dict:
    """What the publication's files hold; the six later networks were trained inside a wrapper ("model.")."""
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    tensors = {}
    for name, tensor in network.state_dict().items():
        tensors[f"module.model.{inner}{name}"] = tensor
        tensors[f"module.attacker.model.{inner}{name}"] = tensor
    for prefix in ("module.normalizer.", "module.attacker.normalize."):
        tensors[f"{prefix}new_mean"], tensors[f"{prefix}new_std"] = mean.view(3, 1, 1), std.view(3, 1, 1)
    return {"model": tensors, "optimizer": {"state": {}}, "schedule": None, "epoch": 90, "amp": None}


def saved(content, **kwargs) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, **kwargs)
    return buffer.getvalue()


def backbone_pkl(name: str = NAME, **changes) -> bytes:
    """The least that a backbone's file of this name holds."""
    metadata = {**zoo.metadata(name).to_dict(), **changes}
    weights = {"weight": np.zeros(1, np.float32)}
    return pickle.dumps({"model": weights, "__author__": "rt_detectron", "rt_detectron": metadata})


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@pytest.fixture(scope="module")
def network(random_classifier):
    return random_classifier("shufflenet")


@pytest.fixture(scope="module")
def content(network) -> bytes:
    """Of the file that the tests' Hub and mirrors have under the name FILE."""
    return saved(layout(network))


@pytest.fixture(scope="module")
def expected(content, tmp_path_factory) -> dict:
    """The .pkl's content by its name, converted outside the zoo."""
    folder = tmp_path_factory.mktemp("expected")
    (folder / FILE).write_bytes(content)
    for name, input_format in ((NAME, "RGB"), (f"{NAME}-bgr", "BGR")):
        convert_checkpoint(str(folder / FILE), str(folder / f"{name}.pkl"), input_format=input_format)
    return {path.stem: pickle.loads(path.read_bytes()) for path in folder.glob("*.pkl")}


def assert_same(path: str, expected: dict):
    found = pickle.loads(Path(path).read_bytes())
    assert found["rt_detectron"] == expected["rt_detectron"]
    assert found["model"].keys() == expected["model"].keys()
    assert all(np.array_equal(found["model"][name], array) for name, array in expected["model"].items())


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache, no mirror, and no network but where the fixture ``hub`` makes one."""
    monkeypatch.setenv("RT_DETECTRON_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("RT_DETECTRON_ZOO", raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "huggingface" / "hub"))
    return tmp_path / "cache"


@pytest.fixture
def mirror(tmp_path, monkeypatch) -> Path:
    folder = tmp_path / "mirror"
    folder.mkdir()
    monkeypatch.setenv("RT_DETECTRON_ZOO", str(folder))
    return folder


@pytest.fixture
def record(monkeypatch):
    """``record(content)``: the table knows size and SHA-256 of FILE."""

    def record(content: bytes):
        entries = dict(zoo._entries())
        entries[NAME] = replace(entries[NAME], size=len(content), sha256=sha256(content))
        monkeypatch.setattr(zoo, "_entries", lambda: entries)

    return record


def one_line_error(function, *arguments, match: str = "") -> str:
    with pytest.raises(InputError, match=match) as error:
        function(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


def files(folder: Path) -> set[str]:
    """All files below a folder but locks, and the tag that huggingface_hub leaves for backup programs."""
    found = [path for path in folder.rglob("*") if path.is_symlink() or path.is_file()]
    return {str(path.relative_to(folder)) for path in found if path.suffix not in (".lock", ".TAG")}


class TestTable:
    def test_counts(self):
        assert len(zoo.list()) == len({entry.name for entry in zoo.list()}) == 140
        entries = ON_THE_HUB
        assert len(entries) == 68
        assert {entry.licence for entry in entries} == {"MIT"}
        assert Counter(entry.norm for entry in entries) == {"l2": 52, "linf": 16}
        assert Counter(entry.arch for entry in entries) == {
            **dict.fromkeys(["resnet18", "wide_resnet50_2"], 15),
            "resnet50": 16,
            "wide_resnet50_4": 10,
            **dict.fromkeys(
                ["densenet", "mnasnet", "mobilenet", "resnext50_32x4d", "shufflenet", "vgg16_bn"], 2
            ),
        }
        assert Counter(entry.eps for entry in entries) == {
            0: 11,
            3: 10,
            **dict.fromkeys([0.01, 0.03, 0.05, 0.1, 0.25, 5], 4),
            **dict.fromkeys([0.5, 1], 7),
            **dict.fromkeys([2, 4, 8], 3),
        }

    @pytest.mark.parametrize("entry", ON_THE_HUB, ids=lambda entry: entry.name)
    def test_every_entry_agrees_with_its_file_name(self, entry):
        assert entry.file == f"{entry.name}.ckpt"
        assert parse_threat_model(entry.file) == (entry.norm, entry.eps)
        assert entry.name.startswith(f"{entry.arch}_{entry.norm}_eps")
        assert entry.arch in ARCHITECTURES
        assert entry.input_format == "RGB"
        assert entry.sha256 is None or re.fullmatch("[0-9a-f]{64}", entry.sha256)
        assert entry.size is None or entry.sha256 is not None
        assert (entry.top1 is None) == (entry.name == "resnet50_linf_eps0")

    def test_recorded_hashes(self):
        recorded = [entry.sha256 for entry in zoo.list() if entry.sha256 is not None]
        assert len(set(recorded)) == len(recorded) == 45
        eps4 = zoo.find("resnet50_linf_eps4.0")
        assert (eps4.size, eps4.sha256[:8]) == (204818947, "9e622169")

    @pytest.mark.parametrize(
        ("name", "top1"),
        [
            ("resnet18_l2_eps0", 69.79),
            ("resnet18_l2_eps5", 45.59),
            ("resnet18_linf_eps8.0", 42.11),
            ("resnet50_l2_eps0.25", 74.14),
            ("resnet50_l2_eps3", 62.83),
            ("resnet50_linf_eps4.0", 63.86),
            ("wide_resnet50_2_l2_eps0.01", 77.25),
            ("wide_resnet50_2_linf_eps0.5", 75.82),
            ("wide_resnet50_4_l2_eps1", 75.51),
            ("densenet_l2_eps3", 66.98),
            ("mnasnet_l2_eps0", 60.97),
            ("mobilenet_l2_eps3", 50.40),
            ("resnext50_32x4d_l2_eps0", 77.38),
            ("shufflenet_l2_eps3", 43.32),
            ("vgg16_bn_l2_eps3", 57.19),
        ],
    )
    def test_accuracy(self, name, top1):
        assert zoo.find(name).top1 == top1

    def test_accuracy_falls_as_eps_grows(self):
        for arch in ("resnet18", "resnet50", "wide_resnet50_2"):
            top1 = [
                entry.top1 for entry in zoo.list(norm="linf", arch=arch) if entry.eps and entry in ON_THE_HUB
            ]
            assert top1 == sorted(top1, reverse=True)

    def test_filters(self):
        assert len(zoo.list(norm="l2", arch="resnet50")) == 10
        assert [entry.name for entry in zoo.list(arch="resnet50", eps=0.5)] == [
            "resnet50_l2_eps0.5",
            "resnet50_linf_eps0.5",
        ]
        assert zoo.list(eps=7) == []

    @pytest.mark.parametrize(
        ("key", "value", "known"),
        [
            ("norm", "l1", "l2, linf"),
            ("norm", "L2", "l2, linf"),
            ("arch", "resnet34", "resnet18, resnet50, wide_resnet50_2"),
            ("source", "hub", "madrylab, robustbench, ares"),
        ],
    )
    def test_unknown_filters(self, key, value, known):
        assert known in one_line_error(lambda: zoo.list(**{key: value}), match=f"no {key} '{value}'")

    def test_url(self, monkeypatch):
        monkeypatch.delenv("HF_ENDPOINT", raising=False)
        path = f"madrylab/robust-imagenet-models/resolve/{COMMIT}/resnet50_linf_eps4.0.ckpt"
        assert zoo.find("resnet50_linf_eps4.0").url == f"https://huggingface.co/{path}"
        monkeypatch.setenv("HF_ENDPOINT", "http://mirror.example/")
        assert zoo.find("resnet50_linf_eps4.0").url == f"http://mirror.example/{path}"

    @pytest.mark.parametrize(
        ("wrong", "right"),
        [
            ("resnet50_linf_eps4", "resnet50_linf_eps4.0"),
            ("resnet50_l2_eps3.0", "resnet50_l2_eps3"),
            ("wide_resnet50-2_l2_eps3", "wide_resnet50_2_l2_eps3"),
            ("ResNet50_L2_eps3", "resnet50_l2_eps3"),
            ("resnet50-l2-eps0.1", "resnet50_l2_eps0.1"),
            ("resnet50_l2_3", "resnet50_l2_eps3"),
            ("densenet161_l2_eps3", "densenet_l2_eps3"),
            ("mobilenet_v2_l2_eps0", "mobilenet_l2_eps0"),
            ("shufflenet_v2_x1_0_l2_eps3", "shufflenet_l2_eps3"),
        ],
    )
    def test_the_nearest_name_comes_first(self, wrong, right):
        one_line_error(zoo.find, wrong, match=rf"no {wrong};.* did you mean {right}( or |\?)")

    def test_nothing_near(self):
        one_line_error(zoo.find, "xyz", match=r"no xyz; docs/MODEL_ZOO.md lists all names$")


class TestNewer:
    """Networks of other sources, whose files users bring, or the Hub has under one name for all."""

    @pytest.fixture(autouse=True)
    def here(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "torch_hub"))

    def test_the_table(self):
        assert Counter(entry.source for entry in NEWER) == {
            "robustbench": 26,
            "ares": 12,
            "easyrobust": 16,
            "light-recipe": 5,
            "revisiting-at": 3,
            "robust-principles": 3,
            "robust-clip": 7,
        }
        assert len({entry.file for entry in NEWER}) == len(NEWER)  # a mirror has room for all
        for entry in NEWER:
            assert (entry.norm, entry.input_format) == ("linf", "RGB")
            assert entry.pixels in zoo.PIXELS
            assert entry.link.startswith(("https://", "http://alisec-competition.oss-cn-shanghai"))
            known = timm.list_models() if entry.arch.startswith("timm/") else ARCHITECTURES
            assert split_timm(entry.arch)[0] in known
            assert (entry.kind == "encoder") == (entry.top1 is None) == (entry.robust is None)
            assert entry.kind == "encoder" or 15 < entry.robust < entry.top1 < 85
        ours, theirs = zoo.find("resnet50_linf_eps4.0"), zoo.find("Salman2020Do_R50")
        assert abs(ours.top1 - theirs.top1) < 0.5  # the same network, on another part of ImageNet

    def test_clips_pixels_are_timms(self):
        architecture = get_architecture("timm/vit_base_patch16_clip_224")
        assert zoo.PIXELS["clip"] == (architecture.pixel_mean, architecture.pixel_std)

    @pytest.mark.parametrize(
        "folder", ["mirror", "mirror/imagenet/Linf", "models/imagenet/Linf", "torch_hub/checkpoints"]
    )
    def test_files_are_found_and_used_as_they_are(
        self, mirror, tmp_path, monkeypatch, random_classifier, caplog, folder
    ):
        name, pixels = "Salman2020Do_R18", "wrap" if folder == "mirror" else "raw"
        entries = {**zoo._entries(), name: replace(zoo.find(name), pixels=pixels)}
        monkeypatch.setattr(zoo, "_entries", lambda: entries)
        path = tmp_path / folder / f"{name}.pt"
        path.parent.mkdir(parents=True, exist_ok=True)
        network = random_classifier("resnet18", 10)
        torch.save({f"model.{key}": tensor for key, tensor in network.state_dict().items()}, path)
        found = pickle.loads(Path(PathManager.get_local_path(f"robust://{name}.pkl")).read_bytes())
        metadata = found["rt_detectron"]
        assert (metadata["arch"], metadata["norm"], metadata["eps"]) == ("resnet18", "linf", 4)
        assert metadata["pixel_std"][0] == (58.395 if pixels == "wrap" else 255)
        assert metadata["pixel_std"] == list(zoo.metadata(name).pixel_std)
        np.testing.assert_array_equal(found["model"]["stem.conv1.weight"], network.conv1.weight.detach())
        assert f"No SHA-256 of {name}.pt is known" in caplog.text
        images = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
        normalised = (images - mean.view(3, 1, 1)) / std.view(3, 1, 1) if pixels == "wrap" else images
        with torch.no_grad():
            torch.testing.assert_close(
                load_classifier(name)(images), network(normalised), rtol=1e-3, atol=1e-3
            )

    def test_a_missing_file(self, mirror):
        file = "Liu2023Comprehensive_Swin-B.pt"
        message = one_line_error(zoo.backbone, "Liu2023Comprehensive_Swin-B", match=f"there is no {file}: ")
        drive = "https://drive.google.com/uc?id=1-4mtxQCkThJUVdS3wvQ6NnmMZuySqR3c"
        assert f"download {drive} to FOLDER/{file} and export RT_DETECTRON_ZOO=FOLDER, or " in message
        assert "RobustBench's load_model" in message
        message = one_line_error(zoo.backbone, "ARES_ResNet50_AT", match=r"download https://.*_AT\.pth to")
        assert "RobustBench" not in message

    def test_a_file_that_contradicts_the_table(self, mirror, random_classifier):
        tensors = {f"1.{key}": t for key, t in random_classifier("resnet50").state_dict().items()}
        tensors |= {"0.mean": torch.full((3,), 0.5), "0.std": torch.full((3,), 0.5)}
        torch.save(tensors, mirror / "ARES_ResNet50_AT.pth")
        for function in (zoo.backbone, load_classifier):
            one_line_error(function, "ARES_ResNet50_AT", match=r"127.5 and .*, but 123.675 .* was published")

    def test_a_recorded_hash_is_checked(self, mirror):
        name = "convnext_tiny_cvst_robust"
        (mirror / f"{name}.pt").write_bytes(saved({"x": torch.zeros(1)}))
        one_line_error(zoo.backbone, name, match="bytes, but 114579981 were published")

    def test_an_encoder_has_no_classes(self, mirror, monkeypatch):
        name = "TeCoA4-ViT-B-16-laion2B-s34B-b88K"
        entries = {**zoo._entries(), name: replace(zoo.find(name), arch="timm/vit_tiny_patch16_224")}
        monkeypatch.setattr(zoo, "_entries", lambda: entries)
        path = mirror / entries[name].file
        path.parent.mkdir()
        torch.save(get_architecture("timm/vit_tiny_patch16_224").build(64).state_dict(), path)
        one_line_error(load_classifier, name, match="an encoder without classes: give num_classes")
        assert load_classifier(name, num_classes=3)(torch.rand(1, 3, 224, 224)).shape == (1, 3)

    def test_files_of_one_name_on_the_hub(self):
        pinned = [entry for entry in NEWER if entry.is_downloaded and entry.kind == "encoder"]
        assert {entry.published_name for entry in pinned} == {"open_clip_pytorch_model.bin"}
        assert len({zoo._note(entry) for entry in pinned}) == len({entry.url for entry in pinned}) == 4
        one_line_error(
            zoo.checkpoint, "fare2-clip", match="download https://huggingface.co/chs20/fare2-clip to"
        )

    def test_another_network(self, mirror, random_classifier):
        path = mirror / "Salman2020Do_R18.pt"
        torch.save(random_classifier("shufflenet").state_dict(), path)
        one_line_error(zoo.backbone, "Salman2020Do_R18", match="resnet18")

    def test_the_nearest_name(self):
        one_line_error(
            zoo.find, "Liu2023Comprehensive_Swin_B", match="did you mean Liu2023Comprehensive_Swin-B"
        )


class TestMirror:
    def test_a_pkl_is_taken_as_it_is(self, mirror, cache):
        for name in ("resnet50_l2_eps3", "resnet50_l2_eps3-bgr", "my own"):
            content = backbone_pkl(NAME if name == "my own" else name)
            (mirror / f"{name}.pkl").write_bytes(content)
            assert PathManager.get_local_path(f"robust://{name}.pkl") == str(mirror / f"{name}.pkl")
        with PathManager.open("robust://my own.pkl", "rb") as file:
            assert file.read() == content
        assert not files(cache)

    @pytest.mark.parametrize(
        ("name", "changes", "match"),
        [
            (NAME, {"arch": "resnet18"}, "arch resnet18 instead of shufflenet"),
            (NAME, {"eps": 3.0}, "eps 3.0 instead of 0.0"),
            (NAME, {"norm": "linf"}, "norm linf instead of l2"),
            (NAME, {"input_format": "BGR"}, "input_format BGR instead of RGB"),
            (f"{NAME}-bgr", {"input_format": "RGB"}, "input_format RGB instead of BGR"),
            ("mine-bgr", {"input_format": "RGB"}, "input_format RGB instead of BGR"),
            ("mine", {"pixel_std": [0, 0, 0]}, "its metadata is damaged"),
        ],
    )
    def test_a_pkl_that_is_not_what_its_name_says(self, mirror, name, changes, match):
        (mirror / f"{name}.pkl").write_bytes(backbone_pkl(**changes))
        for function in (zoo.backbone, zoo.weights):
            one_line_error(function, name, match=match)

    @pytest.mark.parametrize("name", [NAME, "mine"])
    def test_a_pkl_that_runs_code(self, mirror, tmp_path, name):
        """Detectron2's own checkpointer would unpickle it."""
        content = {"model": {"weight": Payload(tmp_path / "ran")}, "__author__": "me"}
        (mirror / f"{name}.pkl").write_bytes(pickle.dumps(content))
        path = f"robust://{name}.pkl"
        for function in (zoo.backbone, zoo.weights):
            one_line_error(function, name, match="refused for .*open, which could run code")
        for function in (PathManager.get_local_path, PathManager.open):
            one_line_error(function, path, match="refused for .*open, which could run code")
        assert not (tmp_path / "ran").exists()

    def test_a_pkl_without_metadata(self, mirror):
        (mirror / "mine.pkl").write_bytes(pickle.dumps({"model": {}, "__author__": "me"}))
        one_line_error(zoo.backbone, "mine", match=r"convert it with tools/convert_checkpoint\.py")

    def test_a_pkl_goes_before_the_ckpt(self, mirror, content):
        (mirror / FILE).write_bytes(content)
        (mirror / f"{NAME}.pkl").write_bytes(backbone_pkl())
        assert zoo.backbone(NAME) == str(mirror / f"{NAME}.pkl")

    def test_weights_are_the_classifier_where_there_is_one(self, mirror, content):
        for name in (NAME, "mine"):
            (mirror / f"{name}.pkl").write_bytes(backbone_pkl())
            assert zoo.weights(name) == str(mirror / f"{name}.pkl")
        (mirror / FILE).write_bytes(content)
        assert zoo.weights(NAME) == str(mirror / FILE)

    @pytest.mark.parametrize("name", [NAME, f"{NAME}-bgr"])
    def test_a_ckpt_is_converted_once(self, mirror, cache, content, expected, caplog, name):
        (mirror / FILE).write_bytes(content)
        with caplog.at_level(logging.INFO, logger=zoo.__name__):
            path = PathManager.get_local_path(f"robust://{name}.pkl")
        assert [record.message for record in caplog.records] == [
            f"No SHA-256 of {FILE} is known: {mirror / FILE} is used as it is",
            f"converting {mirror / FILE} to {path}",
        ]
        assert_same(path, expected[name])
        assert Path(path) == cache / "zoo" / f"{sha256(content)}-{zoo._converter()}" / f"{name}.pkl"
        os.utime(path, (1, 1))
        assert zoo.backbone(name) == path
        assert os.path.getmtime(path) == 1
        assert files(mirror) == {FILE}
        assert PathManager.get_local_path(f"robust://{name}.pkl", force=True) == path
        assert os.path.getmtime(path) > 1
        assert_same(path, expected[name])

    @pytest.mark.parametrize("damaged", [b"", b"?", pickle.dumps({"model": {}})])
    def test_a_damaged_conversion_is_made_anew(self, mirror, content, expected, damaged):
        (mirror / FILE).write_bytes(content)
        path = Path(zoo.backbone(NAME))
        path.write_bytes(damaged)
        assert zoo.backbone(NAME) == str(path)
        assert_same(str(path), expected[NAME])

    def test_another_converter_converts_anew(self, mirror, content, monkeypatch):
        (mirror / FILE).write_bytes(content)
        first = zoo.backbone(NAME)
        monkeypatch.setattr(zoo, "_converter", lambda: "another")
        assert zoo.backbone(NAME) != first

    def test_the_threat_model_is_the_tables(self, mirror, content, random_classifier):
        (mirror / "resnet18_linf_eps8.0.ckpt").write_bytes(saved(layout(random_classifier("resnet18"), "")))
        path = zoo.backbone("resnet18_linf_eps8.0")
        metadata = pickle.loads(Path(path).read_bytes())["rt_detectron"]
        assert (metadata["arch"], metadata["norm"], metadata["eps"]) == ("resnet18", "linf", 8.0)

    def test_another_mirrors_file_is_another_backbone(self, mirror, content, random_classifier):
        (mirror / FILE).write_bytes(content)
        first = zoo.backbone(NAME)
        other = layout(random_classifier("shufflenet", 7))
        other["model"]["module.model.model.conv1.0.weight"] += 1
        (mirror / FILE).write_bytes(saved(other))
        second = zoo.backbone(NAME)
        stems = [
            pickle.loads(Path(path).read_bytes())["model"]["trunk.conv1.0.weight"] for path in (first, second)
        ]
        np.testing.assert_allclose(stems[1], stems[0] + 1, rtol=1e-6)

    def test_checkpoint_is_the_mirrors_file(self, mirror, content):
        (mirror / FILE).write_bytes(content)
        assert zoo.checkpoint(NAME) == str(mirror / FILE)

    def test_recorded_hash(self, mirror, cache, content, record, expected):
        record(content)
        (mirror / FILE).write_bytes(content)
        assert zoo.checkpoint(NAME) == str(mirror / FILE)
        path = zoo.backbone(NAME)
        assert_same(path, expected[NAME])
        damaged = bytearray(content)
        damaged[len(damaged) // 2] ^= 1
        (mirror / FILE).write_bytes(damaged)
        for function in (zoo.checkpoint, zoo.backbone):
            message = one_line_error(function, NAME, match="replace it by the published file")
            assert sha256(damaged) in message
            assert sha256(content) in message
        assert (mirror / FILE).read_bytes() == damaged  # it is the user's
        (mirror / FILE).unlink()
        assert zoo.backbone(NAME) == path

    def test_recorded_size(self, mirror, content, record):
        record(content)
        (mirror / FILE).write_bytes(content[:-10])
        sizes = rf"has {len(content) - 10} bytes, but {len(content)} were published"
        one_line_error(zoo.checkpoint, NAME, match=sizes)

    def test_isfile_downloads_nothing(self, mirror, hub):
        (mirror / "mine.pkl").write_bytes(backbone_pkl())
        assert PathManager.isfile("robust://mine.pkl")
        assert PathManager.exists(f"robust://{NAME}-bgr.pkl")
        for name in ("yours.pkl", "mine", "../mirror/mine.pkl", f"{NAME}.ckpt"):
            assert not PathManager.exists(f"robust://{name}")
        assert not hub.downloads

    def test_folder_that_is_not_there(self, mirror, monkeypatch):
        monkeypatch.setenv("RT_DETECTRON_ZOO", str(mirror / "none"))
        one_line_error(zoo.backbone, NAME, match=r"RT_DETECTRON_ZOO is .*none, which is no folder")

    @pytest.mark.parametrize("path", ["../../x.pkl", "/etc/x.pkl", "a/../x.pkl", "a/x.pkl", ".pkl"])
    def test_names_have_no_folders(self, mirror, path):
        (mirror / "a").mkdir()
        (mirror / "a" / "x.pkl").write_bytes(backbone_pkl())
        one_line_error(PathManager.get_local_path, f"robust://{path}", match="has no folders")

    @pytest.mark.parametrize("ending", ["", ".ckpt", ".pth"])
    def test_names_end_in_pkl(self, ending):
        path = f"robust://resnet50_linf_eps4.0{ending}"
        one_line_error(PathManager.get_local_path, path, match=r"write robust://resnet50_linf_eps4\.0\.pkl$")

    def test_unknown_names(self, mirror):
        one_line_error(
            PathManager.get_local_path,
            "robust://resnet50_linf_eps4-bgr.pkl",
            match=r"no resnet50_linf_eps4-bgr\.pkl in RT_DETECTRON_ZOO \(.*mirror\), and the zoo has no "
            r"resnet50_linf_eps4;.* did you mean resnet50_linf_eps4\.0",
        )

    def test_the_zoo_is_read_only(self, mirror):
        (mirror / "mine.pkl").write_bytes(backbone_pkl())
        one_line_error(PathManager.open, "robust://mine.pkl", "wb", match="read-only")

    def test_cache_that_cannot_be_written(self, mirror, cache, content):
        (mirror / FILE).write_bytes(content)
        cache.mkdir()
        (cache / "zoo").write_bytes(b"a file where the folder should be")
        one_line_error(zoo.backbone, NAME, match=r"cannot make the cache .*set RT_DETECTRON_CACHE")


class Payload:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return (builtins.open, (str(self.path), "w"))


class TestBadMirrorFiles:
    @pytest.fixture
    def refused(self, mirror, cache):
        """``refused(content, match)``: one line, and nothing but locks in the cache."""

        def refused(content: bytes, match: str) -> None:
            (mirror / FILE).write_bytes(content)
            one_line_error(zoo.backbone, NAME, match=match)
            assert not files(cache)

        return refused

    @pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
    def test_truncated(self, refused, network, zipped):
        content = saved(layout(network), _use_new_zipfile_serialization=zipped)
        generator = random.Random(0)
        for _ in range(20):
            refused(content[: generator.randrange(1, len(content))], "damaged or not a checkpoint")

    def test_flipped_byte(self, mirror, cache, content, expected):
        """Refused, or without effect: a zip file has padding."""
        generator = random.Random(0)
        refused = 0
        for _ in range(20):
            damaged = bytearray(content)
            damaged[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
            (mirror / FILE).write_bytes(damaged)
            try:
                path = zoo.backbone(NAME)
            except InputError:
                refused += 1
            else:
                metadata = {**expected[NAME]["rt_detectron"], "sha256": sha256(damaged)}
                assert_same(path, {**expected[NAME], "rt_detectron": metadata})
                os.remove(path)
            assert not files(cache)
        assert refused >= 15

    def test_flipped_byte_in_the_older_format(self, refused, network, record):
        """Has no checksums of its own: the recorded SHA-256 finds it."""
        content = saved(layout(network), _use_new_zipfile_serialization=False)
        record(content)
        generator = random.Random(0)
        for _ in range(20):
            damaged = bytearray(content)
            damaged[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
            refused(bytes(damaged), f"has SHA-256 {sha256(damaged)}, but {sha256(content)}")

    def test_payload(self, refused, tmp_path):
        """A file that only runs code; one that also holds weights is read without it."""
        refused(saved(Payload(tmp_path / "ran")), "holds no state dict")
        refused(pickle.dumps(Payload(tmp_path / "ran")), "damaged or not a checkpoint")
        assert not (tmp_path / "ran").exists()

    def test_payload_beside_weights(self, mirror, network, expected, tmp_path):
        payload = Payload(tmp_path / "ran")
        content = saved({**layout(network), "schedule": payload, payload: 1})
        (mirror / FILE).write_bytes(content)
        metadata = {**expected[NAME]["rt_detectron"], "sha256": sha256(content)}
        assert_same(zoo.backbone(NAME), {**expected[NAME], "rt_detectron": metadata})
        assert not (tmp_path / "ran").exists()

    def test_another_network(self, refused, random_classifier):
        refused(saved(layout(random_classifier("mobilenet"))), "do not fit shufflenet: missing conv1")

    def test_nan(self, refused, network):
        content = layout(network)
        name = "module.model.model.stage2.0.branch1.0.weight"
        content["model"][name] = content["model"][name] * float("nan")
        refused(saved(content), r"stage2\.0\.branch1\.0\.weight holds NaN")

    def test_half_precision_loads(self, mirror, network):
        content = layout(network)
        content["model"] = {
            name: tensor.half() if tensor.is_floating_point() else tensor
            for name, tensor in content["model"].items()
        }
        (mirror / FILE).write_bytes(saved(content))
        stem = pickle.loads(Path(zoo.backbone(NAME)).read_bytes())["model"]["trunk.conv1.0.weight"]
        np.testing.assert_array_equal(stem, network.conv1[0].weight.half().float().detach().numpy())

    @pytest.mark.parametrize(
        ("content", "match"),
        [
            (b"", "is empty"),
            (b"<!DOCTYPE html><html>sign in</html>", "web page"),
            (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        ],
    )
    def test_no_checkpoint_at_all(self, refused, mirror, content, match):
        refused(content, match)
        (mirror / FILE).replace(mirror / f"{NAME}.pkl")
        one_line_error(zoo.backbone, NAME, match=match)

    @pytest.mark.parametrize("file", [FILE, f"{NAME}.pkl"])
    def test_folder(self, mirror, cache, file):
        (mirror / file).mkdir()
        one_line_error(zoo.backbone, NAME, match="is a folder")
        assert not files(cache)

    def test_dangling_link(self, mirror, cache):
        (mirror / FILE).symlink_to(mirror / "none")
        one_line_error(zoo.backbone, NAME, match="cannot read")
        assert not files(cache)


def offline(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


class TestHub:
    @pytest.fixture(autouse=True)
    def no_waiting(self, monkeypatch):
        """huggingface_hub tries again after pauses."""
        monkeypatch.setattr("time.sleep", lambda seconds: None)

    @pytest.fixture
    def hub(self, hub, content):
        hub.files[ON_HUB] = content
        return hub

    @pytest.fixture
    def refused(self, hub, tmp_path, cache):
        """``refused(match)``: one line, and no content stays behind, neither ours nor huggingface_hub's."""

        def refused(match: str) -> str:
            message = one_line_error(zoo.backbone, NAME, match=match)
            assert not files(cache)
            kept = {Path(name).parts[2] for name in files(tmp_path / "huggingface")}
            assert kept <= {"refs", ".no_exist"}
            return message

        return refused

    def test_downloads_and_converts_once(self, hub, cache, content, expected, monkeypatch):
        path = PathManager.get_local_path(f"robust://{NAME}.pkl")
        assert_same(path, expected[NAME])
        assert Path(path) == cache / "zoo" / f"{sha256(content)}-{zoo._converter()}" / f"{NAME}.pkl"
        folded = zoo.backbone(f"{NAME}-bgr")
        assert_same(folded, expected[f"{NAME}-bgr"])
        offline(monkeypatch)
        assert zoo.backbone(NAME) == path
        assert zoo.backbone(f"{NAME}-bgr") == folded
        assert hub.downloads == [ON_HUB]

    def test_force_downloads_and_converts_anew(self, hub, expected):
        path = zoo.backbone(NAME)
        os.utime(path, (1, 1))
        assert PathManager.get_local_path(f"robust://{NAME}.pkl", force=True) == path
        assert os.path.getmtime(path) > 1
        assert_same(path, expected[NAME])
        assert hub.downloads == [ON_HUB, ON_HUB]

    def test_checkpoint_is_huggingface_hubs_own_file(self, hub, content, tmp_path, monkeypatch):
        path = Path(zoo.checkpoint(NAME))
        assert path.read_bytes() == content
        assert path.is_relative_to(tmp_path / "huggingface" / "hub")
        offline(monkeypatch)
        assert zoo.checkpoint(NAME) == str(path)
        assert hub.downloads == [ON_HUB]

    def test_the_mirror_goes_first_and_the_hub_has_the_rest(self, hub, mirror, content):
        other = saved(layout(torch.nn.Identity()))
        (mirror / "mobilenet_l2_eps3.ckpt").write_bytes(other)
        assert zoo.checkpoint("mobilenet_l2_eps3") == str(mirror / "mobilenet_l2_eps3.ckpt")
        assert Path(zoo.checkpoint(NAME)).read_bytes() == content

    def test_recorded_hash(self, hub, cache, content, record, expected):
        record(content)
        hub.announced[ON_HUB] = "of-a-server-that-announces-something-else"
        path = zoo.backbone(NAME)
        assert_same(path, expected[NAME])
        assert Path(path).parent.name.startswith(sha256(content))

    def test_recorded_hash_goes_before_the_announced(self, hub, refused, record, content):
        record(content[::-1])
        message = refused("try again")
        assert sha256(content) in message
        assert sha256(content[::-1]) in message

    def test_wrong_hash_is_refused_and_downloaded_anew(self, hub, refused, content, expected):
        hub.damage = lambda content: content[:-1000] + bytes(1000)
        message = refused(r"it was removed; try again, or .*RT_DETECTRON_ZOO=FOLDER")
        assert sha256(content) in message
        assert sha256(hub.damage(content)) in message
        hub.damage = None
        assert_same(zoo.backbone(NAME), expected[NAME])
        assert hub.downloads == [ON_HUB, ON_HUB]

    def test_wrong_hash_of_checkpoint_is_refused(self, hub, content):
        hub.damage = lambda content: content[:-1000] + bytes(1000)
        one_line_error(zoo.checkpoint, NAME, match="it was removed")

    def test_the_store_behind_the_cache_is_no_hash(self, hub, content):
        """The cached file may be a link into a store, under a name that is no SHA-256 of it."""
        path = Path(zoo.checkpoint(NAME))
        blob = path.parent / os.readlink(path)
        store = blob.parents[2] / ("f" * 64)
        blob.rename(store)
        blob.symlink_to(store)
        assert zoo.checkpoint(NAME) == str(path)
        store.write_bytes(content[:-1])
        one_line_error(zoo.checkpoint, NAME, match="it was removed")
        assert not any(os.path.lexists(file) for file in (path, blob, store))
        assert Path(zoo.checkpoint(NAME)).read_bytes() == content

    def test_nothing_outside_the_hubs_cache_is_removed(self, hub, content, tmp_path):
        path = Path(zoo.checkpoint(NAME))
        blob = path.parent / os.readlink(path)
        mine = tmp_path / "mine"
        mine.write_bytes(content[:-1])
        blob.unlink()
        blob.symlink_to(mine)
        one_line_error(zoo.checkpoint, NAME, match="it was removed")
        assert mine.read_bytes() == content[:-1]
        assert Path(zoo.checkpoint(NAME)).read_bytes() == content

    def test_a_snapshot_outside_the_hubs_cache_is_the_users_to_remove(self, hub, content, tmp_path):
        path = Path(zoo.checkpoint(NAME))
        path.parent.rename(tmp_path / "snapshot")
        path.parent.symlink_to(tmp_path / "snapshot")
        path.unlink()
        path.write_bytes(content[:-1])
        one_line_error(zoo.checkpoint, NAME, match="remove it and try again")
        assert path.read_bytes() == content[:-1]

    def test_a_disk_without_links(self, hub, content, refused, expected, monkeypatch):
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_SYMLINKS", True)
        hub.damage = lambda content: content[:-1000] + bytes(1000)
        refused(sha256(content))
        hub.damage = None
        assert_same(zoo.backbone(NAME), expected[NAME])
        source = zoo.checkpoint(NAME)
        assert not Path(source).is_symlink()
        offline(monkeypatch)
        assert zoo.checkpoint(NAME) == source
        os.remove(zoo.backbone(NAME))
        assert_same(zoo.backbone(NAME), expected[NAME])
        Path(source).write_bytes(content[:-1])
        one_line_error(zoo.checkpoint, NAME, match=sha256(content))

    def test_nothing_to_verify_by(self, hub, refused):
        hub.announced[ON_HUB] = "0" * 40  # a git hash, as of small files
        refused("without a SHA-256")

    def test_truncated_body(self, hub, refused, expected):
        hub.damage = lambda content: content[:1000]
        refused("cannot download")
        hub.damage = None
        assert_same(zoo.backbone(NAME), expected[NAME])

    def test_web_page(self, hub, refused, expected):
        hub.web_page = True
        refused("does not seem to be served by a Hugging Face Hub")
        hub.web_page = False
        assert_same(zoo.backbone(NAME), expected[NAME])

    def test_web_page_instead_of_the_body(self, hub, refused):
        hub.damage = lambda content: b"<!DOCTYPE html><html>sign in</html>"
        refused("cannot download")
        hub.damage = lambda content: b"<html>".ljust(len(content))  # not even by its length
        refused("is a web page")

    def test_missing_file(self, hub, refused, content, expected):
        del hub.files[ON_HUB]
        refused(r"does not have it \(status 404\)")
        hub.files[ON_HUB] = content
        assert_same(zoo.backbone(NAME), expected[NAME])

    @pytest.mark.parametrize(
        ("status", "match"),
        [
            (401, "wants a login .status 401.: .*HF_TOKEN"),
            (403, "wants a login .status 403.: .*HF_TOKEN"),
            (404, "does not have it .status 404."),
            (503, "cannot download .*503"),
        ],
    )
    def test_status(self, hub, refused, status, match):
        hub.status = status
        message = refused(match)
        assert f"{hub.url}/{HUB}/resolve/{COMMIT}/{FILE} to FOLDER/{FILE}" in message

    def test_offline(self, hub, refused, monkeypatch, mirror):
        offline(monkeypatch)
        message = refused(f"cannot download {FILE}: .*HF_HUB_OFFLINE")
        assert message.endswith(f"download {hub.url}/{HUB}/resolve/{COMMIT}/{FILE} to {mirror / FILE}")
        monkeypatch.delenv("RT_DETECTRON_ZOO")
        refused(f"to FOLDER/{FILE} and export RT_DETECTRON_ZOO=FOLDER .*is not set")
        assert not hub.downloads

    def test_nobody_listens(self, hub, refused, monkeypatch):
        template = "http://127.0.0.1:9/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
        refused(f"cannot download {FILE}: .*refused")

    def test_slow_server(self, hub, refused, monkeypatch):
        import httpx2

        def time_out(*args, **kwargs):
            raise httpx2.ReadTimeout("The read operation timed out")

        monkeypatch.setattr(httpx2.Client, "request", time_out)
        refused("cannot download .*timed out")

    def test_full_disk(self, hub, refused, monkeypatch):
        def full(*args, **kwargs):
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr("huggingface_hub.file_download.http_get", full)
        refused("the disk is full: .*HF_HOME")

    def test_without_huggingface_hub(self, refused, monkeypatch):
        monkeypatch.setitem(sys.modules, "huggingface_hub", None)
        refused(r'pip install "huggingface_hub>=0\.30"; or download http.* to FOLDER')


@pytest.mark.usefixtures("tool_server")
def test_processes_that_ask_at_once_download_and_convert_once(hub, cache, content, expected, tmp_path):
    """In processes of their own, which take HF_ENDPOINT and HF_HOME from the environment."""
    hub.files[ON_HUB] = content
    hub.delay = 2  # so that all of them ask while the first one downloads
    script = tmp_path / "ask.py"
    script.write_text(f"""
import logging
from rt_detectron.checkpoint import zoo
logging.basicConfig(level=logging.INFO, format="%(name)s %(message)s")
print(zoo.backbone({NAME!r}))
""")
    folders = [tmp_path / str(number) for number in range(3)]
    for folder in folders:
        folder.mkdir()
    processes = [ToolProcess([script], folder) for folder in folders]
    assert [process.wait(120) for process in processes] == [0, 0, 0], processes[0].stderr
    assert len({process.stdout for process in processes}) == 1
    assert_same(processes[0].stdout.strip(), expected[NAME])
    assert sum("converting" in process.stderr for process in processes) == 1
    assert hub.downloads == [ON_HUB]
    note = f"zoo/{COMMIT}-{FILE}.sha256"
    assert files(cache) == {f"zoo/{sha256(content)}-{zoo._converter()}/{NAME}.pkl", note}
