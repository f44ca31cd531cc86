"""The baseline of vitdet_robust_vit_s_eps4.py: the same network, trained without an adversary.

Its training had another recipe. Its file is model.safetensors of timm/vit_small_patch16_224.augreg_in1k on
the Hugging Face Hub. Make the weights first, with --arch timm/vit_small_patch16_224:
tools/convert_checkpoint.py model.safetensors vit_small_patch16_224.pkl
"""

from .vitdet_robust_vit_s_eps4 import dataloader, lr_multiplier, model, optimizer, train

model.backbone.name = "vit_small_patch16_224.pkl"
model.pixel_mean = [127.5, 127.5, 127.5]
model.pixel_std = [127.5, 127.5, 127.5]
train.output_dir = "./output/lazy_vitdet_standard_vit_s_eps0"
