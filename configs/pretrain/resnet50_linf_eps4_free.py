"""ResNet-50, Linf eps 4/255, by free replays, which cost no extra passes. Not measured here."""

from detectron2.config import LazyCall as L

from rt_detectron.pretrain.strategies import Free

from .common.imagenet import dataloader, evaluator, lr_multiplier, model, optimizer, threat_model, train

# Every batch four times in a row with attacks at no cost of their own, so a quarter of the epochs.
model.classifier.arch = "resnet50"
model.strategy = L(Free)(threat_model="${threat_model}", replays=4, schedule=model.strategy.schedule)
threat_model.norm = "linf"
threat_model.eps = 4.0
train.output_dir = "./output/pretrain/resnet50_linf_eps4_free"
train.epochs = 23  # of four passes each
