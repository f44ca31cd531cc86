"""MobileNetV2, L2: adversarial fine-tuning of a network trained on ImageNet, on 20 of its classes at 96 px.

Cheap enough for a CPU: one epoch of 10,000 images and three steps of PGD, to which a growing part of each
batch is exposed at first. threat_model.eps=0 is the fair baseline: the same recipe without an attack. Its
outcome: docs/results/real-weights.
"""

from detectron2.config import LazyCall as L
from torchvision.transforms import v2 as T

from .common.small import dataloader, evaluator, lr_multiplier, model, optimizer, threat_model, train

model.classifier.arch = "mobilenet"
model.classifier.num_classes = 20
model.strategy.attack.steps = 3
model.strategy.attack.relative_step_size = 0.8
model.strategy.schedule.warmup = 0.3
model.strategy.schedule.grows = "images"

dataloader.train.dataset.urls = "datasets/imagenet20/imagenet20-train-*.tar.gz"
dataloader.train.dataset.num_samples = 10_000
dataloader.train.dataset.transform = L(T.Compose)(
    transforms=[
        L(T.RandomResizedCrop)(size=96, scale=(0.25, 1.0), antialias=True),
        L(T.RandomHorizontalFlip)(),
    ]
)
dataloader.train.total_batch_size = 32
dataloader.test.dataset.urls = "datasets/imagenet20/imagenet20-val-*.tar.gz"
dataloader.test.dataset.num_samples = 2_000
dataloader.test.dataset.transform = L(T.Compose)(
    transforms=[L(T.Resize)(size=110, antialias=True), L(T.CenterCrop)(size=96)]
)

optimizer.lr = 0.003
optimizer.weight_decay = 1e-4
evaluator.max_attacked = 400

train.init_checkpoint = "output/real_weights/mobilenetv2_standard.pkl"
train.epochs = train.eval_epochs = 1
train.output_dir = "./output/pretrain/mobilenetv2_l2_eps0_5_imagenet20"
