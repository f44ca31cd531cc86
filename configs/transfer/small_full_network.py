from detectron2.config import LazyCall as L
from torchvision.transforms import v2 as T

from .full_network import dataloader, dataset, lr_multiplier, optimizer, train, transfer

# Images of 32 pixels as they are, for networks that were pretrained on such.
dataset.resize = dataset.image_size = 32
dataset.flip = 0.5  # how often images are mirrored; 0 for what has a direction, such as digits
dataset.train_transform = L(T.Compose)(
    transforms=[
        L(T.Resize)(size="${dataset.resize}", antialias=True),
        L(T.RandomCrop)(size="${dataset.image_size}", padding=4),
        L(T.RandomHorizontalFlip)(p="${dataset.flip}"),
    ]
)
train.epochs = train.eval_epochs = 15  # instead of 150; the rate falls at a third and two thirds of them
train.output_dir = "./output/transfer/small_full_network"
