"""Small images (CIFAR-10 shards as shipped): the ImageNet recipe with what 32 pixels and few epochs need."""

from detectron2.config import LazyCall as L
from detectron2.solver import WarmupParamScheduler
from fvcore.common.param_scheduler import CosineParamScheduler
from torchvision.transforms import v2 as T

from rt_detectron.data.shards import ShardDataset

from .imagenet import dataloader, evaluator, model, optimizer, threat_model, train

model.classifier.arch = "resnet18"
model.classifier.num_classes = 10
threat_model.norm = "l2"
threat_model.eps = 0.5

dataloader.train.dataset = L(ShardDataset)(
    urls="datasets/cifar10/cifar10-train-*.tar.gz",
    num_samples=50_000,
    num_classes="${model.classifier.num_classes}",
    transform=L(T.Compose)(transforms=[L(T.RandomCrop)(size=32, padding=4), L(T.RandomHorizontalFlip)()]),
    on_corrupt="stop",
    classes=None,  # or only these, renumbered, e.g. [0, 1, 2] with num_classes 3 and 15,000 samples
)
dataloader.train.batch_transform = None
dataloader.train.total_batch_size = 128
dataloader.train.num_workers = 2
dataloader.test.dataset = L(ShardDataset)(
    urls="datasets/cifar10/cifar10-val-*.tar.gz",
    num_samples=10_000,
    num_classes="${model.classifier.num_classes}",
    transform=L(T.Identity)(),
    on_corrupt="stop",
    classes="${dataloader.train.dataset.classes}",
)
dataloader.test.batch_size = 250
dataloader.test.num_workers = 1

optimizer.weight_decay = 5e-4
lr_multiplier = L(WarmupParamScheduler)(
    scheduler=L(CosineParamScheduler)(start_value=1.0, end_value=0.0), warmup_length=0.1, warmup_factor=0.01
)
evaluator.max_attacked = 2000

train.epochs = 30
train.eval_epochs = 5
