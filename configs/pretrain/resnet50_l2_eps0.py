"""The fair baseline of resnet50_l2_eps3.py: no attack; published: 75.80 % clean. Not measured here."""

from detectron2.config import LazyCall as L

from rt_detectron.pretrain.strategies import Standard

from .common.imagenet import dataloader, evaluator, lr_multiplier, model, optimizer, threat_model, train

# The fair baseline: the same recipe without the attack, evaluated under the same threat model.
model.classifier.arch = "resnet50"
model.strategy = L(Standard)()
threat_model.norm = "l2"
threat_model.eps = 3.0
train.output_dir = "./output/pretrain/resnet50_l2_eps0"
