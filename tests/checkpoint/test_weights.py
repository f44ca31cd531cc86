"""Builders stop where the config's preprocessing is not that of MODEL.WEIGHTS, before anything is loaded."""

import pytest
import torch
from detectron2.modeling import build_backbone, build_model

from rt_detectron.checkpoint.checkpointer import RobustCheckpointer
from rt_detectron.checkpoint.weights import weights_metadata
from rt_detectron.utils.errors import InputError

BGR_LINES = [
    'INPUT.FORMAT "BGR"',
    "MODEL.PIXEL_MEAN [103.53, 116.28, 123.675]",
    "MODEL.PIXEL_STD [1.0, 1.0, 1.0]",
]


@pytest.fixture(autouse=True)
def no_mirror(monkeypatch):
    monkeypatch.delenv("RT_DETECTRON_ZOO", raising=False)


def lines_to_set(cfg, build=build_backbone) -> list[str]:
    with pytest.raises(InputError) as error:
        build(cfg)
    assert "\n" not in str(error.value)
    return str(error.value).split(": set ")[1].split("; ")


@pytest.mark.parametrize(
    ("weights", "lines"),
    [("robust://resnet18_l2_eps3.pkl", []), ("robust://resnet18_l2_eps3-bgr.pkl", BGR_LINES)],
)
@pytest.mark.parametrize("head", ["GeneralizedRCNN", "SemanticSegmentor", "PanopticFPN"])
def test_names_of_the_zoo(make_cfg, weights, lines, head):
    """Under any detector, also one that does not know its colour order; nothing is downloaded."""
    cfg = make_cfg("resnet18")
    cfg.MODEL.META_ARCHITECTURE, cfg.MODEL.WEIGHTS = head, weights
    cfg.MODEL.SEM_SEG_HEAD.CONVS_DIM, cfg.MODEL.SEM_SEG_HEAD.NORM = 8, ""
    if lines:
        assert lines_to_set(cfg, build_model) == lines
        for line in lines:  # what it says to set does help
            cfg.merge_from_list(line.split(" ", 1))
        build_model(cfg)
        return
    build_model(cfg)
    for key, value in (
        ("INPUT.FORMAT", "BGR"),
        ("MODEL.PIXEL_MEAN", [1.0] * 3),
        ("MODEL.PIXEL_STD", [1.0] * 3),
    ):
        wrong = cfg.clone()
        wrong.merge_from_list([key, value])
        (line,) = lines_to_set(wrong, build_model)
        assert line.startswith(key)


@pytest.mark.parametrize(
    ("arch", "builder"),
    [
        ("shufflenet", "build_robust_torchvision_backbone"),
        ("resnet18", "build_robust_torchvision_fpn_backbone"),
        ("timm/convnext_atto", "build_robust_timm_fpn_backbone"),
    ],
)
def test_every_builder(make_cfg, arch, builder):
    cfg = make_cfg(arch)
    cfg.MODEL.BACKBONE.NAME = builder
    cfg.MODEL.WEIGHTS = "robust://shufflenet_l2_eps3.pkl"
    cfg.INPUT.FORMAT = "BGR"
    assert lines_to_set(cfg) == ['INPUT.FORMAT "RGB"']


def test_files(make_cfg, backbone_file, tmp_path):
    """A backbone's, and that of a detector which was trained on it."""
    cfg = make_cfg("resnet18")
    checkpointer = RobustCheckpointer(build_backbone(cfg), str(tmp_path))
    checkpointer.load(backbone_file)
    checkpointer.save("model_final")
    for file in (backbone_file, str(tmp_path / "model_final.pth")):
        cfg.MODEL.WEIGHTS, cfg.INPUT.FORMAT = file, "RGB"
        build_backbone(cfg)
        cfg.INPUT.FORMAT = "BGR"
        assert lines_to_set(cfg) == ['INPUT.FORMAT "RGB"']
        assert weights_metadata(file).arch == "resnet18"


def test_what_is_not_known_is_left_to_loading(make_cfg, tmp_path):
    torch.save({"weight": torch.zeros(1)}, tmp_path / "plain.pth")
    (tmp_path / "damaged.pkl").write_bytes(b"?")
    (tmp_path / "damaged.pth").write_bytes(b"?")
    cfg = make_cfg("resnet18")
    names = ("plain.pth", "damaged.pkl", "damaged.pth", "nowhere.pkl")
    files = [str(tmp_path / name) for name in names]
    for weights in (*files, "", "robust://nothing.pkl", "robust://../x.pkl", "detectron2://x.pkl"):
        cfg.MODEL.WEIGHTS = weights
        build_backbone(cfg)
