"""Detectron2's ViTDet and its optimiser, on a plain transformer of timm's that comes with its weights."""

from detectron2 import model_zoo
from detectron2.config import LazyCall as L

from rt_detectron import load_backbone
from rt_detectron.detection import backbone_factor

model = model_zoo.get_config("common/models/mask_rcnn_vitdet.py").model
model.backbone = L(load_backbone)(
    name="",
    detector="sfp",
    freeze_at=0,
    window=0,  # side in patches of the windows that all but four blocks attend in; 0 is none
    # Compared with what the weights were trained on.
    input_format="${..input_format}",
    pixel_mean="${..pixel_mean}",
    pixel_std="${..pixel_std}",
)
model.pixel_mean = [123.675, 116.28, 103.53]
model.pixel_std = [58.395, 57.12, 57.375]

optimizer = model_zoo.get_config("common/optim.py").AdamW
optimizer.lr = 5e-5  # the paper's 1e-4 is for batches of 64
optimizer.params.overrides = {"pos_embed": {"weight_decay": 0.0}}
optimizer.params.lr_factor_func = L(backbone_factor)(layer_decay=0.7, depths=[12])
