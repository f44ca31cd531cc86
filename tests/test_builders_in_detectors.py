"""Every builder in a detector: it trains, resumes and is exported; and what other code reads of a backbone.

The cases are in tests/helpers/proven.py, from which the guide's table is written.
"""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from detectron2.export import TracingAdapter
from detectron2.modeling import BACKBONE_REGISTRY, GeneralizedRCNN, build_backbone, build_model
from detectron2.structures import BitMasks, Boxes, ImageList, Instances
from detectron2.utils.events import EventStorage
from proven import C4, CASES, CONSUMED, GUIDE, ONE, RETINA, written
from torch import nn

from rt_detectron.checkpoint.checkpointer import RobustCheckpointer

REPOSITORY = Path(__file__).parents[1]
RECIPE = REPOSITORY / "docs" / "export.md"
STEPS = 6


def cases(part):
    """The cases; slow are those that `make test` has no time for."""
    return [
        pytest.param(case, id=case.name, marks=() if part in case.in_short else pytest.mark.slow)
        for case in CASES
    ]


@pytest.fixture
def detector(make_cfg, photograph):
    """``detector(case, seed)``: the case's config, its model with random weights, and an annotated image."""

    def make(case, seed=0):
        if case.arch.startswith("timm/"):
            pytest.importorskip("timm")
        cfg = make_cfg(case.arch, {C4: "c4", RETINA: "retinanet"}.get(case.detector, "fpn"))
        cfg.MODEL.BACKBONE.NAME = case.builder
        cfg.MODEL.BACKBONE.FREEZE_AT = 0
        cfg.MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE = 16
        cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = cfg.MODEL.RETINANET.SCORE_THRESH_TEST = 0.0
        cfg.TEST.DETECTIONS_PER_IMAGE = 5
        cfg.MODEL.RESNETS.NORM = "BN"
        cfg.MODEL.RETINANET.NUM_CONVS = 1
        if case.detector == ONE:
            cfg.MODEL.RESNETS.OUT_FEATURES = cfg.MODEL.RPN.IN_FEATURES = cfg.MODEL.ROI_HEADS.IN_FEATURES = [
                "res4"
            ]
            cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[32]]
        torch.manual_seed(seed)
        model = build_model(cfg)
        if case.detector == RETINA:
            # Else the losses are divided by a running mean, which is in no model's state dict.
            model._ema_update = lambda name, value, *args: value
        for name, tensor in model.backbone.state_dict().items():
            if re.search(r"gamma(_?\d)?$|pos_embed$", name):
                tensor.normal_(0, 0.5)  # small in a new network, so that a mistake there would not show
        return model

    return make


@pytest.fixture
def inputs(photograph):
    image = photograph[:, :60, :64]
    instances = Instances(image.shape[1:])
    instances.gt_boxes = Boxes(torch.tensor([[10.0, 10.0, 50.0, 50.0]]))
    instances.gt_classes = torch.tensor([1])
    mask = torch.zeros(1, *image.shape[1:], dtype=torch.bool)
    mask[:, 10:50, 10:50] = True
    instances.gt_masks = BitMasks(mask)
    return [{"image": image, "instances": instances}, {"image": image.flip(2), "instances": instances}]


def adam(model, case):
    return torch.optim.AdamW(model.parameters(), lr=5e-4 if "swin" in case.arch else 2e-3)


def steps(model, optimizer, inputs, first, last):
    """The losses of training steps ``first`` to ``last``, each with random numbers of its own."""
    course = []
    for _ in range(first, last):
        torch.manual_seed(1)  # the same proposals are sampled in each
        with EventStorage():
            loss = sum(model.train()(inputs).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        course.append(loss.item())
    return course


@pytest.mark.parametrize("case", cases("train"))
def test_it_trains_and_resumes(case, detector, inputs, tmp_path):
    model = detector(case)
    optimizer = adam(model, case)
    before = steps(model, optimizer, inputs, 0, STEPS - 2)
    assert [name for name, p in model.backbone.named_parameters() if p.grad is None] == []
    RobustCheckpointer(model, str(tmp_path), optimizer=optimizer).save("halfway")
    after = steps(model, optimizer, inputs, STEPS - 2, STEPS)
    assert after[-1] < 0.95 * before[0], before + after

    again = detector(case, seed=1)
    optimizer = adam(again, case)
    RobustCheckpointer(again, str(tmp_path), optimizer=optimizer).resume_or_load("", resume=True)
    assert steps(again, optimizer, inputs, STEPS - 2, STEPS) == pytest.approx(after, rel=1e-5)


def infer(model, inputs):
    if isinstance(model, GeneralizedRCNN):
        return [{"instances": model.inference(inputs, do_postprocess=False)[0]}]
    return model(inputs)


def assert_same(found, expected, tolerance):
    """The same detections, of which those with about the same score may come in another order."""
    assert len(found) == len(expected)
    assert len(expected[0]) > 0
    found, expected = ([torch.as_tensor(t).double() for t in each] for each in (found, expected))
    if expected[0].shape == found[0].shape:
        # Boxes, then classes, masks or scores by row; the image's size comes last.
        rows = [
            torch.cat([t.flatten(1) if t.dim() > 1 else t[:, None] for t in each[:-1]], dim=1)
            for each in (found, expected)
        ]
        scale = rows[1].abs().amax(dim=0).clamp_min(1)
        gaps = torch.cdist(rows[0] / scale, rows[1] / scale, p=float("inf"))
        assert gaps.min(dim=0).values.max() < tolerance
    assert torch.equal(found[-1], expected[-1])


@pytest.fixture
def images(photograph):
    """Of several sizes, the example for tracing first."""
    shapes = ((96, 128), (64, 128), (96, 67))
    return [photograph[:, : shape[0], : shape[1]] for shape in shapes]


def eager(model, image):
    """What the adapter gives without any tracing, from an adapter of its own."""
    return TracingAdapter(model, [{"image": image}], infer).eval()(image)


@pytest.mark.parametrize("case", cases("export"))
def test_torchscript_gives_what_the_detector_gives(case, detector, images):
    model = detector(case).eval()
    adapter = TracingAdapter(model, [{"image": images[0]}], infer).eval()
    traced = torch.jit.trace(adapter, adapter.flattened_inputs, check_trace=False)
    for image in images:
        assert_same(traced(image), eager(model, image), tolerance=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in CASES if case.program], ids=lambda case: case.name)
def test_the_backbone_is_exported_by_torch(case, detector):
    backbone = detector(case).eval().backbone
    height, width = (32 * torch.export.Dim(name, min=3) for name in ("height", "width"))
    sizes = ({2: height, 3: width},)
    program = torch.export.export(backbone, (torch.randn(1, 3, 192, 224),), dynamic_shapes=sizes)
    images = torch.randn(1, 3, 224, 160)
    with torch.no_grad():
        found, expected = program.module()(images), backbone(images)
    assert list(found) == list(expected)
    for name, feature in expected.items():
        torch.testing.assert_close(found[name], feature, rtol=1e-5, atol=1e-5 * feature.abs().max().item())


@pytest.mark.slow
@pytest.mark.parametrize(
    "case", [case for case in CASES if case.onnx is not None], ids=lambda case: case.name
)
def test_onnx_gives_what_the_detector_gives(case, detector, images, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    model = detector(case).eval()
    adapter = TracingAdapter(model, [{"image": images[0]}], infer).eval()
    path = str(tmp_path / "detector.onnx")
    keys = {"dynamo": False, "opset_version": 17, "input_names": ["image"]}
    keys["dynamic_axes"] = {"image": {1: "height", 2: "width"}}
    if not case.onnx:
        with pytest.raises(torch.onnx.errors.UnsupportedOperatorError, match="_aa' to ONNX"):
            torch.onnx.export(adapter, adapter.flattened_inputs, path, **keys)
        return
    torch.onnx.export(adapter, adapter.flattened_inputs, path, **keys)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for image in images:
        assert_same(session.run(None, {"image": image.numpy()}), eager(model, image), tolerance=1e-4)


LOADED = """
import sys, torch, torchvision
traced = torch.jit.load("detector.ts")
torch.save(traced(torch.load("image.pt", weights_only=True)), "found.pt")
assert not any(name.split(".")[0] in ("rt_detectron", "detectron2") for name in sys.modules)
"""


@pytest.mark.slow
def test_the_recipe_runs_as_written(tiny_cfg, tmp_path, monkeypatch):
    """All of its blocks, as a reader types them; what they leave runs in a process without our package."""
    cfg = tiny_cfg(tmp_path / "output/robust")
    folder = tmp_path / "output/robust"
    folder.mkdir(parents=True)
    torch.manual_seed(0)
    torch.save({"model": build_model(cfg).state_dict()}, folder / "model_final.pth")
    (folder / "config.yaml").write_text(cfg.dump())
    monkeypatch.chdir(tmp_path)
    names = {}
    blocks = re.findall(r"```python\n(.*?)```", RECIPE.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 5
    for block in blocks:
        if "onnx" not in block or importable("onnx", "onnxruntime"):
            exec(compile(block, RECIPE.name, "exec"), names)
    image, adapter = names["image"], names["adapter"]
    torch.save(image, "image.pt")
    finished = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", LOADED], capture_output=True, text=True, cwd=tmp_path
    )
    assert finished.returncode == 0, finished.stderr
    found = torch.load("found.pt", weights_only=True)
    assert_same(found, adapter(image), tolerance=1e-5)
    (output,) = adapter.outputs_schema(found)
    assert len(output["instances"]) > 0
    assert list(names["features"]) == ["p2", "p3", "p4", "p5", "p6"]


def importable(*modules):
    import importlib.util

    return all(importlib.util.find_spec(module) for module in modules)


@pytest.mark.slow
def test_a_whole_detector_is_not_exported_by_torch(detector, images):
    """The guide says so; once PyTorch can, it is to be told."""
    (case,) = (case for case in CASES if case.builder == "build_retinanet_robust_resnet_fpn_backbone")
    adapter = TracingAdapter(detector(case).eval(), [{"image": images[0]}], infer).eval()
    with pytest.raises(Exception, match="Could not guard on data-dependent expression"):
        torch.export.export(adapter, adapter.flattened_inputs, strict=False)


class PixelDecoder(nn.Module):
    """What Mask2Former's pixel decoder reads of a backbone, as its MSDeformAttnPixelDecoder does."""

    def __init__(self, backbone, features=("res2", "res3", "res4", "res5")):
        super().__init__()
        self.backbone = backbone
        shapes = {name: shape for name, shape in backbone.output_shape().items() if name in features}
        ordered = sorted(shapes.items(), key=lambda item: item[1].stride)
        self.names = [name for name, _ in ordered]
        self.strides = [shape.stride for _, shape in ordered]
        self.projections = nn.ModuleList(nn.Conv2d(shape.channels, 8, 1) for _, shape in ordered)

    def forward(self, images):
        padded = ImageList.from_tensors(images, 32).tensor  # SIZE_DIVISIBILITY of its configs
        features = self.backbone(padded)
        height, width = padded.shape[2:]
        out = None
        for name, stride, project in [*zip(self.names, self.strides, self.projections, strict=True)][::-1]:
            projected = project(features[name])
            assert projected.shape[2:] == (height // stride, width // stride)
            out = projected if out is None else projected + F.interpolate(out, projected.shape[2:])
        return out


class MaskedBackbone(nn.Module):
    """What DETR's wrapper for Detectron2 reads of a backbone: strides in the order of the features."""

    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone
        shapes = backbone.output_shape()
        self.strides = [shapes[name].stride for name in shapes]
        self.project = nn.Conv2d(shapes[list(shapes)[-1]].channels, 8, 1)

    def forward(self, images):
        padded = ImageList.from_tensors(images)  # without padding to a multiple of anything
        features = self.backbone(padded.tensor)
        assert len(features) == len(self.strides)
        for feature, stride in zip(features.values(), self.strides, strict=True):
            mask = torch.ones(feature.shape[0], *feature.shape[2:], dtype=torch.bool)
            for index, (height, width) in enumerate(padded.image_sizes):
                mask[index, : int(np.ceil(height / stride)), : int(np.ceil(width / stride))] = False
            # No image is all padding, and nothing but an image's last row and column may be cut off.
            assert not mask.flatten(1).all(dim=1).any()
            for side, cells in zip(padded.tensor.shape[2:], feature.shape[2:], strict=True):
                assert cells in (side // stride, int(np.ceil(side / stride)))
        return self.project(features[list(features)[-1]])


@pytest.mark.parametrize("consumer", [PixelDecoder, MaskedBackbone])
@pytest.mark.parametrize(("builder", "arch"), CONSUMED, ids=[arch for _, arch in CONSUMED])
def test_others_that_build_a_backbone(consumer, builder, arch, make_cfg, photograph):
    if arch.startswith("timm/"):
        pytest.importorskip("timm")
    cfg = make_cfg(arch, OUT_FEATURES=["res2", "res3", "res4", "res5"])
    cfg.MODEL.BACKBONE.NAME = builder
    cfg.MODEL.BACKBONE.FREEZE_AT = 0
    backbone = build_backbone(cfg)
    images = [photograph[:, :67, :101].float() / 60, photograph[:, :33, :120].float() / 60]
    consumer(backbone)(images).square().mean().backward()
    assert [name for name, p in backbone.named_parameters() if p.grad is None] == []


def test_the_guides_table_is_what_is_tested():
    """After a change: python tests/helpers/proven.py"""
    text = GUIDE.read_text(encoding="utf-8")
    assert written(text) == text
    builders = {name for name, _ in BACKBONE_REGISTRY if "robust" in name}
    assert {case.builder for case in CASES} == builders
    assert {case.builder for case in CASES if "train" in case.in_short} == {
        name for name in builders if "fpn" in name or "sfp" in name
    }
