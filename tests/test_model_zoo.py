"""Shipped configs by name."""

from types import SimpleNamespace

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from omegaconf import DictConfig

from rt_detectron import model_zoo
from rt_detectron.checkpoint.formats import read_pickle
from rt_detectron.detection import load_detector_config
from rt_detectron.evaluation.robustness import robustness_evaluations
from rt_detectron.utils.errors import InputError

YAML, LAZY = "robust_r50_eps3.yaml", "lazy/mask_rcnn_robust_r50_eps3.py"


def test_configs_are_read_as_detectron2s_model_zoo_reads_them():
    cfg = model_zoo.get_config(YAML)
    assert isinstance(cfg, CfgNode)
    assert not cfg.is_frozen()
    assert cfg.MODEL.BACKBONE.NAME == "build_robust_resnet_fpn_backbone"
    assert cfg.MODEL.WEIGHTS.startswith("robust://")
    assert isinstance(model_zoo.get_config(LAZY), DictConfig)


def test_a_detector_is_built_with_its_weights(monkeypatch, backbone_file):
    cfg = model_zoo.get_config("demo/mask_rcnn_r18_fpn.yaml")
    cfg.MODEL.WEIGHTS = backbone_file
    monkeypatch.setattr(model_zoo, "get_config", lambda path, trained: cfg)
    model = model_zoo.get("demo/mask_rcnn_r18_fpn.yaml", device="cpu")
    assert model.training
    stem = model.backbone.bottom_up.stem.conv1.weight
    assert torch.equal(stem, torch.from_numpy(read_pickle(backbone_file)["model"]["stem.conv1.weight"]))


def test_wrong_names_are_one_line():
    with pytest.raises(InputError, match=r"no shipped config robust_r50_eps4.yaml; did you mean robust_r50"):
        model_zoo.get_config_file("robust_r50_eps4.yaml")
    with pytest.raises(InputError, match="no trained detector is published"):
        model_zoo.get_config(YAML, trained=True)


@pytest.mark.parametrize("kind", ["deeplabv3plus", "panoptic_fpn"])
def test_segmentors_on_a_robust_and_a_standard_backbone(kind):
    """Both are built alike, have SEA, and differ in their weights alone."""
    robust, standard = (
        load_detector_config(f"configs/{kind}_{weights}.yaml", ["MODEL.DEVICE", "cpu"])
        for weights in ("robust_r50_eps4", "standard_r50_eps0")
    )
    model = build_model(robust)
    assert model.backbone.output_shape()["res2" if kind == "deeplabv3plus" else "p2"].stride == 4
    sea = robust.clone()
    sea.defrost()
    sea.merge_from_list(["TEST.ATTACK.PROTOCOL", "sea", "TEST.ATTACK.LINF_EPS", "(4,)"])
    attack = {each.name: each for each in robustness_evaluations(sea)}["attack"]
    attack.check(
        SimpleNamespace(model=model, test_set=SimpleNamespace(dicts=[], can_be_spread=True), dataset="")
    )
    for cfg in (robust, standard):
        cfg.defrost()
        cfg.OUTPUT_DIR = cfg.MODEL.WEIGHTS = ""
    assert robust == standard
