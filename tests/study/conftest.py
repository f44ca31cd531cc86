import shutil
from pathlib import Path

import pytest

from rt_detectron.study.grid import load_study


@pytest.fixture
def train_net(tmp_path):
    """The stand-in for tools/train_net.py."""
    return Path(shutil.copy(Path(__file__).with_name("fake_train_net.py"), tmp_path / "train_net.py"))


@pytest.fixture
def make_study(tmp_path, monkeypatch):
    """``make_study(opts=..., seeds=...)``: a checked study of two arms 1.5 AP apart."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "std.pkl").write_text("20")
    (tmp_path / "l2.pkl").write_text("21.5")
    (tmp_path / "mask.yaml").write_text("A: 1\n")

    def make(opts=(), seeds=(1, 2), learning_rates=(0.02,), robust_opts=(), name="test"):
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
"""
        )
        return load_study("study.yaml")

    return make
