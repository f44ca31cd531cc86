"""Faster R-CNN R50-FPN, adversarially trained as Li et al. do (TIFS 2025, thu-ml/oddefense).

The same as configs/oddefense_faster_rcnn_r50.yaml. Not measured: no GPU was at hand.
"""

import detectron2.data.transforms as T
from detectron2.config import LazyCall as L
from detectron2.solver import WarmupParamScheduler
from detectron2.solver.build import get_default_optimizer_params
from fvcore.common.param_scheduler import MultiStepParamScheduler

from rt_detectron.detection import backbone_factor, clipped_optimizer

from .common.coco import dataloader
from .common.mask_rcnn import model
from .common.train import train

model.backbone.update(name="resnet50_linf_eps4.0", norm="EvalBN")
for _part in ("mask_in_features", "mask_pooler", "mask_head"):
    model.roi_heads.pop(_part)
dataloader.train.mapper.use_instance_mask = False
dataloader.train.mapper.augmentations = [
    L(T.ResizeShortestEdge)(short_edge_length=800, max_size=1333),
    L(T.RandomFlip)(horizontal=True),
]

optimizer = L(clipped_optimizer)(
    optimizer="AdamW",
    max_norm=100.0,
    params=L(get_default_optimizer_params)(
        base_lr="${..lr}", lr_factor_func=L(backbone_factor)(multiplier=0.1)
    ),
    lr=1e-4,
    weight_decay=0.1,  # 0.05 for a ConvNeXt
)
# Counted in batches, as train.max_iter is: 6 epochs of COCO in batches of 16.
lr_multiplier = L(WarmupParamScheduler)(
    scheduler=L(MultiStepParamScheduler)(values=[1, 0.1], milestones=[36645], num_updates=43974),
    warmup_length=125 / 43974,
    warmup_factor=0.001,
)
train.max_iter = 43974
train.eval_period = 7329
train.checkpointer.period = 1250
train.best_metric = "bbox_attacked/AP"
train.adversarial.update(
    replays=4,
    count_batches=True,
    norm="linf",
    eps=4.0,
    loss="A_box",
    clip=6.0,
    carry_over=True,
    eval_images=500,
)
train.output_dir = "./output/lazy_oddefense_faster_rcnn_r50"
