"""ResNet-50, Linf eps 4/255, by a single attack step. Not measured here."""

from detectron2.config import LazyCall as L

from rt_detectron.pretrain.strategies import Fast

from .common.imagenet import dataloader, evaluator, lr_multiplier, model, optimizer, threat_model, train

# A single attack step: about half the cost of PGD-3, with a check for catastrophic overfitting.
model.classifier.arch = "resnet50"
model.strategy = L(Fast)(threat_model="${threat_model}", check_every=100, schedule=model.strategy.schedule)
threat_model.norm = "linf"
threat_model.eps = 4.0
train.output_dir = "./output/pretrain/resnet50_linf_eps4_fast"
