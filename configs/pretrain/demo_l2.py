"""ResNet-18 on the demo's digits, L2 eps 0.5: `make demo`'s robust arm. Some two minutes on one CPU core."""

from .common.demo import dataloader, evaluator, lr_multiplier, model, optimizer, threat_model, train

train.output_dir = "./output/demo/robust"
