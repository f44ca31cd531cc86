"""The published recipe with ResNet-50, Linf eps 4/255; published: 63.86 % clean. Not measured here."""

from .common.imagenet import dataloader, evaluator, lr_multiplier, model, optimizer, threat_model, train

model.classifier.arch = "resnet50"
threat_model.norm = "linf"
threat_model.eps = 4.0
train.output_dir = "./output/pretrain/resnet50_linf_eps4"
