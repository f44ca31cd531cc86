"""Small detectors to attack, and inputs with ground truth."""

import copy

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.structures import BitMasks, Boxes, Instances


@pytest.fixture(scope="session")
def built():
    """Detectors that were built once, to be copied."""
    return {}


@pytest.fixture
def make_detector(make_cfg, built):
    """``make_detector(kind, **resnets)``: an untrained small detector in eval mode that samples proposals."""

    def make(kind, **resnets):
        key = (kind, *resnets.items())
        if key not in built:
            built[key] = build(kind, **resnets)
        return copy.deepcopy(built[key])

    def build(kind, **resnets):
        cfg = make_cfg(detector={"cascade": "fpn"}.get(kind, kind), **resnets)
        if kind != "c4":  # whose head is made of bottlenecks
            cfg.MODEL.RESNETS.DEPTH = 18
            cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 64
        if kind == "cascade":
            cfg.MODEL.ROI_HEADS.NAME = "CascadeROIHeads"
            cfg.MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG = True
        cfg.INPUT.MASK_FORMAT = "bitmask"
        cfg.MODEL.RPN.POST_NMS_TOPK_TRAIN = 30
        cfg.MODEL.RPN.BATCH_SIZE_PER_IMAGE = 16
        cfg.MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE = 8
        torch.manual_seed(0)
        model = build_model(cfg).eval()
        for module in model.modules():  # logits that differ, so that there is something to attack
            if isinstance(module, torch.nn.Linear):
                module.weight.data.normal_(0, 0.1)
        return model

    return make


@pytest.fixture(scope="session")
def annotated():
    """``annotated(image, image_id, objects=2)``: a detector's input with rectangles as ground truth."""
    return annotate


def annotate(image, image_id, objects=2):
    height, width = image.shape[1:]
    boxes = torch.tensor([[8.0, 8.0, 40.0, 56.0], [30.0, 16.0, 60.0, 48.0]])[:objects]
    masks = torch.zeros(objects, height, width, dtype=torch.bool)
    for mask, (x0, y0, x1, y1) in zip(masks, boxes.int().tolist(), strict=True):
        mask[y0 + 4 : y1, x0 : x1 - 4] = True
    instances = Instances((height, width))
    instances.gt_boxes = Boxes(boxes.reshape(-1, 4))
    instances.gt_classes = torch.arange(objects)
    if objects:  # as Detectron2's mapper does
        instances.gt_masks = BitMasks(masks)
    return {"image": image, "instances": instances, "image_id": image_id, "height": height, "width": width}


@pytest.fixture
def picture(photograph):
    return annotate(photograph[:, :64, :80], 7)
