"""Detectron2's SGD and 1x schedule; the backbone may have a learning rate of its own."""

from detectron2 import model_zoo
from detectron2.config import LazyCall as L

from rt_detectron.detection import backbone_factor

optimizer = model_zoo.get_config("common/optim.py").SGD
optimizer.params.base_lr = "${..lr}"
optimizer.params.lr_factor_func = L(backbone_factor)(multiplier=1.0)
lr_multiplier = model_zoo.get_config("common/coco_schedule.py").lr_multiplier_1x
