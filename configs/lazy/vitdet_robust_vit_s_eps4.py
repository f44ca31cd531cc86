"""ViTDet's Mask R-CNN 1x on the Linf-robust ViT-S (eps 4/255) of ARES 2.0 (Liu et al. 2023).

Bring its file as docs/MODEL_ZOO.md says. Not measured: no GPU was at hand.
"""

from .common.coco import dataloader
from .common.optim import lr_multiplier
from .common.train import train
from .common.vitdet import model, optimizer

model.backbone.name = "ARES_ViT_small_patch16_224_AT"
model.backbone.window = 14
train.output_dir = "./output/lazy_vitdet_robust_vit_s_eps4"
