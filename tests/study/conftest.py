import importlib.util
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import yaml
from PIL import Image
from pycocotools import mask as rle_masks

from rt_detectron.study.evaluations import compared
from rt_detectron.study.load import load_study
from rt_detectron.study.report import write_report
from rt_detectron.study.statistics import QUANTITY, TRIAL


@pytest.fixture
def tools(tmp_path, ray_here):
    """A folder of stand-ins for the tools that a study starts, and Ray to run them."""
    for name in ("train_net.py", "evaluate_robustness.py", "transfer.py"):
        shutil.copy(Path(__file__).with_name(f"fake_{name}"), tmp_path / name)
    return tmp_path


@pytest.fixture
def make_study(tmp_path, monkeypatch):
    """``make_study(opts=..., seeds=...)``: a checked study of two arms 1.5 AP apart."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "std.pkl").write_text("20")
    (tmp_path / "l2.pkl").write_text("21.5")
    (tmp_path / "mask.yaml").write_text("DATASETS:\n  TRAIN: ('tiny_train',)\n")

    def make(opts=(), seeds=(1, 2), learning_rates=(0.02,), robust_opts=(), name="test", more=""):
        (tmp_path / "study.yaml").write_text(
            f"""
name: {name}
baseline: standard
arms:
  standard: {{weights: std.pkl}}
  robust: {{weights: l2.pkl, opts: {list(robust_opts)}}}
detectors: {{mask_rcnn: {{config: mask.yaml}}}}
learning_rates: {list(learning_rates)}
seeds: {list(seeds)}
opts: {list(opts)}
{more}
"""
        )
        return load_study("study.yaml")

    return make


@pytest.fixture
def make_transfer_study(tmp_path, monkeypatch):
    """``make_transfer_study(opts=..., seeds=..., rates=...)``: the same arms on a classification data set."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "std.pkl").write_text("60")
    (tmp_path / "l2.pkl").write_text("62.5")
    (tmp_path / "common").mkdir()
    (tmp_path / "common" / "base.py").write_text(
        "dataset = dict(name='', classes=None, downscale=32, held_out=False)\n"
    )
    (tmp_path / "fixed.py").write_text(
        "from .common.base import dataset\nweights = ''\noptimizer = dict(lr=0.0)\n"
        "train = dict(output_dir='', seed=0)\n"
    )

    def make(opts="[dataset.name, cifar10]", seeds=(1, 2), rates=(0.01,)):
        (tmp_path / "study.yaml").write_text(
            f"""
name: test
baseline: standard
arms:
  standard: {{weights: std.pkl, eps: 0, source_accuracy: 75.8}}
  robust: {{weights: l2.pkl, eps: 3, source_accuracy: 62.8}}
transfers: {{cifar10: {{config: fixed.py, opts: {opts}}}}}
learning_rates: {list(rates)}
seeds: {list(seeds)}
retries: 0
"""
        )
        return load_study("study.yaml")

    return make


@pytest.fixture
def write_study(tmp_path, monkeypatch):
    """Writes study.yaml, valid but for the given changes (None removes a key); gives its name."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "std.pkl").write_bytes(b"standard")
    (tmp_path / "l2.pkl").write_bytes(b"robust")
    (tmp_path / "base.yaml").write_text("DATASETS:\n  TRAIN: ('a_train', 'b')\n")
    (tmp_path / "mask.yaml").write_text("_BASE_: base.yaml\n")

    def write(**changes):
        study = {
            "name": "test",
            "baseline": "standard",
            "arms": {
                "standard": {"weights": "std.pkl"},
                "l2": {"weights": "l2.pkl", "opts": ["A.B", [1, 2]]},
            },
            "detectors": {"mask": {"config": "mask.yaml", "opts": ["A.C", True]}},
            "learning_rates": [0.02, "1e-2"],
            "seeds": [1, 2],
            "opts": ["A.D", 0.5],
            **changes,
        }
        text = yaml.safe_dump(
            {key: value for key, value in study.items() if value is not None}, sort_keys=False
        )
        (tmp_path / "study.yaml").write_text(text)
        return "study.yaml"

    return write


@pytest.fixture(scope="session")
def make_table():
    """``make_table({(target, arm): {quantity: {seed: value}}})``: the tidy table of final trials."""

    def make(values):
        lines = [
            ["final", arm, target, 0.01, seed, "", *quantity, value]
            for (target, arm), quantities in values.items()
            for quantity, by_seed in quantities.items()
            for seed, value in by_seed.items()
        ]
        return pd.DataFrame(lines, columns=[*TRIAL, *QUANTITY, "value"], dtype=object).astype(
            {"value": float}
        )

    return make


@pytest.fixture(scope="session")
def tiny_coco(tmp_path_factory):
    """Six image files with three annotated discs each, of two categories; gives the folder of val.json."""
    root = tmp_path_factory.mktemp("coco")
    images, annotations = [], []
    y, x = np.mgrid[:80, :120]
    for image_id in range(1, 7):
        pixels = np.stack([x * 2, y * 3, np.full_like(x, 40 * image_id)], axis=2).astype(np.uint8)
        images.append({"id": image_id, "file_name": f"{image_id}.jpg", "width": 120, "height": 80})
        for number, radius in enumerate((8, 12, 18)):
            left = 5 + 38 * number
            disc = (x - left - radius) ** 2 + (y - 20 - radius) ** 2 < radius**2
            pixels[disc] = (200, 60 * number, 30)
            rle = rle_masks.encode(np.asfortranarray(disc.astype(np.uint8)))
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": 7 + number % 2,
                    "bbox": [left, 20, 2 * radius, 2 * radius],
                    "area": int(disc.sum()),
                    "iscrowd": 0,
                    "segmentation": {"size": rle["size"], "counts": rle["counts"].decode()},
                }
            )
        Image.fromarray(pixels).save(root / f"{image_id}.jpg")
    categories = [{"id": 7, "name": "<b>disc</b>"}, {"id": 8, "name": "ball"}]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (root / "val.json").write_text(json.dumps(content))
    return root


@pytest.fixture(scope="session")
def build_study(tiny_coco):
    """``build_study(folder, seeds=..., ...)``: a finished study on the tiny set, see fake_study.py."""
    spec = importlib.util.spec_from_file_location("fake_study", Path(__file__).with_name("fake_study.py"))
    fake_study = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fake_study)

    def build(folder, **options):
        return fake_study.build(folder, tiny_coco / "val.json", tiny_coco, **options)

    return build


@pytest.fixture(scope="session")
def whole_report(tmp_path_factory, build_study):
    """The report of a study of three arms, two detectors, two seeds and all evaluations."""
    folder = tmp_path_factory.mktemp("study")
    study, outcomes = build_study(folder, name="A <script>alert(1)</script> study")
    comparison = compared(study, outcomes)
    page = write_report(comparison, folder / "out", "python tools/compare.py --study <x>")
    return SimpleNamespace(study=study, outcomes=outcomes, page=page, folder=page.parent)
