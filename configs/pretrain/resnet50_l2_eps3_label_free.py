"""ResNet-50, L2 eps 3, without labels: FARE on a network that is trained already. Not measured here.

The features under attack are kept where those of the original network are on the clean images (Schlarmann et
al. 2024, https://arxiv.org/abs/2402.12336: 2 epochs, PGD-10, AdamW). The images need no labels: one folder
with all of them and model.classifier.num_classes=1 will do. Any classifier's or backbone's file and any name
of the zoo serve as train.init_checkpoint. The fair baseline is the same recipe with threat_model.eps=0.
"""

import torch
from detectron2.config import LazyCall as L
from detectron2.solver import WarmupParamScheduler
from detectron2.solver.build import get_default_optimizer_params
from fvcore.common.param_scheduler import CosineParamScheduler

from rt_detectron.attacks import PGD
from rt_detectron.pretrain.label_free import LabelFree

from .common.imagenet import dataloader, evaluator, model, threat_model, train

model.strategy = L(LabelFree)(
    attack=L(PGD)(threat_model="${threat_model}", steps=10, random_start=True),
    schedule=model.strategy.schedule,
)
optimizer = L(torch.optim.AdamW)(
    params=L(get_default_optimizer_params)(), lr=1e-5, weight_decay=1e-4, fused=True
)
lr_multiplier = L(WarmupParamScheduler)(
    scheduler=L(CosineParamScheduler)(start_value=1.0, end_value=0.0), warmup_length=0.07, warmup_factor=0.01
)
dataloader.train.total_batch_size = 128
train.init_checkpoint = "robust://resnet50_l2_eps0.pkl"
train.epochs = 2
train.output_dir = "./output/pretrain/resnet50_l2_eps3_label_free"
