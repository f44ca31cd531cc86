"""The protocol of Salman et al. 2020 (https://arxiv.org/abs/2007.08489), shared by both methods.

SGD, 150 epochs in batches of 64, momentum 0.9, weight decay 5e-4, lr 0.01 or 0.001, divided by 10 every 50
epochs; the better rate is chosen on held-out training images (dataset.held_out).
"""

import torch
from detectron2.config import LazyCall as L
from detectron2.solver.build import get_default_optimizer_params
from fvcore.common.param_scheduler import MultiStepParamScheduler
from torchvision.transforms import v2 as T

transfer = dict(
    method="full_network",  # "last_layer": only that trains; "fixed_feature": so it does, on cached features
    weights="",  # a name of the zoo, a classifier's file, or a backbone.pkl; on the command line weights=
    arch=None,  # the network, where its file cannot tell: timm/NAME; on the command line arch=
)

dataset = dict(
    name="cifar10",  # datasets/README.md lists the names; "folder" and "shards" are your own sets
    root="datasets",
    download=False,
    held_out=False,  # train on 80 % of the training images and test on the rest, to choose e.g. the lr
    downscale=None,  # short side in pixels that larger images are reduced to first, such as 32
    classes=None,  # only these, by name or index
    per_class=None,  # only so many training images of each class
    resize=256,  # short side of a test image, of which the centre is taken
    image_size=224,
    test_transform=L(T.Compose)(
        transforms=[
            L(T.Resize)(size="${dataset.resize}", antialias=True),
            L(T.CenterCrop)(size="${dataset.image_size}"),
        ]
    ),
)

dataloader = dict(total_batch_size=64, num_workers=4)  # num_workers: processes that decode images

optimizer = L(torch.optim.SGD)(
    params=L(get_default_optimizer_params)(), lr=0.01, momentum=0.9, weight_decay=5e-4
)

lr_multiplier = L(MultiStepParamScheduler)(values=[1.0, 0.1, 0.01], milestones=[50, 100], num_updates=150)

train = dict(
    output_dir="./output/transfer",
    seed=0,
    device="cuda",  # falls back to the CPU where there is no GPU
    cudnn_benchmark=False,  # let cuDNN try which convolution is fastest
    epochs=150,
    eval_epochs=150,  # test every so many epochs, and at the end
    checkpoint_epochs=10,  # write a checkpoint to resume from every so many epochs
    log_period=20,  # iterations
    export=True,  # also leave classifier.pth, the whole network
)
