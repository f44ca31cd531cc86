"""Detectors of mmdetection's layout, against Faster R-CNN written from mmdetection's description.

Their networks are torchvision's and timm's; FPN, proposals and box head are written here.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from detectron2.modeling import build_model
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.ops import batched_nms, roi_align

from rt_detectron.checkpoint.checkpointer import RobustCheckpointer
from rt_detectron.checkpoint.convert import read_network
from rt_detectron.checkpoint.mmdetection import convert_detector
from rt_detectron.utils.errors import InputError

WIDTH, HIDDEN, CLASSES = 8, 12, 3
STRIDES = (4, 8, 16, 32, 64)
SIZE = 30.0  # of the random ResNet's features
CONFIG = """model = dict(backbone=dict(type='ResNet', depth=18, out_indices=(0, 1, 2, 3), style='pytorch'),
    rpn_head=dict(anchor_generator=dict(scales=[8], ratios=[0.5, 1.0, 2.0], strides=[4, 8, 16, 32, 64]),
        bbox_coder=dict(target_stds=[1.0, 1.0, 1.0, 1.0]), init_cfg=dict(std=0.01)),
    roi_head=dict(bbox_roi_extractor=dict(featmap_strides=[4, 8, 16, 32], roi_layer=dict(sampling_ratio=0)),
        bbox_head=dict(bbox_coder=dict(target_stds=[0.1, 0.1, 0.2, 0.2]), reg_class_agnostic=False)))
img_norm_cfg = dict(mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], to_rgb=True)
"""


def heads(channels, size=1.0):
    """Random layers beside a backbone whose features are of that size, by mmdetection's names."""
    generator = torch.Generator().manual_seed(1)
    shapes = {
        **{f"neck.lateral_convs.{i}.conv": (WIDTH, c, 1, 1) for i, c in enumerate(channels)},
        **{f"neck.fpn_convs.{i}.conv": (WIDTH, WIDTH, 3, 3) for i in range(4)},
        "rpn_head.rpn_conv": (WIDTH, WIDTH, 3, 3),
        "rpn_head.rpn_cls": (3, WIDTH, 1, 1),
        "rpn_head.rpn_reg": (12, WIDTH, 1, 1),
        "roi_head.bbox_head.shared_fcs.0": (HIDDEN, 49 * WIDTH),
        "roi_head.bbox_head.shared_fcs.1": (HIDDEN, HIDDEN),
        "roi_head.bbox_head.fc_cls": (CLASSES + 1, HIDDEN),
        "roi_head.bbox_head.fc_reg": (4 * CLASSES, HIDDEN),
    }
    tensors = {}
    for layer, shape in shapes.items():
        scale = 1 / math.sqrt(math.prod(shape[1:])) / (size if "lateral" in layer else 1)
        tensors[f"{layer}.weight"] = torch.randn(shape, generator=generator) * scale
        tensors[f"{layer}.bias"] = torch.randn(shape[0], generator=generator) * 0.1
    return tensors


def layer(tensors, name, x, **options):
    weight, bias = tensors[f"{name}.weight"], tensors[f"{name}.bias"]
    return F.linear(x, weight, bias) if weight.dim() == 2 else F.conv2d(x, weight, bias, **options)


def decoded(boxes, deltas, stds):
    """mmdetection's DeltaXYWHBBoxCoder."""
    dx, dy, dw, dh = (deltas * torch.tensor(stds)).unbind(1)
    limit = abs(math.log(16 / 1000))
    width, height = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    x, y = (boxes[:, 0] + boxes[:, 2]) / 2 + width * dx, (boxes[:, 1] + boxes[:, 3]) / 2 + height * dy
    width, height = width * dw.clamp(-limit, limit).exp(), height * dh.clamp(-limit, limit).exp()
    return torch.stack([x - width / 2, y - height / 2, x + width / 2, y + height / 2], 1)


def proposals(tensors, levels, size):
    """Anchors of 8 strides around each cell's corner; the cells row by row, the shapes of each together."""
    found, scores, numbers = [], [], []
    for number, (level, stride) in enumerate(zip(levels, STRIDES, strict=True)):
        hidden = layer(tensors, "rpn_head.rpn_conv", level, padding=1).relu()
        score = layer(tensors, "rpn_head.rpn_cls", hidden)[0].permute(1, 2, 0).reshape(-1)
        delta = layer(tensors, "rpn_head.rpn_reg", hidden)[0].permute(1, 2, 0).reshape(-1, 4)
        anchors = []
        for y in range(level.shape[2]):
            for x in range(level.shape[3]):
                for ratio in (0.5, 1.0, 2.0):
                    half = 8 * stride / 2
                    w, h = half / math.sqrt(ratio), half * math.sqrt(ratio)
                    anchors.append([x * stride - w, y * stride - h, x * stride + w, y * stride + h])
        best = score.sort(descending=True, stable=True).indices[:1000]
        found.append(decoded(torch.tensor(anchors)[best], delta[best], [1.0] * 4))
        scores.append(score[best])
        numbers.append(torch.full_like(score[best], number))
    boxes, scores, numbers = torch.cat(found), torch.cat(scores), torch.cat(numbers)
    boxes[:, 0::2], boxes[:, 1::2] = boxes[:, 0::2].clamp(0, size[1]), boxes[:, 1::2].clamp(0, size[0])
    whole = ((boxes[:, 2:] - boxes[:, :2]) > 0).all(1)
    boxes, scores, numbers = boxes[whole], scores[whole], numbers[whole]
    return boxes[batched_nms(boxes, scores, numbers, 0.7)[:1000]]


@torch.no_grad()
def reference(tensors, features, size):
    """Boxes, scores and classes of one image, as mmdetection's Faster R-CNN finds them."""
    laterals = [layer(tensors, f"neck.lateral_convs.{i}.conv", f) for i, f in enumerate(features)]
    for i in (2, 1, 0):
        laterals[i] = laterals[i] + F.interpolate(laterals[i + 1], size=laterals[i].shape[2:], mode="nearest")
    levels = [layer(tensors, f"neck.fpn_convs.{i}.conv", x, padding=1) for i, x in enumerate(laterals)]
    levels.append(F.max_pool2d(levels[-1], 1, 2))
    boxes = proposals(tensors, levels, size)
    scale = (boxes[:, 2:] - boxes[:, :2]).prod(1).sqrt()
    level_of = (scale / 56 + 1e-6).log2().floor().clamp(0, 3)
    pooled = torch.zeros(len(boxes), WIDTH, 7, 7)
    for i in range(4):
        chosen = level_of == i
        pooled[chosen] = roi_align(levels[i], [boxes[chosen]], 7, 1 / STRIDES[i], 0, aligned=True)
    hidden = pooled.flatten(1)
    for i in (0, 1):
        hidden = layer(tensors, f"roi_head.bbox_head.shared_fcs.{i}", hidden).relu()
    scores = layer(tensors, "roi_head.bbox_head.fc_cls", hidden).softmax(1)[:, :CLASSES]
    deltas = layer(tensors, "roi_head.bbox_head.fc_reg", hidden)
    found = torch.stack(
        [decoded(boxes, deltas[:, 4 * k : 4 * k + 4], [0.1, 0.1, 0.2, 0.2]) for k in range(CLASSES)], 1
    )
    found = found.clamp(min=0).minimum(torch.tensor([size[1], size[0]] * 2))
    rows, classes = (scores > 0.05).nonzero().T
    kept = batched_nms(found[rows, classes], scores[rows, classes], classes, 0.5)[:100]
    return found[rows, classes][kept], scores[rows, classes][kept], classes[kept]


@pytest.fixture
def resnet(random_classifier):
    """A ResNet-18, and the tensors of a detector on it."""
    network = random_classifier("resnet18")
    body = {n: t for n, t in network.state_dict().items() if not n.startswith("fc.")}
    return network, {**{f"backbone.{n}": t for n, t in body.items()}, **heads((64, 128, 256, 512), SIZE)}


def saved(tmp_path, tensors, config=CONFIG, **meta):
    path = tmp_path / "frcnn_at.pth"
    torch.save({"state_dict": tensors, "meta": {"config": config, "mmdet_version": "2.25.3", **meta}}, path)
    return path


def loaded(make_cfg, conversion):
    """The detector that Detectron2 builds of the printed config lines."""
    cfg = make_cfg("")
    cfg.merge_from_list([part for pair in conversion.config.items() for part in pair])
    cfg.MODEL.MASK_ON = False
    cfg.MODEL.FPN.OUT_CHANNELS, cfg.MODEL.ROI_BOX_HEAD.FC_DIM = WIDTH, HIDDEN
    cfg.MODEL.RPN.POST_NMS_TOPK_TEST = 1000
    if "resnet18" in cfg.MODEL.ROBUST.ARCH:
        cfg.MODEL.RESNETS.update(DEPTH=18, RES2_OUT_CHANNELS=64)
    model = build_model(cfg).eval()
    RobustCheckpointer(model, trained=True, input_format=cfg.INPUT.FORMAT).load(cfg.MODEL.WEIGHTS)
    return model


def check_equal(model, image, tensors, features):
    with torch.no_grad():
        found = model([{"image": image}])[0]["instances"]
    boxes, scores, classes = reference(tensors, features, image.shape[1:])
    assert len(scores) > 20
    assert len(set(classes.tolist())) > 1
    assert scores.max() < 0.99
    torch.testing.assert_close(found.scores, scores, atol=1e-4, rtol=1e-4)
    order = found.scores.argsort(descending=True, stable=True)
    torch.testing.assert_close(found.pred_boxes.tensor[order], boxes, atol=0.05, rtol=1e-3)
    assert (found.pred_classes[order] == classes).all()


def test_a_resnet_detector_finds_what_mmdetection_finds(resnet, tmp_path, make_cfg, photograph):
    photograph = photograph[:, :64, :96]
    network, tensors = resnet
    conversion = convert_detector(saved(tmp_path, tensors), tmp_path / "out" / "detector.pth", "linf", 4.0)
    assert (conversion.classes, conversion.guesses, conversion.metadata.eps) == (CLASSES, [], 4.0)
    model = loaded(make_cfg, conversion)
    layers = {f"layer{i}": str(i) for i in (1, 2, 3, 4)}
    body = create_feature_extractor(network, layers)
    with torch.no_grad():
        features = list(body(((photograph - model.pixel_mean) / model.pixel_std)[None]).values())
    check_equal(model, photograph, tensors, features)


def mmpretrain_names(network):
    """timm's ConvNeXt under mmpretrain's names."""
    tensors = {}
    for name, tensor in network.state_dict().items():
        if name.startswith("head."):
            continue
        for old, new in (
            ("stem.", "downsample_layers.0."), (".blocks.", "."), ("conv_dw", "depthwise_conv"),
            ("mlp.fc", "pointwise_conv"),
        ):  # fmt: skip
            name = name.replace(old, new)
        parts = name.split(".")
        if parts[0] == "stages" and parts[2] == "downsample":
            name = ".".join(["downsample_layers", parts[1], *parts[3:]])
        tensors[name] = tensor
    return tensors


def test_a_convnext_detector_finds_what_mmdetection_finds(tmp_path, make_cfg, photograph):
    timm, photograph = pytest.importorskip("timm"), photograph[:, :64, :96]
    torch.manual_seed(0)
    network = timm.create_model("convnext_atto").eval()
    for block in (module for module in network.modules() if hasattr(module, "gamma")):
        block.gamma.data.fill_(0.5)
    channels = (40, 80, 160, 320)
    norms = [torch.nn.LayerNorm(number, eps=1e-6) for number in channels]
    tensors = heads(channels) | {f"backbone.{n}": t for n, t in mmpretrain_names(network).items()}
    for i, norm in enumerate(norms):
        torch.nn.init.normal_(norm.weight, 1, 0.2)
        torch.nn.init.normal_(norm.bias, 0, 0.2)
        tensors |= {f"backbone.norm{i}.{kind}": t.detach() for kind, t in norm.named_parameters()}
    arch = "timm/convnext_atto"  # as convnext_tiny, which is what is tried by itself, and much smaller
    conversion = convert_detector(saved(tmp_path, tensors), tmp_path / "detector.pth", arch=arch)
    assert conversion.config["MODEL.ROBUST.OUT_NORM"] == '"LN"'
    model = loaded(make_cfg, conversion)
    x, features = ((photograph - model.pixel_mean) / model.pixel_std)[None], []
    with torch.no_grad():
        x = network.stem(x)
        for stage, norm in zip(network.stages, norms, strict=True):
            x = stage(x)
            features.append(norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))
    check_equal(model, photograph, tensors, features)
    # The robust classifier that it began as is read under the same names.
    names = {"head.norm.weight": "norm3.weight", "head.norm.bias": "norm3.bias"}
    names |= {"head.fc.weight": "head.fc.weight", "head.fc.bias": "head.fc.bias"}
    own = network.state_dict()
    classifier = mmpretrain_names(network) | {new: own[old] for old, new in names.items()}
    torch.save({"state_dict": classifier}, tmp_path / "convnext_tiny_mmcls-linf-eps-4-advan.pth")
    path = tmp_path / "convnext_tiny_mmcls-linf-eps-4-advan.pth"
    found = read_network(path, arch).state_dict
    assert found.keys() == own.keys()
    assert all(torch.equal(found[name], own[name]) for name in own)


def test_images_as_the_file_says(resnet, tmp_path):
    config = CONFIG.replace("to_rgb=True", "to_rgb=False").replace("123.675", "103.53")
    config = config.replace("116.28, 103.53]", "116.28, 123.675]").replace("style='pytorch'", "style='caffe'")
    metadata = convert_detector(saved(tmp_path, resnet[1], config), tmp_path / "d.pth").metadata
    assert (metadata.input_format, metadata.pixel_mean) == ("BGR", (103.53, 116.28, 123.675))
    assert metadata.stride_in_1x1
    guesses = convert_detector(saved(tmp_path, resnet[1], ""), tmp_path / "d.pth").guesses
    assert "holds no configuration: anchors, box coding" in guesses[0]


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda t: t.pop("neck.fpn_convs.2.conv.bias"), r"missing neck\.fpn_convs\.2\.conv\.bias"),
        (lambda t: t.update({"roi_head.mask_head.x": torch.ones(9)}), r"unexpected roi_head\.mask_head\.x"),
        (
            lambda t: t.update({"rpn_head.rpn_reg.weight": torch.ones(36, WIDTH, 1, 1)}),
            r"misshaped rpn_head\.rpn_reg\.weight \[36, 8, 1, 1\] instead of \[12, 8, 1, 1\]",
        ),
        (lambda t: t.pop("backbone.layer3.0.conv1.weight"), r"layer3\.0\.conv1\.weight"),
        (lambda t: t.pop("roi_head.bbox_head.fc_cls.weight"), r"no Faster R-CNN of mmdetection"),
    ],
)
def test_other_tensors_are_refused_by_name(resnet, tmp_path, spoil, words):
    spoil(resnet[1])
    with pytest.raises(InputError, match=words) as error:
        convert_detector(saved(tmp_path, resnet[1]), tmp_path / "d.pth")
    assert "\n" not in str(error.value)


def test_other_settings_are_refused_by_name(resnet, tmp_path):
    with pytest.raises(InputError, match=r"says scales 4, and this conversion is for"):
        convert_detector(
            saved(tmp_path, resnet[1], CONFIG.replace("scales=[8]", "scales=4")), tmp_path / "d.pth"
        )
    for old, new in (("ratios=[0.5, 1.0", "ratios=[0.3, 1.0"), ("scales=[8]", "scales=[4]")):
        with pytest.raises(InputError, match=rf"says {new.split('=')[0]} \[.*, and this conversion is for"):
            convert_detector(saved(tmp_path, resnet[1], CONFIG.replace(old, new)), tmp_path / "d.pth")
    several = "dict(type='RandomChoiceResize', scales=[(480, 1333), (512, 1333)])\n"  # of the images
    convert_detector(saved(tmp_path, resnet[1], several + CONFIG), tmp_path / "d.pth")
    config = CONFIG.replace("[0.1, 0.1, 0.2", "[0.2, 0.1, 0.2")
    with pytest.raises(InputError, match=r"says target_stds \[0\.2, 0\.1"):
        convert_detector(saved(tmp_path, resnet[1], config), tmp_path / "d.pth")
    with pytest.raises(InputError, match=r"mmdetection 1\.2\.0, which has the background first"):
        convert_detector(saved(tmp_path, resnet[1], mmdet_version="1.2.0"), tmp_path / "d.pth")
    fcos = {"bbox_head.conv_centerness.weight": torch.ones(1, 8, 3, 3)}
    with pytest.raises(InputError, match=r"holds an FCOS .* convert its backbone, with --prefix backbone"):
        convert_detector(saved(tmp_path, fcos), tmp_path / "d.pth")
    with pytest.raises(InputError, match=r"a detector becomes another file that ends in .pth"):
        convert_detector(saved(tmp_path, resnet[1]), tmp_path / "d.pkl")
