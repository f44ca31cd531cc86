"""MobileNetV2, L2 eps 1, without labels (FARE), on the images of mobilenetv2_l2_eps0_5_imagenet20.py.

Three steps of PGD instead of the authors' ten, since this is for a CPU. threat_model.eps=0 is the fair
baseline. Its outcome: docs/results/real-weights.
"""

import torch
from detectron2.config import LazyCall as L
from detectron2.solver.build import get_default_optimizer_params

from rt_detectron.attacks import PGD
from rt_detectron.pretrain.label_free import LabelFree

from .mobilenetv2_l2_eps0_5_imagenet20 import dataloader, evaluator, lr_multiplier, model, threat_model, train

threat_model.eps = 1.0
model.strategy = L(LabelFree)(
    attack=L(PGD)(threat_model="${threat_model}", steps=3, relative_step_size=0.8, random_start=True),
    schedule=model.strategy.schedule,
)
optimizer = L(torch.optim.AdamW)(
    params=L(get_default_optimizer_params)(), lr=1e-4, weight_decay=1e-4, fused=True
)
train.output_dir = "./output/pretrain/mobilenetv2_l2_eps1_label_free_imagenet20"
