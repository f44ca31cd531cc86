from detectron2.config import LazyCall as L
from torchvision.transforms import v2 as T

from .common.transfer import dataloader, dataset, lr_multiplier, optimizer, train, transfer

transfer.method = "full_network"

dataset.train_transform = L(T.Compose)(
    transforms=[
        L(T.RandomResizedCrop)(size="${dataset.image_size}", antialias=True),
        L(T.RandomHorizontalFlip)(),
    ]
)
train.update(
    amp=None,  # mixed precision: "bf16", or "fp16" (on GPUs)
    accumulate=1,  # split a process's images into so many parts, for memory; the optimiser sees their sum
    sync_bn=False,  # batch norm over all processes instead of each one's images
    ema=0.0,  # decay of the averaged weights that are tested and exported; 0 is none
)
train.output_dir = "./output/transfer/full_network"
