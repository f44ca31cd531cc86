"""The guard names exactly the config lines that disagree with the weights, for yacs and LazyConfig models."""

from dataclasses import replace

import pytest
import torch
from detectron2 import model_zoo
from detectron2.config import instantiate
from detectron2.modeling import build_backbone, build_model
from torch import nn

from rt_detectron.checkpoint.metadata import Metadata
from rt_detectron.checkpoint.preprocessing import check_preprocessing, preprocessing_lines
from rt_detectron.utils.errors import InputError

RGB = Metadata(
    arch="resnet50",
    norm="l2",
    eps=3.0,
    input_format="RGB",
    pixel_mean=(123.675, 116.28, 103.53),
    pixel_std=(58.395, 57.12, 57.375),
    stride_in_1x1=False,
    source="resnet50_l2_eps3.ckpt",
    sha256="0" * 64,
)
BGR = replace(RGB, input_format="BGR", pixel_mean=RGB.pixel_mean[::-1], pixel_std=(1.0, 1.0, 1.0))
LINES = {
    "format": 'INPUT.FORMAT "RGB"',
    "mean": "MODEL.PIXEL_MEAN [123.675, 116.28, 103.53]",
    "std": "MODEL.PIXEL_STD [58.395, 57.12, 57.375]",
    "stride": "MODEL.RESNETS.STRIDE_IN_1X1 False",
}


class Model(nn.Module):
    """As much of a detector as the guard looks at."""

    def __init__(self, input_format="RGB", pixel_mean=RGB.pixel_mean, pixel_std=RGB.pixel_std):
        super().__init__()
        self.input_format = input_format
        self.register_buffer("pixel_mean", torch.tensor(pixel_mean).view(-1, 1, 1))
        self.register_buffer("pixel_std", torch.tensor(pixel_std).view(-1, 1, 1))


def lines_to_set(model, metadata):
    with pytest.raises(InputError) as error:
        check_preprocessing(model, metadata)
    assert "\n" not in str(error.value)
    return str(error.value).split(": set ")[1].split("; ")


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"input_format": "BGR"}, "format"),
        ({"pixel_mean": [103.53, 116.28, 123.675]}, "mean"),
        ({"pixel_mean": [0.485, 0.456, 0.406]}, "mean"),
        ({"pixel_std": [1.0, 1.0, 1.0]}, "std"),
    ],
)
def test_each_disagreement_is_its_own_line(change, line):
    check_preprocessing(Model(), RGB)
    assert lines_to_set(Model(**change), RGB) == [LINES[line]]


def test_rounded_values_agree_and_unknown_format_is_not_compared():
    check_preprocessing(Model(None, pixel_mean=[123.67, 116.28, 103.53], pixel_std=[58.4, 57.12, 57.38]), RGB)
    check_preprocessing(nn.Conv2d(3, 3, 1), RGB)


@pytest.mark.parametrize("detector", ["fpn", "retinanet"])
def test_detectron2s_defaults_disagree_in_every_line(make_cfg, detector):
    cfg = make_cfg("", detector)
    check_preprocessing(build_model(cfg), RGB)
    stock = make_cfg("", detector, STRIDE_IN_1X1=True)
    stock.MODEL.BACKBONE.NAME = stock.MODEL.BACKBONE.NAME.replace("robust_", "")
    stock.INPUT.FORMAT, stock.MODEL.PIXEL_MEAN, stock.MODEL.PIXEL_STD = "BGR", BGR.pixel_mean, [1.0] * 3
    model = build_model(stock)
    found = lines_to_set(model, RGB)
    assert found == list(LINES.values())
    assert lines_to_set(model, BGR) == [LINES["stride"]]
    for line in found:  # what it says to set does help
        key, value = line.split(" ", 1)
        stock.merge_from_list([key, value])
    check_preprocessing(build_model(stock), RGB)


def test_stride_of_a_bare_backbone_and_of_basic_blocks(make_cfg):
    stock = make_cfg("", "dc5", STRIDE_IN_1X1=True)
    stock.MODEL.BACKBONE.NAME = "build_resnet_backbone"
    assert lines_to_set(build_backbone(stock), RGB) == [LINES["stride"]]
    basic = make_cfg("resnet18")
    check_preprocessing(build_backbone(basic), RGB)


def test_lazy_config_model():
    cfg = model_zoo.get_config("COCO-Detection/retinanet_R_50_FPN_1x.py").model
    model = instantiate(cfg)
    assert set(lines_to_set(model, RGB)) >= {LINES["format"], LINES["mean"], LINES["std"]}
    cfg.input_format, cfg.pixel_mean, cfg.pixel_std = "RGB", RGB.pixel_mean, RGB.pixel_std
    cfg.backbone.bottom_up.stages.stride_in_1x1 = False
    check_preprocessing(instantiate(cfg), RGB)


def test_lines():
    assert list(preprocessing_lines(RGB).values()) == list(LINES.values())
    assert preprocessing_lines(BGR)["MODEL.PIXEL_STD"] == "MODEL.PIXEL_STD [1.0, 1.0, 1.0]"
