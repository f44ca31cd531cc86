"""Averaging, keeping the best, stopping and giving up, on real trainings of a few iterations."""

import json
import os
import signal
from pathlib import Path

import pytest
import torch
from detectron2.utils import comm

from rt_detectron.detection import Trainer, load_detector_config
from rt_detectron.detection.hooks import build_average
from rt_detectron.detection.steps import DetectorTrainer
from rt_detectron.utils.errors import InputError

CONFIG = "configs/demo/mask_rcnn_r18_fpn.yaml"
WEIGHT = "backbone.fpn_output2.weight"


@pytest.fixture
def scripted(monkeypatch):
    """Evaluations give these box APs, one after the other, and note the weights they are about."""
    noted = []

    def script(*aps):
        left = list(aps)

        def test(cls, cfg, model, evaluators=None):
            noted.append(model.state_dict()[WEIGHT].clone())
            return {"bbox": {"AP": left.pop(0)}}

        monkeypatch.setattr(Trainer, "test", classmethod(test))
        return noted

    return script


def train(cfg, resume=False) -> Trainer:
    torch.manual_seed(0)
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=resume)
    trainer.train()
    return trainer


def load(folder, name) -> dict:
    return torch.load(f"{folder}/{name}.pth", weights_only=True)


class TestAveragedWeights:
    def test_the_average_is_evaluated_and_saved_and_is_its_formula(self, tiny_cfg, tmp_path, scripted):
        noted, weights = scripted(1.0), []
        cfg = tiny_cfg(tmp_path, "SOLVER.MAX_ITER", 4, "SOLVER.EMA", 0.4, "SOLVER.CHECKPOINT_PERIOD", 1)
        trainer = train(cfg)
        names = [f"model_{i:07d}" for i in range(3)] + ["model_final"]
        weights = [
            load(tmp_path, name)["trainer"]["hooks"]["AveragedWeights"]["weights"][WEIGHT] for name in names
        ]
        expected = weights[0]
        for step in range(1, 4):
            decay = min(0.4, (1 + step) / (10 + step))
            expected = decay * expected + (1 - decay) * weights[step]
        saved = load(tmp_path, "model_final")["model"][WEIGHT]
        torch.testing.assert_close(saved, expected)
        assert torch.equal(noted[0], saved)
        assert torch.equal(trainer.model.state_dict()[WEIGHT], weights[3])
        assert not torch.equal(saved, weights[3])
        # It starts from the backbone's file, as the weights themselves do.
        stem = "backbone.bottom_up.stem.conv1.weight"
        state = load(tmp_path, "model_final")
        frozen = state["trainer"]["hooks"]["AveragedWeights"]["weights"][stem]
        assert torch.equal(state["model"][stem], frozen)

    def test_a_resumed_average_goes_on(self, tiny_cfg, tmp_path, scripted):
        scripted(*[1.0] * 3)
        opts = ["SOLVER.EMA", 0.9, "SOLVER.CHECKPOINT_PERIOD", 2, "SOLVER.MAX_ITER"]
        train(tiny_cfg(tmp_path, *opts, 2))
        before = load(tmp_path, "model_final")
        trainer = Trainer(tiny_cfg(tmp_path, *opts, 3))
        trainer.resume_or_load(resume=True)
        weights = before["trainer"]["hooks"]["AveragedWeights"]["weights"][WEIGHT]
        assert torch.equal(trainer.model.state_dict()[WEIGHT], weights)
        assert torch.equal(trainer.evaluated.state_dict()[WEIGHT], before["model"][WEIGHT])
        trainer.train()
        after = load(tmp_path, "model_final")
        now = after["trainer"]["hooks"]["AveragedWeights"]["weights"][WEIGHT]
        decay = 3 / 12
        torch.testing.assert_close(
            after["model"][WEIGHT], decay * before["model"][WEIGHT] + (1 - decay) * now
        )

    @pytest.mark.parametrize("decay", [-0.1, 1.0, 2.0])
    def test_a_decay_that_cannot_be_is_refused(self, decay):
        with pytest.raises(InputError, match="it must be from 0"):
            build_average(torch.nn.Linear(1, 1), decay)


class TestBestCheckpointer:
    OPTS = ("TEST.EVAL_PERIOD", 1, "SOLVER.CHECKPOINT_PERIOD", 1, "SOLVER.MAX_ITER")

    def test_the_best_weights_are_kept_over_resumed_trainings(self, tiny_cfg, tmp_path, scripted):
        noted = scripted(3.0, 7.0, float("nan"), 5.0, 6.0, 8.0)
        train(tiny_cfg(tmp_path, *self.OPTS, 4))
        best = load(tmp_path, "model_best")
        assert best["best"] == {"metric": "bbox/AP", "value": 7.0, "iteration": 1}
        assert torch.equal(best["model"][WEIGHT], noted[1])
        assert best["rt_detectron"]["arch"] == "resnet18"
        assert "trainer" not in best
        assert Path(tmp_path, "last_checkpoint").read_text() == "model_final.pth"
        train(tiny_cfg(tmp_path, *self.OPTS, 5), resume=True)  # 6.0 is less than what was best before
        assert load(tmp_path, "model_best")["best"]["value"] == 7.0
        train(tiny_cfg(tmp_path, *self.OPTS, 6), resume=True)
        assert load(tmp_path, "model_best")["best"]["value"] == 8.0

    def test_a_new_training_forgets_what_an_old_one_left(self, tiny_cfg, tmp_path, scripted):
        scripted(3.0, 2.0)
        train(tiny_cfg(tmp_path, *self.OPTS, 1))
        train(tiny_cfg(tmp_path, *self.OPTS, 1))
        assert load(tmp_path, "model_best")["best"]["value"] == 2.0

    @pytest.mark.parametrize("opts", [("TEST.BEST_METRIC", ""), ("TEST.EVAL_PERIOD", 0)], ids=lambda o: o[0])
    def test_none_is_kept_unless_asked_for(self, tiny_cfg, tmp_path, scripted, opts):
        scripted(3.0, 4.0)
        train(tiny_cfg(tmp_path, *self.OPTS, 2, *opts))
        assert not Path(tmp_path, "model_best.pth").exists()


class TestGivingUp:
    @pytest.fixture
    def breaking(self, monkeypatch):
        """``breaking(iteration)``: from then on the weights are not finite, and so the losses."""

        def at(iteration):
            original = DetectorTrainer.run_step

            def run_step(self):
                original(self)
                if self.iter == iteration:
                    self.model.backbone.fpn_output2.weight.data.fill_(float("nan"))

            monkeypatch.setattr(DetectorTrainer, "run_step", run_step)

        return at

    def test_the_last_good_checkpoint_stays(self, tiny_cfg, tmp_path, breaking, monkeypatch, caplog):
        breaking(3)
        monkeypatch.setattr(Trainer, "test", lambda *args: pytest.fail("evaluated"))
        cfg = tiny_cfg(tmp_path, "SOLVER.MAX_ITER", 9, "SOLVER.CHECKPOINT_PERIOD", 2)
        with pytest.raises(
            InputError,
            match=r"the training diverged around iteration 3; log.txt says how. .*model_0000001.pth is from "
            r"before that: go on from it with --resume and a lower SOLVER.BASE_LR, or with "
            r"SOLVER.CLIP_GRADIENTS.ENABLED True",
        ) as error:
            train(cfg)
        assert "\n" not in str(error.value)
        assert "Diverged: " in caplog.text
        assert [path.name for path in tmp_path.glob("model_*")] == ["model_0000001.pth"]
        saved = load(tmp_path, "model_0000001")["model"]
        assert all(torch.isfinite(tensor).all() for tensor in saved.values())

    def test_in_the_last_iteration_nothing_is_evaluated(self, tiny_cfg, tmp_path, breaking, monkeypatch):
        breaking(0)
        monkeypatch.setattr(Trainer, "test", lambda *args: pytest.fail("evaluated"))
        Path(tmp_path, "last_checkpoint").write_text("of_another_training.pth")
        with pytest.raises(InputError, match=r"iteration 0; log.txt says how. Start again with a lower"):
            train(tiny_cfg(tmp_path, "SOLVER.MAX_ITER", 1))
        assert not list(tmp_path.glob("model_*"))


class TestSignals:
    @pytest.mark.parametrize(
        ("signum", "end"), [(signal.SIGTERM, SystemExit), (signal.SIGINT, KeyboardInterrupt)]
    )
    def test_a_signal_saves_after_the_step_and_resuming_goes_on(
        self, tiny_cfg, tmp_path, scripted, monkeypatch, signum, end
    ):
        scripted(1.0)
        original, ran = DetectorTrainer.run_step, []

        def run_step(self):
            ran.append(self.iter)
            if ran == [0, 1]:
                os.kill(os.getpid(), signum)
            original(self)

        monkeypatch.setattr(DetectorTrainer, "run_step", run_step)
        handlers = [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)]
        cfg = tiny_cfg(tmp_path, "SOLVER.MAX_ITER", 3)
        with pytest.raises(end) as ended:
            train(cfg)
        assert end is KeyboardInterrupt or ended.value.code == 0
        assert load(tmp_path, "model_0000001")["iteration"] == 1
        train(cfg, resume=True)
        assert ran == [0, 1, 2]
        assert [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)] == handlers

    def test_a_signal_interrupts_an_evaluation_and_saves_first(self, tiny_cfg, tmp_path, monkeypatch):
        def test(cls, cfg, model, evaluators=None):
            os.kill(os.getpid(), signal.SIGTERM)
            pytest.fail("went on")

        monkeypatch.setattr(Trainer, "test", classmethod(test))
        with pytest.raises(SystemExit):
            train(tiny_cfg(tmp_path, "SOLVER.MAX_ITER", 5, "TEST.EVAL_PERIOD", 2))
        state = load(tmp_path, "model_0000001")
        assert (state["iteration"], state["trainer"]["iteration"]) == (1, 1)


def test_evaluations_during_training_are_in_the_metrics(tiny_cfg, tmp_path, scripted):
    scripted(10.0, 20.0)
    train(tiny_cfg(tmp_path, "SOLVER.MAX_ITER", 4, "TEST.EVAL_PERIOD", 2))
    lines = [json.loads(line) for line in Path(tmp_path, "metrics.json").read_text().splitlines()]
    assert [line["bbox/AP"] for line in lines if "bbox/AP" in line] == [10.0, 20.0]


def test_an_interrupted_evaluation_is_made_when_the_training_goes_on(tiny_cfg, tmp_path, monkeypatch):
    noted = []

    def test(cls, cfg, model, evaluators=None):
        noted.append(model.state_dict()[WEIGHT].clone())
        if len(noted) == 1:
            raise KeyboardInterrupt
        return {"bbox": {"AP": 10.0 * len(noted)}}

    monkeypatch.setattr(Trainer, "test", classmethod(test))
    keys = ("TEST.EVAL_PERIOD", 2, "SOLVER.CHECKPOINT_PERIOD", 1, "SOLVER.MAX_ITER")
    with pytest.raises(KeyboardInterrupt):
        train(tiny_cfg(tmp_path, *keys, 4))
    original = DetectorTrainer.run_step

    def run_step(self):
        if self.iter == 2 and len(noted) == 2:
            raise RuntimeError("killed once more, behind the evaluation")
        original(self)

    monkeypatch.setattr(DetectorTrainer, "run_step", run_step)
    with pytest.raises(RuntimeError, match="killed once more"):
        train(tiny_cfg(tmp_path, *keys, 4), resume=True)
    assert torch.equal(noted[1], noted[0])  # the same weights
    assert load(tmp_path, "model_best")["best"] == {"metric": "bbox/AP", "value": 20.0, "iteration": 1}
    noted.append(noted[1])
    train(tiny_cfg(tmp_path, *keys, 4), resume=True)
    lines = [json.loads(line) for line in Path(tmp_path, "metrics.json").read_text().splitlines()]
    found = [(line["iteration"], line["bbox/AP"]) for line in lines if "bbox/AP" in line]
    assert found == [(1, 20.0), (4, 40.0)]  # it was recorded, so it is not made again


def preempted_in_one_process(opts):
    """Runs in each of two processes; the second alone gets the signal."""
    cfg = load_detector_config(CONFIG, opts)
    original = DetectorTrainer.run_step

    def run_step(self):
        if self.iter == 1 and comm.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        original(self)

    DetectorTrainer.run_step = run_step
    train(cfg)


def test_a_signal_to_one_process_stops_both(tiny_opts, tmp_path, launch):
    opts = [*tiny_opts, "OUTPUT_DIR", str(tmp_path), "SOLVER.MAX_ITER", 1000]
    launch(preempted_in_one_process, [str(opt) for opt in opts])
    assert [path.name for path in tmp_path.glob("*.pth")] == ["model_0000001.pth"]
    assert load(tmp_path, "model_0000001")["iteration"] == 1
