"""Robust backbones in Detectron2's own configs, changed by MODEL.BACKBONE.NAME and MODEL.WEIGHTS alone.

docs/use-in-your-project.md has a table of what is proven here; a test below keeps the two the same.
"""

import math
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from unittest.mock import MagicMock

import pytest
import torch
from detectron2 import model_zoo
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import LazyCall as L
from detectron2.config import get_cfg, instantiate
from detectron2.modeling import build_model
from detectron2.projects.deeplab import add_deeplab_config
from detectron2.projects.point_rend import add_pointrend_config
from detectron2.structures import BitMasks, Boxes, Instances, Keypoints, PolygonMasks
from detectron2.utils.events import EventStorage

import rt_detectron
from rt_detectron.checkpoint import zoo
from rt_detectron.checkpoint.checkpointer import RobustCheckpointer
from rt_detectron.utils.errors import InputError

# Panoptic-DeepLab imports panopticapi, which no package index has, for reading COCO's panoptic pictures only.
for name in ("panopticapi", "panopticapi.utils"):
    sys.modules.setdefault(name, MagicMock())
from detectron2.projects.panoptic_deeplab import add_panoptic_deeplab_config  # noqa: E402
from detectron2.projects.panoptic_deeplab.target_generator import (  # noqa: E402
    PanopticDeepLabTargetGenerator,
)

GUIDE = Path(__file__).parents[1] / "docs" / "use-in-your-project.md"
WEIGHTS = "robust://resnet50_l2_eps3-bgr.pkl"  # for Detectron2's default preprocessing
POINTREND = {
    "ROI_MASK_HEAD": {"NAME": "PointRendMaskHead", "NUM_FC": 2, "FC_DIM": 1024, "POINT_HEAD_ON": True},
    "POINT_HEAD": {"NUM_CLASSES": 80, "FC_DIM": 256, "NUM_FC": 3, "IN_FEATURES": ["p2"]},
}
DEEPLAB_HEAD = {
    "IN_FEATURES": ["res2", "res5"],
    "PROJECT_FEATURES": ["res2"],
    "PROJECT_CHANNELS": [48],
    "NUM_CLASSES": 19,
    "COMMON_STRIDE": 4,
    "NORM": "BN",
    "LOSS_TYPE": "hard_pixel_mining",
}
PANOPTIC_HEAD = {
    **DEEPLAB_HEAD,
    "IN_FEATURES": ["res2", "res3", "res5"],
    "PROJECT_FEATURES": ["res2", "res3"],
    "PROJECT_CHANNELS": [32, 64],
}
# Detector -> its config in Detectron2's model zoo; those of detectron2.projects have none in the package.
ZOO_CONFIGS = {
    "Mask R-CNN C4": "COCO-InstanceSegmentation/mask_rcnn_R_50_C4_1x.yaml",
    "Mask R-CNN DC5": "COCO-InstanceSegmentation/mask_rcnn_R_50_DC5_1x.yaml",
    "Mask R-CNN FPN": "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml",
    "Faster R-CNN FPN": "COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml",
    "RetinaNet": "COCO-Detection/retinanet_R_50_FPN_1x.yaml",
    "Cascade Mask R-CNN FPN": "Misc/cascade_mask_rcnn_R_50_FPN_1x.yaml",
    "Panoptic FPN": "COCO-PanopticSegmentation/panoptic_fpn_R_50_1x.yaml",
    "Keypoint R-CNN FPN": "COCO-Keypoints/keypoint_rcnn_R_50_FPN_1x.yaml",
}
ROBUST_NAME = {
    "build_resnet_backbone": "build_robust_resnet_backbone",
    "build_resnet_fpn_backbone": "build_robust_resnet_fpn_backbone",
    "build_retinanet_resnet_fpn_backbone": "build_retinanet_robust_resnet_fpn_backbone",
    "build_resnet_deeplab_backbone": "build_robust_resnet_backbone",
}


def stock_config(detector):
    """Detectron2's own config for ``detector``, as a project has it, on the CPU."""
    cfg = get_cfg()
    if detector == "PointRend":
        add_pointrend_config(cfg)
        cfg.merge_from_file(model_zoo.get_config_file(ZOO_CONFIGS["Mask R-CNN FPN"]))
        for head, keys in POINTREND.items():
            cfg.MODEL[head].update(keys)
        cfg.MODEL.ROI_MASK_HEAD.IN_FEATURES = ["p2"]
        cfg.MODEL.ROI_MASK_HEAD.POOLER_TYPE = ""
        cfg.MODEL.ROI_MASK_HEAD.OUTPUT_SIDE_RESOLUTION = 7
    elif detector == "DeepLabV3+":
        add_deeplab_config(cfg)
        cfg.MODEL.META_ARCHITECTURE = "SemanticSegmentor"
        deeplab(cfg, DEEPLAB_HEAD, "DeepLabV3PlusHead")
    elif detector == "Panoptic-DeepLab":
        add_panoptic_deeplab_config(cfg)
        cfg.MODEL.META_ARCHITECTURE = "PanopticDeepLab"
        deeplab(cfg, PANOPTIC_HEAD, "PanopticDeepLabSemSegHead")
        cfg.MODEL.INS_EMBED_HEAD.update(
            {key: value for key, value in PANOPTIC_HEAD.items() if key in cfg.MODEL.INS_EMBED_HEAD}
        )
        cfg.DATASETS.TRAIN = ("cityscapes_fine_panoptic_train",)
    else:
        cfg.merge_from_file(model_zoo.get_config_file(ZOO_CONFIGS[detector]))
    cfg.MODEL.DEVICE = "cpu"
    # Fewer proposals change no layer, and most of the time of a step is theirs.
    cfg.MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE = 16
    cfg.MODEL.RPN.POST_NMS_TOPK_TEST = 20
    return cfg


def deeplab(cfg, head, name):
    """What the configs of Detectron2's projects/DeepLab and projects/Panoptic-DeepLab share."""
    cfg.MODEL.BACKBONE.NAME = "build_resnet_deeplab_backbone"
    cfg.MODEL.BACKBONE.FREEZE_AT = 0
    cfg.MODEL.RESNETS.update(
        OUT_FEATURES=head["IN_FEATURES"],
        NORM="BN",
        STEM_TYPE="deeplab",
        STEM_OUT_CHANNELS=128,
        RES5_DILATION=2,
    )
    cfg.MODEL.SEM_SEG_HEAD.update(head, NAME=name)


DETECTORS = [*ZOO_CONFIGS, "PointRend", "DeepLabV3+", "Panoptic-DeepLab"]


@pytest.fixture(scope="module")
def network(random_classifier):
    return random_classifier("resnet50", 1000)


@pytest.fixture(scope="module", autouse=True)
def mirror(network, tmp_path_factory):
    """A zoo folder with one checkpoint in the published layout, whatever its hash, and a cache of its own."""
    folder = tmp_path_factory.mktemp("zoo")
    tensors = {f"module.model.{name}": tensor for name, tensor in network.state_dict().items()}
    torch.save({"model": tensors}, folder / "resnet50_l2_eps3.ckpt")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RT_DETECTRON_ZOO", str(folder))
        patch.setenv("RT_DETECTRON_CACHE", str(tmp_path_factory.mktemp("cache")))
        entries = {name: replace(entry, size=None, sha256=None) for name, entry in zoo._entries().items()}
        patch.setattr(zoo, "_entries", lambda: entries)
        yield folder


@pytest.fixture
def sample(photograph):
    """One annotated image, with every kind of annotation that any of the detectors asks for."""
    bgr = photograph.flip(0)
    height, width = bgr.shape[1:]
    instances = Instances((height, width))
    box = [20.0, 16.0, 100.0, 80.0]
    x0, y0, x1, y1 = box
    instances.gt_boxes = Boxes([box])
    instances.gt_classes = torch.tensor([0])
    instances.gt_masks = PolygonMasks([[[x0, y0, x1, y0, x1, y1, x0, y1]]])
    points = torch.rand(1, 17, 2, generator=torch.Generator().manual_seed(0)) * 60 + 20
    instances.gt_keypoints = Keypoints(torch.cat([points, torch.full((1, 17, 1), 2.0)], dim=2))
    sem_seg = torch.zeros(height, width, dtype=torch.long)
    sem_seg[16:80, 20:100] = 1
    sample = {"image": bgr, "height": height, "width": width, "instances": instances, "sem_seg": sem_seg}
    segments = [{"id": 0, "category_id": 0, "iscrowd": 0}, {"id": 1, "category_id": 11, "iscrowd": 0}]
    targets = PanopticDeepLabTargetGenerator(ignore_label=255, thing_ids=[11], sigma=8)(
        sem_seg.numpy(), segments
    )
    return sample, targets


def fit_and_infer(model, sample, detector):
    """One train step and one inference: losses are finite and reach the backbone, outputs have instances."""
    sample, panoptic_targets = sample
    if detector == "Panoptic-DeepLab":
        sample = {**sample, **panoptic_targets}
    if detector == "PointRend":  # its configs have INPUT.MASK_FORMAT "bitmask"
        sample["instances"].gt_masks = BitMasks.from_polygon_masks(
            sample["instances"].gt_masks, sample["height"], sample["width"]
        )
    torch.manual_seed(0)
    backbone = [p for p in model.backbone.parameters() if p.requires_grad]
    # Two images, since ASPP's pooled branch normalises over the batch alone.
    with EventStorage():
        losses = model.train()([sample, sample])
    assert losses
    assert all(math.isfinite(loss.item()) for loss in losses.values()), losses
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in backbone)
    assert any(p.grad.abs().max() > 0 for p in backbone)
    with torch.no_grad():
        (output,) = model.eval()([sample])
    return output


def assert_has_weights(model, network):
    """The trunk holds torchvision's weights; a C4 head has the last stage."""
    backbone = getattr(model.backbone, "bottom_up", model.backbone)
    last = backbone.res5 if hasattr(backbone, "res5") else model.roi_heads.res5
    for found, expected in ((backbone.res2, network.layer1), (last, network.layer4)):
        assert torch.equal(found[0].conv2.weight, expected[0].conv2.weight)
        assert torch.equal(found[0].conv2.norm.running_var, expected[0].bn2.running_var)
    std = torch.tensor([58.395, 57.12, 57.375]).view(1, 3, 1, 1)
    torch.testing.assert_close(backbone.stem.conv1.weight, (network.conv1.weight / std).flip(1))


@pytest.mark.parametrize("detector", DETECTORS)
def test_two_changed_keys_are_enough(detector, network, sample):
    cfg = stock_config(detector)
    cfg.MODEL.BACKBONE.NAME = ROBUST_NAME[cfg.MODEL.BACKBONE.NAME]
    cfg.MODEL.WEIGHTS = WEIGHTS.replace("-bgr", "")
    with pytest.raises(InputError, match=r'set INPUT\.FORMAT "RGB"; MODEL\.PIXEL_MEAN'):
        build_model(cfg)
    cfg.MODEL.WEIGHTS = WEIGHTS
    model = build_model(cfg)
    RobustCheckpointer(model).load(cfg.MODEL.WEIGHTS)  # stops if they do not fit
    DetectionCheckpointer(model).load(cfg.MODEL.WEIGHTS)
    assert_has_weights(model, network)
    backbone = getattr(model.backbone, "bottom_up", model.backbone)
    stage = backbone.res5 if hasattr(backbone, "res5") else model.roi_heads.res5
    assert stage[0].conv1.stride == (1, 1)  # torchvision's layout, which Detectron2's configs do not have
    output = fit_and_infer(model, sample, detector)
    assert output.keys() & {"instances", "sem_seg"}


def test_lazyconfig(network, sample):
    model = model_zoo.get_config("common/models/mask_rcnn_fpn.py").model
    given = {key: f"${{..{key}}}" for key in ("input_format", "pixel_mean", "pixel_std")}
    model.backbone = L(rt_detectron.load_backbone)(name="resnet50_l2_eps3", detector="fpn", **given)
    with pytest.raises(InputError, match=r'set INPUT\.FORMAT "RGB"; MODEL\.PIXEL_MEAN'):
        instantiate(model)
    model.backbone.name += "-bgr"
    model = instantiate(model)
    assert_has_weights(model, network)
    assert fit_and_infer(model, sample, "lazy")["instances"].has("pred_masks")


STOCK = """
import sys
from detectron2 import model_zoo
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import get_cfg
from detectron2.modeling import build_model
import torch

weights, image, *configs = sys.argv[1:]
for number, config in enumerate(configs):
    cfg = get_cfg()
    cfg.merge_from_file(model_zoo.get_config_file(config))
    cfg.MODEL.WEIGHTS, cfg.MODEL.DEVICE = weights, "cpu"
    model = build_model(cfg).eval()
    DetectionCheckpointer(model).load(cfg.MODEL.WEIGHTS)
    with torch.no_grad():
        model([{"image": torch.load(image, weights_only=True)}])
    torch.save(model.state_dict(), f"{number}.pth")
assert not any(name.startswith("rt_detectron") for name in sys.modules)
"""


def test_unchanged_config_without_import(network, photograph, tmp_path):
    weights, image = rt_detectron.zoo.backbone("resnet50_l2_eps3-bgr"), tmp_path / "image.pt"
    torch.save(photograph.flip(0), image)
    configs = [ZOO_CONFIGS[detector] for detector in ("Mask R-CNN FPN", "Mask R-CNN C4")]
    finished = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", STOCK, weights, image, *configs],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert finished.returncode == 0, finished.stderr
    for number, res5 in enumerate(("backbone.bottom_up", "roi_heads")):
        model = torch.load(tmp_path / f"{number}.pth", weights_only=True)
        for name in ("0.conv2.weight", "2.conv3.weight"):
            assert torch.equal(model[f"{res5}.res5.{name}"], network.get_parameter(f"layer4.{name}"))


def test_the_documented_table_is_what_is_proven():
    rows = [line.split("|")[1].strip() for line in GUIDE.read_text().splitlines() if line.startswith("| ")]
    assert [row for row in rows if row in DETECTORS] == DETECTORS


def test_the_guides_code_runs_as_written(mirror, random_classifier):
    """All of its blocks in a row, as a reader types them; the shell commands have tests of their own."""
    tensors = {
        f"module.model.model.{n}": t for n, t in random_classifier("densenet", 1000).state_dict().items()
    }
    torch.save({"model": tensors}, mirror / "densenet_l2_eps3.ckpt")
    blocks = re.findall(r"```python\n(.*?)```", GUIDE.read_text(), re.DOTALL)
    assert len(blocks) == 5
    names = {}
    for block in blocks:
        exec(compile(block, GUIDE.name, "exec"), names)
    assert list(names["features"]) == ["p2", "p3", "p4", "p5", "p6"]
    assert names["adversarial"].shape == (2, 3, 224, 224)
