import copy
import json
from pathlib import Path

import pytest
import torch
from detectron2 import model_zoo
from detectron2.config import instantiate

from rt_detectron.checkpoint import zoo
from rt_detectron.checkpoint.architectures import build_classifier, get_architecture
from rt_detectron.checkpoint.convert import convert_checkpoint
from rt_detectron.detection import (
    build_lazy_model,
    do_train,
    load_detector_config,
    load_lazy_config,
    write_lazy_results,
)
from rt_detectron.detection.adversarial import AdversarialTraining
from rt_detectron.detection.lazy_data import dataset_names
from rt_detectron.engine.loop import build_optimizer
from rt_detectron.utils.errors import InputError

CONFIG = "configs/lazy/mask_rcnn_robust_r50_eps3.py"
SPLITS = {"train": "train", "test": "val"}
BASELINE = "configs/lazy/mask_rcnn_standard_r50_eps0.py"
VITDET = "configs/lazy/vitdet_robust_vit_s_eps4.py"


@pytest.fixture
def tiny(sets, tiny_lazy_opts, tmp_path):
    """``tiny(key=value ...)``: the shipped config, to train within a second."""
    opts = [f"dataloader.{key}.dataset.names={sets[split]}" for key, split in SPLITS.items()]
    opts += [*tiny_lazy_opts, "train.device=cpu", f"train.output_dir={tmp_path}"]

    def make(*more):
        return load_lazy_config(CONFIG, [*opts, *more])

    return make


class TestLoadLazyConfig:
    def test_the_baseline_differs_in_its_weights_and_folder_alone(self, sets, tmp_path):
        names = [f"dataloader.{s}.dataset.names={sets['val']}" for s in ("train", "test")]
        robust, standard = (load_lazy_config(path, names) for path in (CONFIG, BASELINE))
        assert robust.model.backbone.name == "resnet50_l2_eps3"
        robust.model.backbone.name = "resnet50_l2_eps0"
        robust.train.output_dir = standard.train.output_dir
        assert robust == standard

    def test_vitdets_baseline_has_another_mean_and_std(self, sets):
        names = [f"dataloader.{s}.dataset.names={sets['val']}" for s in ("train", "test")]
        paths = (VITDET, VITDET.replace("robust", "standard").replace("eps4", "eps0"))
        robust, standard = (load_lazy_config(path, names) for path in paths)
        assert robust.model.backbone.name == "ARES_ViT_small_patch16_224_AT"
        assert standard.model.backbone.name == "vit_small_patch16_224.pkl"
        known = get_architecture("timm/vit_small_patch16_224")
        for key in ("pixel_mean", "pixel_std"):
            assert tuple(robust.model[key]) == getattr(zoo.metadata(robust.model.backbone.name), key)
            assert tuple(standard.model[key]) == getattr(known, key)
            robust.model[key] = standard.model[key]
        robust.model.backbone.name = standard.model.backbone.name
        robust.train.output_dir = standard.train.output_dir
        assert robust == standard

    @pytest.mark.parametrize(
        ("path", "overrides", "words"),
        [
            ("nowhere.py", [], r"nowhere.py: no such file; configs/lazy/ holds"),
            ("configs/pretrain/demo_l2.py", [], r"train has no max_iter; tools/pretrain.py takes recipes"),
            (CONFIG, ["optimizer.rl=1"], "unknown configuration key 'optimizer.rl'"),
            (CONFIG, ["train.max_iter=0"], "train.max_iter is 0; it must be a whole number >= 1"),
            (CONFIG, ["train.max_iter=1.5"], "train.max_iter is 1.5; it must be a whole number"),
            (CONFIG, ["train.checkpointer.max_to_keep=-1"], "max_to_keep is -1; it must be .* >= 0"),
            (CONFIG, ["optimizer.lr"], "'optimizer.lr' is not of the form key=value"),
            (
                CONFIG,
                ["dataloader.test.dataset.names=coco_2017_vla"],
                "'coco_2017_vla' is not registered|needs",
            ),
        ],
    )
    def test_bad_input_is_one_line(self, path, overrides, words):
        with pytest.raises(InputError, match=words) as error:
            load_lazy_config(path, overrides)
        assert "\n" not in str(error.value)

    def test_another_colour_order_in_the_loader_is_refused(self, tiny):
        with pytest.raises(InputError, match=r"image_format is BGR, but model.input_format is RGB"):
            tiny("dataloader.train.mapper.image_format=BGR")


def test_the_published_recipe_is_the_yaml_files(sets):
    """In both, MAX_ITER, the drop of the rate and the warm-up scale with the replays."""
    path = "configs/{}oddefense_faster_rcnn_r50.{}"
    names = [f"dataloader.{split}.dataset.names={sets['val']}" for split in ("train", "test")]
    for replays in (4, 8):
        lazy = load_lazy_config(path.format("lazy/", "py"), [*names, f"train.adversarial.replays={replays}"])
        cfg = load_detector_config(path.format("", "yaml"), ["SOLVER.ADVERSARIAL.REPLAYS", str(replays)])
        keys = {key.lower(): value for key, value in cfg.SOLVER.ADVERSARIAL.items()}
        assert AdversarialTraining.from_keys(keys) == AdversarialTraining.from_keys(lazy.train.adversarial)
        assert not keys["count_batches"]
        assert cfg.SOLVER.MAX_ITER == lazy.train.max_iter == 43974 * replays
        assert cfg.SOLVER.CHECKPOINT_PERIOD == lazy.train.checkpointer.period == 1250 * replays
        assert cfg.TEST.EVAL_PERIOD == lazy.train.eval_period == 7329 * replays
        factors = instantiate(lazy.lr_multiplier)
        (drop,) = cfg.SOLVER.STEPS
        for step, factor in ((0, 0.001), (cfg.SOLVER.WARMUP_ITERS, 1), (drop - 1, 1), (drop + 1, 0.1)):
            assert factors(step / cfg.SOLVER.MAX_ITER) == pytest.approx(factor, rel=0.02)
    optimizer = instantiate({**lazy.optimizer, "params": [torch.nn.Parameter(torch.ones(4))]})
    assert isinstance(optimizer, torch.optim.AdamW)
    (group,) = optimizer.param_groups
    assert (group["lr"], group["weight_decay"]) == (cfg.SOLVER.BASE_LR, cfg.SOLVER.WEIGHT_DECAY)
    assert lazy.optimizer.max_norm == cfg.SOLVER.CLIP_GRADIENTS.CLIP_VALUE


def test_wrong_preprocessing_stops_before_training(tiny):
    cfg = tiny("model.input_format=BGR", "dataloader.train.mapper.image_format=BGR")
    with pytest.raises(InputError, match=r'set INPUT.FORMAT "RGB"'):
        build_lazy_model(cfg)


def test_layers_of_no_width_are_one_line(tiny):
    with pytest.raises(InputError, match=r"has no weights \(0 x .*\): check the numbers of model"):
        build_lazy_model(tiny("model.roi_heads.box_head.fc_dims=[0]"))


def test_the_backbone_may_have_its_own_rate(tiny, monkeypatch, tmp_path):
    cfg = tiny("optimizer.params.lr_factor_func.multiplier=0.1", "train.max_iter=1", "train.eval_period=0")
    cfg.dataloader.pop("evaluator")
    seen = []
    monkeypatch.setattr(
        torch.optim.SGD, "step", lambda self, closure=None: seen.extend(g["lr"] for g in self.param_groups)
    )
    do_train(cfg)
    assert sorted(seen)[0] == pytest.approx(0.1 * sorted(seen)[-1])


def test_a_training_with_every_option_is_evaluated_reported_and_resumed(tiny, tmp_path):
    cfg = tiny("train.max_iter=3", "train.ema=0.5", "train.adversarial.replays=2", "train.eval_period=2",
               "train.adversarial.loss=A_box", "train.adversarial.eval_images=1",
               "train.best_metric=bbox_attacked/AP")  # fmt: skip
    before = copy.deepcopy(cfg)
    results = do_train(cfg)
    assert cfg == before
    assert set(results) == {"bbox", "segm", "bbox_attacked", "segm_attacked"}
    final = torch.load(tmp_path / "model_final.pth", weights_only=True)
    assert (final["iteration"], final["rt_detectron"]["arch"]) == (2, "resnet18")
    assert "AveragedWeights" in final["trainer"]["hooks"]
    assert torch.load(tmp_path / "model_best.pth", weights_only=True)["best"]["metric"] == "bbox_attacked/AP"
    path = write_lazy_results(cfg, results, 1.26, 3)
    content = json.loads(Path(path).read_text())
    assert content["weights"] == cfg.model.backbone.name
    assert (content["iterations"], content["wall_time_s"], content["seed"]) == (3, 1.3, -1)
    (dataset,) = content["datasets"]
    assert [dataset["name"]] == dataset_names(cfg, "test")
    assert json.loads(Path(dataset["predictions"]).read_text()) is not None
    cfg.train.max_iter = 4
    do_train(cfg, resume=True)
    assert torch.load(tmp_path / "model_final.pth", weights_only=True)["iteration"] == 3


def test_detectron2s_own_config_is_taken(sets, tmp_path):
    source = model_zoo.get_config_file("COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.py")
    cfg = load_lazy_config(
        source, [f"dataloader.{split}.dataset.names={sets['val']}" for split in ("train", "test")]
    )
    assert "ema" not in cfg.train


def test_vitdet_trains_in_windows(sets, tiny_lazy_opts, tmp_path):
    arch = "timm/vit_tiny_patch16_224:depth=5"
    torch.manual_seed(0)
    torch.save(build_classifier(arch).state_dict(), tmp_path / "vit.pth")
    convert_checkpoint(str(tmp_path / "vit.pth"), str(tmp_path / "vit.pkl"), arch)
    opts = [f"dataloader.{key}.dataset.names={sets[split]}" for key, split in SPLITS.items()]
    opts += [*tiny_lazy_opts, f"model.backbone.name={tmp_path}/vit.pkl", "model.backbone.window=2"]
    opts += ["model.roi_heads.box_head.conv_dims=[]", "model.pixel_mean=[127.5,127.5,127.5]"]
    opts += ["model.pixel_std=[127.5,127.5,127.5]", "optimizer.params.lr_factor_func.depths=[5]"]
    cfg = load_lazy_config(VITDET, [*opts, "train.device=cpu", f"train.output_dir={tmp_path}/run"])
    optimizer = build_optimizer(cfg, model := build_lazy_model(cfg))
    trunk = model.backbone.net.trunk.model
    assert [hasattr(block, "window") for block in trunk.blocks] == [False, False, False, True, False]
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert rates[id(trunk.patch_embed.proj.weight)] == pytest.approx(0.001 * 0.7**6)
    assert rates[id(trunk.blocks[4].mlp.fc1.weight)] == pytest.approx(0.001 * 0.7)
    assert rates[id(model.backbone.simfp_2[0].weight)] == 0.001
    assert isinstance(optimizer, torch.optim.AdamW)
    do_train(cfg)
    losses = [
        json.loads(line)["total_loss"]
        for line in (tmp_path / "run/metrics.json").open()
        if "total_loss" in line
    ]
    assert losses
    assert all(0 < loss < 100 for loss in losses)
