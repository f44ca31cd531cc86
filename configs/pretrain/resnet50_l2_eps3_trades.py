"""ResNet-50, L2 eps 3, by TRADES instead of PGD training. Not measured here."""

from detectron2.config import LazyCall as L

from rt_detectron.pretrain.strategies import Trades

from .common.imagenet import dataloader, evaluator, lr_multiplier, model, optimizer, threat_model, train

# Clean accuracy and robustness weighed against each other, with the authors' weight.
model.classifier.arch = "resnet50"
model.strategy = L(Trades)(attack=model.strategy.attack, beta=6.0, schedule=model.strategy.schedule)
model.strategy.attack.random_start = True
train.output_dir = "./output/pretrain/resnet50_l2_eps3_trades"
