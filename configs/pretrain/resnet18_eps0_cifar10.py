"""The fair baseline of resnet18_l2_eps0_5_cifar10.py. Its cost: docs/results/first-run.md."""

from detectron2.config import LazyCall as L

from rt_detectron.pretrain.strategies import Standard

from .common.small import dataloader, evaluator, lr_multiplier, model, optimizer, threat_model, train

# The fair baseline: the same recipe without the attack, evaluated under the same threat model.
model.strategy = L(Standard)()
train.output_dir = "./output/pretrain/resnet18_eps0_cifar10"
