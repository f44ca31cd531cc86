"""A training that was interrupted ends as one that was not."""

import shutil
from pathlib import Path

import pytest
import torch
from small_detectors import RETINANET, SMALL, differences

from rt_detectron.detection import Trainer, do_train, load_lazy_config
from rt_detectron.utils.errors import InputError

EVERYTHING = {
    **SMALL,
    "SOLVER.EMA": 0.9,
    "SOLVER.ADVERSARIAL.REPLAYS": 3,
    "SOLVER.ADVERSARIAL.NORM": "linf",
    "SOLVER.ADVERSARIAL.EPS": 8.0,
    "SOLVER.ADVERSARIAL.LOSS": "A_box",
    "SOLVER.ADVERSARIAL.CLIP": 6.0,
    "SOLVER.ADVERSARIAL.CARRY_OVER": True,
    "SOLVER.ADVERSARIAL.WARMUP": 0.5,
    "SOLVER.ADVERSARIAL.EVAL_IMAGES": 1,
    "SOLVER.OPTIMIZER": "ADAMW",
    "SOLVER.CLIP_GRADIENTS.CLIP_TYPE": "full_model",
    "TEST.BEST_METRIC": "bbox_attacked/AP",
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


@pytest.mark.parametrize(
    "chosen",
    [EVERYTHING, pytest.param(RETINANET, marks=pytest.mark.slow)],
    ids=["everything", "retinanet"],
)
def test_a_resumed_training_is_bit_equal(tiny_cfg, tmp_path, monkeypatch, chosen):
    monkeypatch.setattr(Trainer, "test", classmethod(lambda cls, *args: {}))
    opts = [*options(chosen), "SOLVER.MAX_ITER", 5, "SOLVER.CHECKPOINT_PERIOD", 2]
    train(tiny_cfg(tmp_path / "whole", *opts))
    whole = load(tmp_path / "whole")
    cut_off(tmp_path / "whole", "model_0000001.pth", tmp_path / "cut")
    assert differences(whole, load(tmp_path / "cut", "model_0000001.pth"))
    train(tiny_cfg(tmp_path / "cut", *opts), resume=True)
    assert not differences(whole, load(tmp_path / "cut"))
    if chosen is EVERYTHING:
        for folder in ("whole", "cut"):
            best = load(tmp_path / folder, "model_best.pth")["best"]
            assert (best["metric"], best["iteration"]) == ("bbox_attacked/AP", 3)


@pytest.fixture
def begun(tiny_cfg, tmp_path, monkeypatch):
    """``begun(KEY=value ...)``: the config of a training of a small detector that was cut off after 4 of 6
    iterations, with checkpoints after 2 and 4."""
    monkeypatch.setattr(Trainer, "test", classmethod(lambda cls, *args: {}))
    keys = {**SMALL, "SOLVER.OPTIMIZER": "SGD", "SOLVER.MAX_ITER": 6}
    keys |= {"SOLVER.CHECKPOINT_PERIOD": 2, "SOLVER.WARMUP_ITERS": 3}

    def make(**changed):
        return tiny_cfg(tmp_path, *options({**keys, **changed}))

    train(make())
    (tmp_path / "model_final.pth").unlink()
    (tmp_path / "last_checkpoint").write_text("model_0000003.pth")
    return make


def test_the_configs_rate_counts_when_a_training_is_resumed(begun, tmp_path, caplog):
    train(begun(**{"SOLVER.BASE_LR": 0.0002}), resume=True)
    assert "The learning rate is now 0.0002, as the config says; it was 0.001 before" in caplog.text
    # Warm-up is over after 3 iterations.
    (group, *_) = load(tmp_path)["trainer"]["_trainer"]["optimizer"]["param_groups"]
    assert group["lr"] == pytest.approx(0.0002)
    caplog.clear()
    train(begun(**{"SOLVER.BASE_LR": 0.0002, "SOLVER.MAX_ITER": 7}), resume=True)
    assert "learning rate is" not in caplog.text


@pytest.mark.parametrize("clip", [False, True])
def test_the_advice_after_a_divergence_works(begun, tmp_path, clip):
    """A lower rate, or gradients clipped or not: the optimiser's state fits in any case."""
    trainer = Trainer(begun(**{"SOLVER.CLIP_GRADIENTS.ENABLED": clip, "SOLVER.BASE_LR": 1e-5}))
    trainer.resume_or_load(resume=True)
    assert {group["initial_lr"] for group in trainer.optimizer.param_groups} == {1e-5}
    assert all("momentum_buffer" in state for state in trainer.optimizer.state.values())
    assert trainer.optimizer.state
    trainer.train()


@pytest.mark.parametrize("damage", ["missing", "truncated", "flipped"])
def test_a_damaged_checkpoint_is_passed_over_and_two_good_ones_stay(begun, tmp_path, damage, caplog):
    path = tmp_path / "model_0000003.pth"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content if damage == "flipped" else content[: len(content) // 2])
    if damage == "missing":
        path.unlink()
    train(begun(**{"SOLVER.MAX_TO_KEEP": 2, "SOLVER.MAX_ITER": 8}), resume=True)
    assert "trying the checkpoint before it" in caplog.text
    names = sorted(path.name for path in tmp_path.glob("*.pth"))
    assert names == ["model_0000003.pth", "model_0000005.pth", "model_final.pth"]
    assert [load(tmp_path, name)["iteration"] for name in names] == [3, 5, 7]


def test_a_checkpoint_of_another_detector_is_one_line(begun):
    with pytest.raises(InputError, match=r"of another configuration|do not fit the model") as error:
        train(begun(**{"MODEL.ROI_BOX_HEAD.FC_DIM": 8}), resume=True)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("before", "now"), [("SGD", "ADAMW"), ("ADAMW", "SGD")])
def test_a_checkpoint_of_another_optimizer_is_one_line(begun, tmp_path, before, now):
    """SGD would find no momentum in the state of AdamW, and begin anew without a word; AdamW would fail."""
    if before == "ADAMW":
        shutil.rmtree(tmp_path)
        train(begun(**{"SOLVER.OPTIMIZER": before, "SOLVER.MAX_ITER": 2}))
    with pytest.raises(InputError, match=r"of another configuration .*its optimizer is of another kind"):
        train(begun(**{"SOLVER.OPTIMIZER": now}), resume=True)


@pytest.mark.parametrize("carry_over", [False, True])
def test_perturbations_of_a_batch_of_another_size_are_not_used(tiny_cfg, tmp_path, monkeypatch, carry_over):
    monkeypatch.setattr(Trainer, "test", classmethod(lambda cls, *args: {}))
    keys = {**SMALL, "SOLVER.ADVERSARIAL.REPLAYS": 3, "SOLVER.MAX_ITER": 2, "SOLVER.IMS_PER_BATCH": 2}
    keys["SOLVER.ADVERSARIAL.CARRY_OVER"] = carry_over
    train(tiny_cfg(tmp_path, *options(keys)))
    assert len(load(tmp_path)["processes"][0]["moved_images"]) == 2
    for iterations, changed in ((3, {"SOLVER.IMS_PER_BATCH": 3}), (5, {"INPUT.MIN_SIZE_TRAIN": "(40,)"})):
        train(tiny_cfg(tmp_path, *options({**keys, **changed, "SOLVER.MAX_ITER": iterations})), resume=True)
        assert load(tmp_path)["iteration"] == iterations - 1


def test_checkpoints_ahead_of_evaluations_make_room(tiny_cfg, tmp_path, monkeypatch):
    monkeypatch.setattr(Trainer, "test", classmethod(lambda cls, *args: {}))
    seen = []
    monkeypatch.setattr(
        Trainer, "_evaluate", lambda self: seen.append(Path(tmp_path, "last_checkpoint").read_text()) or {}
    )
    keys = {**SMALL, "SOLVER.MAX_ITER": 10, "SOLVER.CHECKPOINT_PERIOD": 4, "TEST.EVAL_PERIOD": 1}
    train(tiny_cfg(tmp_path, *options(keys)))
    assert seen == [*[f"model_{number:07d}.pth" for number in range(9)], "model_final.pth"]
    left = sorted(int(path.stem[6:]) for path in tmp_path.glob("model_0*.pth"))
    assert left == [3, 7, 8]


def test_the_reference_for_divergence_is_resumed(begun, tmp_path):
    trainer = Trainer(begun())
    trainer._trainer._losses.extend([1.0] * 20)
    trainer._trainer._at_first = 1.0
    state = trainer.state_dict()
    other = Trainer(begun())
    other.load_state_dict(state)
    other._trainer._losses.extend([1000.0] * 11)
    other._trainer._check_explosion()
    assert other.has_diverged()


@pytest.mark.slow
def test_a_lazy_training_is_resumed_bit_by_bit(sets, tiny_lazy_opts, tmp_path, monkeypatch):
    names = [f"dataloader.{k}.dataset.names={sets[v]}" for k, v in {"train": "train", "test": "val"}.items()]
    opts = [*names, *tiny_lazy_opts, "train.device=cpu", "train.max_iter=4", "train.checkpointer.period=2"]
    opts += ["train.ema=0.9", "train.adversarial.replays=3", "train.eval_period=0"]
    cfg = load_lazy_config("configs/lazy/mask_rcnn_robust_r50_eps3.py", opts)
    cfg.dataloader.pop("evaluator")
    cfg.train.output_dir = str(tmp_path / "whole")
    do_train(cfg)
    cut_off(tmp_path / "whole", "model_0000001.pth", tmp_path / "cut")
    cfg.train.output_dir = str(tmp_path / "cut")
    do_train(cfg, resume=True)
    assert not differences(load(tmp_path / "whole"), load(tmp_path / "cut"))
    assert (tmp_path / "cut/config.yaml").is_file()
