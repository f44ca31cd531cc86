"""The published recipe with ResNet-18, L2 eps 3; published: 53.12 % clean. Not measured here."""

from .common.imagenet import dataloader, evaluator, lr_multiplier, model, optimizer, threat_model, train

model.classifier.arch = "resnet18"
threat_model.norm = "l2"
threat_model.eps = 3.0
train.output_dir = "./output/pretrain/resnet18_l2_eps3"
