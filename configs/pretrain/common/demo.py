"""Demo digits (datasets/prepare_demo.py): the small-image recipe, cut down to minutes on two CPU cores."""

from detectron2.config import LazyCall as L
from torchvision.transforms import v2 as T

from rt_detectron.data.images import FolderDataset

from .small import dataloader, evaluator, lr_multiplier, model, optimizer, threat_model, train

dataloader.train.dataset = L(FolderDataset)(
    root="datasets/demo/classification/train",
    num_classes="${model.classifier.num_classes}",
    transform=L(T.Compose)(
        transforms=[
            L(T.Resize)(size=36),
            L(T.RandomCrop)(size=32),
            L(T.ColorJitter)(hue=0.5),
        ]
    ),
    on_corrupt="stop",
)
dataloader.train.total_batch_size = 64
dataloader.test.dataset = L(FolderDataset)(
    root="datasets/demo/classification/val",
    num_classes="${model.classifier.num_classes}",
    transform=L(T.Compose)(transforms=[L(T.Resize)(size=32)]),
    on_corrupt="stop",
)
optimizer.lr = 0.05
evaluator.max_attacked = 256

train.epochs = 4
train.eval_epochs = 4
