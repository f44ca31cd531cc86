import shutil
from pathlib import Path

import pytest

from rt_detectron.study.grid import load_study


@pytest.fixture
def tools(tmp_path, ray_here):
    """A folder of stand-ins for the tools that a study starts, and Ray to run them."""
    for name in ("train_net.py", "evaluate_robustness.py"):
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
