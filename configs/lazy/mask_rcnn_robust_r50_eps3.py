"""Mask R-CNN R50-FPN 1x on the L2-robust backbone (eps 3). Not measured: no GPU was at hand."""

from .common.coco import dataloader
from .common.mask_rcnn import model
from .common.optim import lr_multiplier, optimizer
from .common.train import train

model.backbone.name = "resnet50_l2_eps3"
train.output_dir = "./output/lazy_robust_r50_eps3"
