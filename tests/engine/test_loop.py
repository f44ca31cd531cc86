"""What a training leaves to be resumed from. Kills, signals and full disks: tests/tools/test_pretrain.py."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from rt_detectron.checkpoint.checkpointer import periodic_checkpoints
from rt_detectron.engine.loop import folder_of_evaluation, sole_run
from rt_detectron.pretrain.strategies import Adversarial
from rt_detectron.pretrain.trainer import do_train
from rt_detectron.utils.errors import InputError


@pytest.fixture(scope="module")
def cut_off(make_digits_cfg, tmp_path_factory):
    """The output folder of a training cut off after 6 of 8 iterations, with checkpoints after 2, 4 and 6."""
    cfg = make_digits_cfg(tmp_path_factory.mktemp("cut_off"))
    cfg.train.update(epochs=1.5, checkpoint_epochs=0.5)
    do_train(cfg)
    folder = Path(cfg.train.output_dir)
    (folder / "model_final.pth").rename(folder / "model_0000005.pth")
    (folder / "last_checkpoint").write_text("model_0000005.pth")
    return folder


@pytest.fixture
def trained(cut_off, digits_cfg):
    """A copy of it in the output folder of ``digits_cfg``, which goes on to 8 iterations."""
    digits_cfg.train.update(epochs=2, checkpoint_epochs=0.5)
    return Path(shutil.copytree(cut_off, digits_cfg.train.output_dir, dirs_exist_ok=True))


def test_only_the_last_ones_are_kept(trained, digits_cfg):
    do_train(digits_cfg, resume=True)
    names = sorted(path.name for path in trained.glob("*.pth"))
    assert names == ["classifier.pth", "model_0000003.pth", "model_0000005.pth", "model_final.pth"]


@pytest.mark.parametrize(
    "damage", ["truncated", pytest.param("empty", marks=pytest.mark.slow), "missing", "flipped"]
)
def test_a_damaged_checkpoint_is_passed_over(trained, digits_cfg, damage, caplog):
    path = trained / "model_0000005.pth"
    content = bytearray(path.read_bytes())
    if damage == "missing":
        path.unlink()
    else:
        content[len(content) // 2] ^= 1
        size = {"truncated": len(content) // 2, "empty": 0, "flipped": len(content)}[damage]
        path.write_bytes(content[:size])
    do_train(digits_cfg, resume=True)
    assert "trying the checkpoint before it" in caplog.text
    assert torch.load(trained / "model_final.pth", weights_only=True)["iteration"] == 7
    kept = [torch.load(path, weights_only=True)["iteration"] for path in periodic_checkpoints(str(trained))]
    assert kept == [3, 5]


def test_without_a_whole_checkpoint_it_says_so(trained, digits_cfg):
    for path in trained.glob("model_*.pth"):
        path.write_bytes(b"")
    with pytest.raises(InputError, match=r"out has no checkpoint that can be read: .*model_0000005.pth"):
        do_train(digits_cfg, resume=True)


def test_a_checkpoint_of_another_configuration_is_one_line(trained, digits_cfg):
    digits_cfg.train.ema = 0.9
    with pytest.raises(InputError, match=r"model_0000005.pth is of another configuration .*ema") as error:
        do_train(digits_cfg, resume=True)
    assert "\n" not in str(error.value)


def test_no_code_in_a_checkpoint_is_run(trained, digits_cfg):
    class Harmful:
        def __reduce__(self):
            return os.mkdir, (str(trained / "harmed"),)

    for path in trained.glob("model_*.pth"):
        torch.save({"model": Harmful()}, path)
    with pytest.raises(InputError, match="no checkpoint that can be read"):
        do_train(digits_cfg, resume=True)
    assert not (trained / "harmed").exists()


def test_leftovers_of_a_killed_process_are_removed(trained, digits_cfg):
    leftover = trained / "model_0000009.pth.4711.tmp"
    leftover.write_bytes(b"half")
    do_train(digits_cfg, resume=True)
    assert not leftover.exists()


def test_a_training_is_not_overwritten(trained, digits_cfg):
    with pytest.raises(InputError, match="holds a training: add --resume"):
        do_train(digits_cfg)


@pytest.mark.parametrize("broken_at", [0, 3, 5])
def test_a_loss_that_is_not_finite_stops_with_the_last_good_checkpoint(
    digits_cfg, broken_at, monkeypatch, caplog
):
    digits_cfg.train.update(epochs=2, checkpoint_epochs=0.5, log_period=20)
    calls = []

    def breaking(self, *args):
        calls.append(1)
        losses = original(self, *args)
        return {"loss": losses["loss"] * float("nan")} if len(calls) == broken_at + 1 else losses

    original = Adversarial.losses
    monkeypatch.setattr(Adversarial, "losses", breaking)
    with pytest.raises(InputError, match=rf"not finite around iteration {broken_at}; log.txt names"):
        do_train(digits_cfg)
    assert f"Loss nan at iteration {broken_at} on " in caplog.text
    assert caplog.text.count(".png") == 16  # the batch
    folder = digits_cfg.train.output_dir
    assert not os.path.exists(f"{folder}/classifier.pth")
    checkpoints = periodic_checkpoints(folder)
    assert bool(checkpoints) == (broken_at > 1)
    for path in checkpoints:
        state = torch.load(path, weights_only=True)
        assert state["iteration"] < broken_at
        assert all(torch.isfinite(tensor).all() for tensor in state["model"].values())


def test_a_folder_has_one_run_at_a_time(tmp_path):
    folder = str(tmp_path / "out")
    with (
        sole_run(folder),
        pytest.raises(InputError, match=r"another process writes to .*out: wait for its end"),
    ):
        sole_run(folder).__enter__()
    with sole_run(folder):
        pass


def test_an_evaluation_into_a_trainings_folder_goes_below_it(tmp_path):
    assert folder_of_evaluation(str(tmp_path / "none")) == str(tmp_path / "none")
    assert folder_of_evaluation(str(tmp_path)) == str(tmp_path)
    for name in ("model_0000004.pth", "model_final.pth"):
        (tmp_path / name).touch()
        assert folder_of_evaluation(str(tmp_path)) == str(tmp_path / "evaluation")
        (tmp_path / name).unlink()


def test_the_recipes_rate_counts_when_a_training_is_resumed(trained, digits_cfg, caplog):
    digits_cfg.optimizer.lr /= 100
    do_train(digits_cfg, resume=True)
    lines = map(json.loads, (trained / "metrics.json").read_text().splitlines())
    (rate,) = [line["lr"] for line in lines if line.get("iteration") == 7 and "lr" in line]
    assert 0 < rate <= digits_cfg.optimizer.lr
    assert f"The learning rate is now {digits_cfg.optimizer.lr:g}, as the config says" in caplog.text


def test_a_finished_training_without_periodic_checkpoints_is_not_overwritten(trained, digits_cfg):
    for path in periodic_checkpoints(str(trained)):
        os.rename(path, trained / "model_final.pth")
    with pytest.raises(InputError, match="holds a training: add --resume"):
        do_train(digits_cfg)


def test_a_refused_training_leaves_the_config_of_the_one_before(trained, digits_cfg):
    before = (trained / "config.yaml").read_text()
    digits_cfg.train.ema = 0.9
    with pytest.raises(InputError, match="of another configuration"):
        do_train(digits_cfg, resume=True)
    assert (trained / "config.yaml").read_text() == before
