"""The fair baseline of mask_rcnn_robust_r50_eps3.py: standard training by the same recipe. Not measured."""

from .mask_rcnn_robust_r50_eps3 import dataloader, lr_multiplier, model, optimizer, train

model.backbone.name = "resnet50_l2_eps0"
train.output_dir = "./output/lazy_standard_r50_eps0"
