import json
import math
import re
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.engine import DefaultTrainer, SimpleTrainer
from detectron2.modeling import build_model

from rt_detectron.checkpoint import zoo
from rt_detectron.checkpoint.architectures import get_architecture
from rt_detectron.checkpoint.checkpointer import RobustCheckpointer
from rt_detectron.detection import Trainer, load_detector_config
from rt_detectron.detection.steps import block_depths
from rt_detectron.detection.trainer import best_metric
from rt_detectron.evaluation.results import write_results
from rt_detectron.utils.errors import InputError

CONFIG = "configs/demo/mask_rcnn_r18_fpn.yaml"
SHIPPED = sorted(path for path in Path("configs").rglob("*.yaml") if "study" not in path.parts)
PAIRS = sorted(path for path in SHIPPED if "robust_" in path.name)
OF_TIMM = [path for path in PAIRS if path.stem.endswith("_eps4") and "_r50_" not in path.stem]


@pytest.fixture(scope="module")
def run(tiny_cfg, tmp_path_factory) -> CfgNode:
    """The config of a finished training of three iterations."""
    cfg = tiny_cfg(tmp_path_factory.mktemp("run"), "SOLVER.MAX_ITER", 3)
    torch.manual_seed(0)
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=False)
    trainer.train()
    write_results(cfg, trainer._last_eval_results, 12.34, 3)
    return cfg


def final(cfg) -> str:
    return f"{cfg.OUTPUT_DIR}/model_final.pth"


def baseline(path: Path) -> Path:
    """Of a robust config's."""
    return path.with_name(re.sub(r"eps\d", "eps0", path.name.replace("robust", "standard")))


def loaded(cfg) -> torch.nn.Module:
    model = Trainer.build_model(cfg)
    RobustCheckpointer(model, cfg.OUTPUT_DIR).resume_or_load(cfg.MODEL.WEIGHTS, resume=False)
    return model


def layout(maps: torch.Tensor) -> torch.memory_format:
    last = maps.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last else torch.contiguous_format


def deeplab_file(folder: Path) -> str:
    path = folder / "deeplab.yaml"
    head = {"NAME": "DeepLabV3PlusHead", "PROJECT_CHANNELS": [48], "IN_FEATURES": ["res2", "res5"]}
    path.write_text(json.dumps({"MODEL": {"META_ARCHITECTURE": "SemanticSegmentor", "SEM_SEG_HEAD": head}}))
    return str(path)


class TestLoadConfig:
    def test_deeplab_has_the_keys_of_its_project(self, tmp_path, monkeypatch):
        path = deeplab_file(tmp_path)
        assert load_detector_config(path, []).MODEL.SEM_SEG_HEAD.PROJECT_CHANNELS == [48]
        monkeypatch.setitem(sys.modules, "detectron2.projects.deeplab", None)
        with pytest.raises(InputError, match=r"DeepLabV3PlusHead is in detectron2\.projects\.deeplab, which"):
            load_detector_config(path, [])

    @pytest.mark.parametrize(
        "path", [path for path in SHIPPED if path not in map(baseline, OF_TIMM)], ids=str
    )
    def test_shipped_configs_load_and_build(self, path):
        cfg = load_detector_config(str(path), []).clone()
        cfg.defrost()
        cfg.MODEL.DEVICE = "meta"
        with torch.device("meta"):
            model = build_model(cfg)
        assert cfg.INPUT.FORMAT == "RGB"
        assert type(model).__name__ == cfg.MODEL.META_ARCHITECTURE
        if cfg.MODEL.ROBUST.ARCH.startswith("timm/"):
            deep = {"convnext_tiny": [3, 3, 9, 3], "swin_small_patch4_window7_224": [2, 2, 18, 2]}
            assert block_depths(model) == deep.get(cfg.MODEL.ROBUST.ARCH.removeprefix("timm/"), [12])
        elif "resnet" in cfg.MODEL.ROBUST.ARCH:
            backbone = getattr(model.backbone, "bottom_up", model.backbone)
            assert len(backbone.stages[2]) == (6 if "resnet50" in cfg.MODEL.ROBUST.ARCH else 2)
        if cfg.MODEL.WEIGHTS.startswith("robust://"):
            published = zoo.find(cfg.MODEL.WEIGHTS.removeprefix("robust://").removesuffix(".pkl"))
            assert published.arch == cfg.MODEL.ROBUST.ARCH
        assert not path.name.startswith("Base-") or not cfg.MODEL.WEIGHTS

    def test_each_robust_config_has_its_fair_baseline(self):
        for path in PAIRS:
            robust = load_detector_config(str(path), ["OUTPUT_DIR", "x"]).clone()
            standard = load_detector_config(str(baseline(path)), ["OUTPUT_DIR", "x"])
            robust.defrost()
            arch = robust.MODEL.ROBUST.ARCH
            if path in OF_TIMM:  # by another recipe, which may have another mean and std
                pixels = standard.MODEL.PIXEL_MEAN, standard.MODEL.PIXEL_STD
                known = get_architecture(arch)
                assert tuple(map(tuple, pixels)) == (known.pixel_mean, known.pixel_std)
                robust.MODEL.PIXEL_MEAN, robust.MODEL.PIXEL_STD = pixels
                robust.MODEL.WEIGHTS = f"{arch.removeprefix('timm/')}.pkl"
            else:
                balls = "l2_eps3", "linf_eps4.0"
                assert robust.MODEL.WEIGHTS in [f"robust://{arch}_{ball}.pkl" for ball in balls]
                robust.MODEL.WEIGHTS = f"robust://{arch}_l2_eps0.pkl"
            assert robust.dump() == standard.dump()

    def test_a_bare_name_is_a_set_and_0_classes_are_the_training_sets(self, tiny_datasets):
        folder = tiny_datasets / "demo" / "detection"
        own = f"coco:{folder}/annotations/instances_train.json:{folder}/train"
        opts = ["DATASETS.TRAIN", own, "DATASETS.TEST", "('a', 'b')", "MODEL.ROI_HEADS.NUM_CLASSES", "0"]
        cfg = load_detector_config("configs/Base-RCNN-FPN.yaml", opts)
        assert ((own,), ("a", "b")) == (cfg.DATASETS.TRAIN, cfg.DATASETS.TEST)
        assert cfg.MODEL.ROI_HEADS.NUM_CLASSES == 10
        assert opts[1] == own

    @pytest.mark.parametrize(
        ("opts", "words"),
        [
            (["SEED", "None"], "SEED is None; give it a value"),
            (["TEST.ATTACK.L2_EPS", "None"], "TEST.ATTACK.L2_EPS is None"),
            (["INPUT.MIN_SIZE_TEST", "-1"], "INPUT.MIN_SIZE_TEST is -1; it must be in pixels, >= 0"),
            (["INPUT.MIN_SIZE_TRAIN", "()"], r"INPUT.MIN_SIZE_TRAIN is \(\); it must be in pixels"),
            (["SOLVER.MAX_TO_KEEP", "-1"], "SOLVER.MAX_TO_KEEP is -1; it must be >= 0"),
            (["DATALOADER.NUM_WORKERS", "-1"], "DATALOADER.NUM_WORKERS is -1; it must be >= 0"),
            (["SOLVER.MAX_ITER", "-5"], "SOLVER.MAX_ITER is -5; it must be >= 1"),
            (["SOLVER.STEPS", "(1, 1)"], r"SOLVER.STEPS is \(1, 1\); it must be rising, between 0"),
            (["SOLVER.STEPS", "(0,)"], r"SOLVER.STEPS is \(0,\); it must be rising"),
            (["SOLVER.STEPS", "(1.5,)"], r"SOLVER.STEPS is \(1.5,\); it must be rising"),
            (["SOLVER.STEPS", "(7,)", "SOLVER.MAX_ITER", "7"], "rising, between 0 and SOLVER.MAX_ITER 7"),
            (["MODEL.RPN.POST_NMS_TOPK_TEST", "0"], "MODEL.RPN.POST_NMS_TOPK_TEST is 0; it must be >= 1"),
            (["MODEL.RPN.PRE_NMS_TOPK_TRAIN", "-1"], "MODEL.RPN.PRE_NMS_TOPK_TRAIN is -1; it must be >= 1"),
            (["TEST.DETECTIONS_PER_IMAGE", "0"], "TEST.DETECTIONS_PER_IMAGE is 0, with which AP is 0"),
            (
                ["TEST.ATTACK.L2_EPS", "[[1]]"],
                r"TEST.ATTACK.L2_EPS is \(\[1\],\); it must be",
            ),
            (["TEST.CORRUPTION.NAMES", "(None,)"], r"TEST.CORRUPTION.NAMES is \(None,\); it must be"),
            (["TEST.COCO_MAX_DETS", "-1"], "TEST.COCO_MAX_DETS is -1; it must be >= 0"),
            (["INPUT.MASK_FORMAT", "rle"], "INPUT.MASK_FORMAT is 'rle'; it must be polygon or bitmask"),
            (["DATASETS.TEST", "(1,)"], r"DATASETS.TEST is \(1,\); it must be names"),
        ],
    )
    def test_values_that_detectron2_would_refuse_late(self, opts, words):
        with pytest.raises(InputError, match=words):
            load_detector_config(CONFIG, opts)

    def test_opts_win_over_the_file_and_the_result_is_frozen(self):
        cfg = load_detector_config(CONFIG, ["SOLVER.BASE_LR", "0.5", "MODEL.ROBUST.ARCH", "resnet34"])
        assert (cfg.SOLVER.BASE_LR, cfg.MODEL.ROBUST.ARCH) == (0.5, "resnet34")
        with pytest.raises(AttributeError):
            cfg.SEED = 3

    @pytest.mark.parametrize(
        ("path", "opts", "words"),
        [
            (CONFIG, ["SOLVER.BASE_RL", "0.1"], "no key SOLVER.BASE_RL; did you mean SOLVER.BASE_LR"),
            (CONFIG, ["SOLVER.MAX_ITER", "many"], "MAX_ITER"),
            (CONFIG, ["DATASETS.TRAIN", "5"], "DATASETS.TRAIN"),
            (CONFIG, ["SOLVER.MAX_ITER"], "SOLVER.MAX_ITER has no value"),
            (CONFIG, ["SOLVER", "3"], "SOLVER"),
            ("configs/nowhere.yaml", [], "configs/nowhere.yaml: no such file"),
            ("", [], r"\(none\): no such file"),
            ("configs", [], "no such file"),
        ],
    )
    def test_bad_input_is_one_line(self, path, opts, words):
        with pytest.raises(InputError, match=words) as error:
            load_detector_config(path, opts)
        assert "\n" not in str(error.value)

    @pytest.mark.parametrize(
        ("content", "words"),
        [
            ("MODEL: {ROBUST: {ARHC: resnet18}}", "MODEL.ROBUST.ARHC"),
            ("MODEL: [", "broken.yaml"),
            ("just words", "broken.yaml"),
            ("[1, 2]", "broken.yaml"),
            ("", "broken.yaml"),
            ("_BASE_: nowhere.yaml", "nowhere.yaml"),
            ("MODEL: 3", "broken.yaml"),
        ],
    )
    def test_a_broken_file_is_one_line(self, tmp_path, content, words):
        (tmp_path / "broken.yaml").write_text(content)
        with pytest.raises(InputError, match=words) as error:
            load_detector_config(str(tmp_path / "broken.yaml"), [])
        assert "\n" not in str(error.value)

    @pytest.mark.parametrize(("gpu", "device", "warnings"), [(False, "cpu", 1), (True, "cuda", 0)])
    def test_without_a_gpu_the_cpu_serves(self, monkeypatch, caplog, gpu, device, warnings):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
        cfg = load_detector_config(CONFIG, ["SOLVER.AMP.ENABLED", "True"])
        found = (cfg.MODEL.DEVICE, cfg.SOLVER.AMP.ENABLED)
        assert found == (device, gpu)
        assert len([line for line in caplog.messages if "No GPU found" in line]) == warnings


class TestTraining:
    def test_losses_are_finite_and_all_iterations_ran(self, run):
        with open(f"{run.OUTPUT_DIR}/metrics.json") as file:
            lines = [json.loads(line) for line in file]
        assert lines[-1]["iteration"] == 3  # the evaluation behind iterations 0, 1, 2
        losses = {k: v for line in lines for k, v in line.items() if "loss" in k and "time" not in k}
        assert {"total_loss", "loss_cls", "loss_box_reg", "loss_mask", "loss_rpn_cls"} <= set(losses)
        assert all(math.isfinite(value) for value in losses.values())
        assert losses["loss_mask"] > 0

    def test_it_starts_from_the_backbone_file_and_changes_it(self, run, backbone_file):
        trained = torch.load(final(run), weights_only=True)["model"]
        start = loaded(run).state_dict()
        name = "backbone.bottom_up.res5.1.conv2.weight"
        assert torch.equal(
            start[name],
            torch.as_tensor(
                DetectionCheckpointer(torch.nn.Module())._load_file(backbone_file)["model"][name[19:]]
            ),
        )
        assert 0 < (trained[name] - start[name]).abs().max() < 0.1

    def test_the_checkpoint_carries_the_backbones_metadata(self, run):
        metadata = torch.load(final(run), weights_only=True)["rt_detectron"]
        assert metadata["arch"] == "resnet18"
        assert (metadata["norm"], metadata["eps"], metadata["input_format"]) == ("l2", 3.0, "RGB")

    def test_evaluating_the_checkpoint_gives_the_runs_own_ap(self, run, tiny_cfg, tmp_path):
        cfg = tiny_cfg(tmp_path, "MODEL.WEIGHTS", final(run))
        again = Trainer.test(cfg, loaded(cfg))
        with open(f"{run.OUTPUT_DIR}/results.json") as file:
            first = json.load(file)["metrics"]
        assert set(again) == {"bbox", "segm"}
        for task, metrics in again.items():
            assert {k: v if math.isfinite(v) else None for k, v in metrics.items()} == first[task]
        first, again = (
            json.loads(Path(folder, "inference/coco_instances_results.json").read_text())
            for folder in (run.OUTPUT_DIR, tmp_path)
        )
        assert len(first) > 10
        assert again == first

    def test_it_finds_what_detectron2s_own_test_finds(self, run, tiny_cfg, tmp_path):
        found = []
        for name, test in (("ours", Trainer.test), ("peer", partial(DefaultTrainer.test.__func__, Trainer))):
            cfg = tiny_cfg(tmp_path / name, "MODEL.WEIGHTS", final(run))
            model = loaded(cfg)
            layouts = set()
            model.backbone.register_forward_hook(
                lambda _, __, maps, seen=layouts: seen.add(layout(maps["p2"]))
            )
            test(cfg, model)
            found.append(
                json.loads(Path(cfg.OUTPUT_DIR, "inference/coco_instances_results.json").read_text())
            )
            assert layouts == {torch.channels_last if name == "ours" else torch.contiguous_format}
        boxes, scores = (
            [torch.tensor([each[key] for each in side]) for side in found] for key in ("bbox", "score")
        )
        assert len(scores[0]) > 10
        torch.testing.assert_close(scores[0], scores[1], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(boxes[0], boxes[1], rtol=1e-4, atol=1e-2)

    def test_resume_goes_on_at_the_next_iteration(self, tiny_cfg, tmp_path, monkeypatch):
        cfg = tiny_cfg(tmp_path, "SOLVER.MAX_ITER", 5, "SOLVER.CHECKPOINT_PERIOD", 2)
        ran = []
        original = SimpleTrainer.run_step

        def run_step(self):
            if self.iter == 3 and 3 not in ran:
                ran.append(3)
                raise KeyboardInterrupt
            ran.append(self.iter)
            original(self)

        monkeypatch.setattr(SimpleTrainer, "run_step", run_step)
        monkeypatch.setattr(Trainer, "test", classmethod(lambda cls, cfg, model: {}))
        trainer = Trainer(cfg)
        trainer.resume_or_load(resume=False)
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
        assert ran == [0, 1, 2, 3]
        trainer = Trainer(cfg)
        trainer.resume_or_load(resume=True)
        assert trainer.start_iter == 2
        trainer.train()
        assert ran[4:] == [2, 3, 4]
        checkpoint = torch.load(final(cfg), weights_only=True)
        assert checkpoint["iteration"] == 4
        assert checkpoint["rt_detectron"]["arch"] == "resnet18"


class TestWrongWeights:
    LINES = 'were trained with other preprocessing .* set INPUT.FORMAT "RGB"'

    def test_wrong_channel_order_stops_training(self, tiny_cfg, tmp_path):
        with pytest.raises(InputError, match=self.LINES):
            Trainer(tiny_cfg(tmp_path, "INPUT.FORMAT", "BGR"))

    def test_wrong_channel_order_stops_the_evaluation_of_a_detector(self, run, tiny_cfg, tmp_path):
        with pytest.raises(InputError, match=self.LINES):
            loaded(tiny_cfg(tmp_path, "INPUT.FORMAT", "BGR", "MODEL.WEIGHTS", final(run)))

    def test_wrong_channel_order_stops_resuming(self, tiny_cfg, run):
        trainer = Trainer(tiny_cfg(run.OUTPUT_DIR, "INPUT.FORMAT", "BGR", "MODEL.WEIGHTS", ""))
        with pytest.raises(InputError, match=self.LINES):
            trainer.resume_or_load(resume=True)

    def test_another_network(self, tiny_cfg, tmp_path):
        with pytest.raises(InputError, match=r"do not fit the model: .*set MODEL.ROBUST.ARCH resnet18"):
            loaded(tiny_cfg(tmp_path, "MODEL.ROBUST.ARCH", "resnet34"))

    @pytest.mark.parametrize("weights", ["nowhere.pkl", "robust://nowhere.pkl"])
    def test_missing_file(self, tiny_cfg, tmp_path, monkeypatch, weights):
        monkeypatch.delenv("RT_DETECTRON_ZOO", raising=False)
        with pytest.raises(InputError, match=r"nowhere.pkl") as error:
            loaded(tiny_cfg(tmp_path, "MODEL.WEIGHTS", weights))
        assert "\n" not in str(error.value)


def test_an_unknown_dataset_stops_before_anything_is_built(tiny_cfg, tmp_path):
    with pytest.raises(InputError, match="'rt_nowhere' is not registered"):
        Trainer(tiny_cfg(tmp_path, "DATASETS.TEST", "('rt_nowhere',)"))


def test_test_sets_are_checked_before_anything_is_built(tiny_cfg, tmp_path, sets, monkeypatch):
    monkeypatch.setattr(Trainer, "build_model", lambda cfg: pytest.fail("built"))
    monkeypatch.setitem(MetadataCatalog.get(sets["val"]).__dict__, "evaluator_type", "ocr")
    with pytest.raises(InputError, match="evaluator_type 'ocr'"):
        Trainer(tiny_cfg(tmp_path))


@pytest.mark.parametrize(("value", "kept"), [(0, 3), (1, 1)])
def test_so_many_periodic_checkpoints_are_kept(tiny_cfg, tmp_path, value, kept):
    trainer = Trainer(tiny_cfg(tmp_path, "SOLVER.MAX_TO_KEEP", value, "SOLVER.CHECKPOINT_PERIOD", 2))
    trainer.checkpointing.checkpoints.start(0, 9)
    for iteration in (2, 4, 6):
        trainer.checkpointing.checkpoints.save(iteration)
    assert len(list(tmp_path.glob("model_*.pth"))) == kept


def test_the_class_count_is_checked(tiny_cfg, tmp_path):
    with pytest.raises(InputError, match=r"set MODEL.ROI_HEADS.NUM_CLASSES 10"):
        Trainer(tiny_cfg(tmp_path, "MODEL.ROI_HEADS.NUM_CLASSES", 80))


@pytest.mark.parametrize("key", ["MODEL.FPN.OUT_CHANNELS", "MODEL.ROI_BOX_HEAD.FC_DIM"])
def test_layers_of_no_width_are_one_line(tiny_cfg, tmp_path, key):
    """torch builds them; the first step would end in its RuntimeError."""
    with pytest.raises(InputError, match=r"has no weights \(.*0.*\): check the numbers of MODEL"):
        Trainer.build_model(tiny_cfg(tmp_path, key, 0))


class TestBestMetric:
    """Of several test sets the first one counts, and a metric that no evaluation has stops at once."""

    @pytest.fixture
    def metric(self, tiny_cfg, tmp_path, sets):
        def metric(name, *opts):
            return best_metric(tiny_cfg(tmp_path, "TEST.BEST_METRIC", name, "TEST.EVAL_PERIOD", 1, *opts))

        return metric

    @pytest.mark.parametrize("name", ["bbox/AP", "segm/AP75", "bbox/APs", "bbox/AP-zero", ""])
    def test_of_one_set(self, metric, name):
        assert metric(name) == name

    def test_of_several_sets(self, metric, sets):
        both = ["DATASETS.TEST", f"('{sets['val']}', '{sets['train']}')"]
        assert metric("bbox/AP", *both) == f"{sets['val']}/bbox/AP"
        assert metric(f"{sets['train']}/bbox/AP", *both) == f"{sets['train']}/bbox/AP"

    @pytest.mark.parametrize("name", ["AP", "box/AP", "bbox/mAP", "keypoints/AP", "nowhere/bbox/AP"])
    def test_there_is_none(self, metric, name):
        with pytest.raises(InputError, match=rf"has no {name}; it has bbox/AP, segm/AP"):
            metric(name)

    def test_segm_needs_masks(self, metric):
        with pytest.raises(InputError, match=r"has no segm/AP; it has bbox/AP, and"):
            metric("segm/AP", "MODEL.MASK_ON", False)

    def test_without_evaluations_it_does_not_matter(self, metric):
        assert metric("box/AP", "TEST.EVAL_PERIOD", 0) == "box/AP"


class TestOptions:
    def test_test_time_augmentation_adds_metrics_of_its_own(self, run, tiny_cfg, tmp_path, monkeypatch):
        cfg = tiny_cfg(
            tmp_path, "MODEL.WEIGHTS", final(run), "TEST.AUG.ENABLED", True, "TEST.AUG.MIN_SIZES", "(64, 96)"
        )
        results = Trainer.test_with_tta(cfg, loaded(cfg))
        assert set(results) == {"bbox_TTA", "segm_TTA"}
        assert Path(tmp_path, "inference_TTA/coco_instances_results.json").is_file()

    def test_after_training_both_are_reported(self, tiny_cfg, tmp_path, monkeypatch):
        monkeypatch.setattr(Trainer, "test", classmethod(lambda cls, *args: {"bbox": {"AP": 1.0}}))
        seen = []
        original = Trainer._evaluate
        monkeypatch.setattr(Trainer, "_evaluate", lambda self: seen.append(set(original(self))) or {})
        opts = ["TEST.AUG.ENABLED", True, "TEST.EVAL_PERIOD", 1, "SOLVER.MAX_ITER", 2]
        Trainer(tiny_cfg(tmp_path, *opts)).train()
        assert seen == [{"bbox"}, {"bbox", "bbox_TTA"}]

    def test_test_time_augmentation_of_another_detector_is_refused(self, tiny_cfg, tmp_path, monkeypatch):
        # The sets have no keypoints.
        monkeypatch.setattr(Trainer, "build_train_loader", classmethod(lambda cls, cfg: None))
        monkeypatch.setattr("rt_detectron.detection.trainer.check_test_sets", lambda cfg: None)
        cfg = tiny_cfg(tmp_path, "TEST.AUG.ENABLED", True, "MODEL.KEYPOINT_ON", True)
        with pytest.raises(
            InputError, match=r"set TEST.AUG.ENABLED False for GeneralizedRCNN with keypoints"
        ):
            Trainer(cfg)

    def test_adversarial_replays_train_on_half_the_batches(self, tiny_cfg, tmp_path, monkeypatch):
        monkeypatch.setattr(Trainer, "test", classmethod(lambda cls, *args: {}))
        opts = ["SOLVER.ADVERSARIAL.REPLAYS", 2, "SOLVER.ADVERSARIAL.NORM", "linf"]
        trainer = Trainer(tiny_cfg(tmp_path, *opts, "SOLVER.ADVERSARIAL.EPS", 8.0, "SOLVER.MAX_ITER", 4))
        seen = []
        preprocess = trainer.model.preprocess_image

        def preprocess_image(batch):
            images = preprocess(batch)
            seen.append(([x["image_id"] for x in batch], images.tensor.detach()))
            return images

        monkeypatch.setattr(trainer.model, "preprocess_image", preprocess_image)
        trainer.resume_or_load(resume=False)
        trainer.train()
        (first, clean), (again, moved), (second, _), _ = seen
        assert first == again != second
        difference = ((moved - clean) * trainer.model.pixel_std).abs()
        assert 0 < difference.max() <= 8.001

    def test_gradients_are_clipped(self, tiny_cfg, tmp_path, monkeypatch):
        monkeypatch.setattr(Trainer, "test", classmethod(lambda cls, *args: {}))
        clip = ["SOLVER.CLIP_GRADIENTS.CLIP_TYPE", "value", "SOLVER.CLIP_GRADIENTS.CLIP_VALUE", 1e-6]
        trainer = Trainer(tiny_cfg(tmp_path, "SOLVER.MAX_ITER", 1, *clip))
        trainer.train()
        gradients = [p.grad for p in trainer.model.parameters() if p.grad is not None]
        assert max(gradient.abs().max() for gradient in gradients) == pytest.approx(1e-6)
