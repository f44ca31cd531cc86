"""The published recipe with ResNet-50, L2 eps 3; published: 62.83 % clean. Not measured here."""

from .common.imagenet import dataloader, evaluator, lr_multiplier, model, optimizer, threat_model, train

model.classifier.arch = "resnet50"
threat_model.norm = "l2"
threat_model.eps = 3.0
train.output_dir = "./output/pretrain/resnet50_l2_eps3"
