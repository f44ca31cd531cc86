"""The fair baseline of demo_l2.py: the same recipe without an attack. A minute and a half on one CPU core."""

from detectron2.config import LazyCall as L

from rt_detectron.pretrain.strategies import Standard

from .common.demo import dataloader, evaluator, lr_multiplier, model, optimizer, threat_model, train

model.strategy = L(Standard)()
train.output_dir = "./output/demo/standard"
