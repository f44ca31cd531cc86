"""The published recipe with WRN-50-2, L2 eps 3; published: 66.90 % clean. Not measured here."""

from .common.imagenet import dataloader, evaluator, lr_multiplier, model, optimizer, threat_model, train

model.classifier.arch = "wide_resnet50_2"
threat_model.norm = "l2"
threat_model.eps = 3.0
train.output_dir = "./output/pretrain/wide_resnet50_2_l2_eps3"
