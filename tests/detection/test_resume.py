"""A training that was interrupted ends as one that was not."""

import shutil
from pathlib import Path

import pytest
import torch
from small_detectors import RETINANET, SMALL, differences

from rt_detectron.detection import Trainer

EVERYTHING = {
    **SMALL,
    "SOLVER.EMA": 0.9,
    "SOLVER.ADVERSARIAL.REPLAYS": 3,
    "SOLVER.ADVERSARIAL.NORM": "linf",
    "SOLVER.ADVERSARIAL.EPS": 8.0,
    "DATALOADER.ASPECT_RATIO_GROUPING": True,
    "TEST.PRECISE_BN.ENABLED": True,
    "TEST.PRECISE_BN.NUM_ITER": 1,
    "TEST.EVAL_PERIOD": 4,
    "DATALOADER.NUM_WORKERS": 1,
}


def options(chosen: dict) -> list:
    return [part for pair in chosen.items() for part in pair]


def load(folder, name="model_final.pth") -> dict:
    return torch.load(Path(folder) / name, weights_only=True)


def cut_off(folder: Path, name: str, copy: Path) -> None:
    """What a training leaves that was killed after it had saved checkpoint ``name``."""
    copy.mkdir()
    for path in folder.glob("model_0*.pth"):
        if path.name <= name:
            shutil.copy(path, copy)
    (copy / "last_checkpoint").write_text(name)


def train(cfg, resume=False) -> None:
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=resume)
    trainer.train()


@pytest.mark.parametrize("chosen", [EVERYTHING, RETINANET], ids=["everything", "retinanet"])
def test_a_resumed_training_is_bit_equal(tiny_cfg, tmp_path, monkeypatch, chosen):
    monkeypatch.setattr(Trainer, "test", classmethod(lambda cls, *args: {}))
    opts = [*options(chosen), "SOLVER.MAX_ITER", 5, "SOLVER.CHECKPOINT_PERIOD", 2]
    train(tiny_cfg(tmp_path / "whole", *opts))
    whole = load(tmp_path / "whole")
    cut_off(tmp_path / "whole", "model_0000001.pth", tmp_path / "cut")
    assert differences(whole, load(tmp_path / "cut", "model_0000001.pth"))
    train(tiny_cfg(tmp_path / "cut", *opts), resume=True)
    assert not differences(whole, load(tmp_path / "cut"))
