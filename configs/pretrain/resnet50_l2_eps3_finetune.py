"""ResNet-50, L2 eps 3, by 10 epochs of PGD-3 on a network that is trained already. Not measured here.

A fraction of the cost of training from scratch (Jeddi et al. 2020, https://arxiv.org/abs/2012.13628). Any
classifier's or backbone's file and any name of the zoo serve as train.init_checkpoint; its last layer is
replaced if the number of classes differs. The fair baseline is the same recipe with threat_model.eps=0.
"""

from detectron2.config import LazyCall as L
from detectron2.solver import WarmupParamScheduler
from fvcore.common.param_scheduler import CosineParamScheduler

from .common.imagenet import dataloader, evaluator, model, optimizer, threat_model, train

optimizer.lr = 0.01
lr_multiplier = L(WarmupParamScheduler)(
    scheduler=L(CosineParamScheduler)(start_value=1.0, end_value=0.0), warmup_length=0.05, warmup_factor=0.1
)
train.init_checkpoint = "robust://resnet50_l2_eps0.pkl"
train.epochs = 10
train.output_dir = "./output/pretrain/resnet50_l2_eps3_finetune"
