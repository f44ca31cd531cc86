"""ResNet-18 on CIFAR-10 shards, L2 eps 0.5, PGD-3. Its cost: docs/results/first-run.md."""

from .common.small import dataloader, evaluator, lr_multiplier, model, optimizer, threat_model, train

train.output_dir = "./output/pretrain/resnet18_l2_eps0_5_cifar10"
