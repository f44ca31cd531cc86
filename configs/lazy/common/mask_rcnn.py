"""Detectron2's Mask R-CNN with FPN, on a backbone that comes with its weights."""

from detectron2 import model_zoo
from detectron2.config import LazyCall as L

from rt_detectron import load_backbone

model = model_zoo.get_config("common/models/mask_rcnn_fpn.py").model
model.backbone = L(load_backbone)(
    name="",
    detector="fpn",
    norm="FrozenBN",
    freeze_at=2,
    # Compared with what the weights were trained on.
    input_format="${..input_format}",
    pixel_mean="${..pixel_mean}",
    pixel_std="${..pixel_std}",
)
model.input_format = "RGB"
model.pixel_mean = [123.675, 116.28, 103.53]
model.pixel_std = [58.395, 57.12, 57.375]
