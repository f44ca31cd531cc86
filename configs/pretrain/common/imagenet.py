"""The recipe of Salman et al. 2020 (https://arxiv.org/abs/2007.08489) on an ImageNet folder tree.

SGD, batch 512, lr 0.1 divided by 10 every 30 of 90 epochs, weight decay 1e-4; 3-step PGD with steps of
2*eps/3; evaluated under PGD-20 with steps of 2.5*eps/20.
"""

import torch
from detectron2.config import LazyCall as L
from detectron2.solver import WarmupParamScheduler
from detectron2.solver.build import get_default_optimizer_params
from fvcore.common.param_scheduler import MultiStepParamScheduler
from torchvision.transforms import v2 as T

from rt_detectron.attacks import PGD, ThreatModel
from rt_detectron.data.augmentation import ColorNoise, RandomResizedCrop
from rt_detectron.data.images import FolderDataset
from rt_detectron.data.loader import TrainLoader, build_test_loader
from rt_detectron.modeling.classifier import Classifier
from rt_detectron.pretrain.evaluation import AccuracyEvaluator
from rt_detectron.pretrain.model import Pretraining
from rt_detectron.pretrain.schedules import EpsSchedule
from rt_detectron.pretrain.strategies import Adversarial

from .train import train

# What the network is trained against (unless model.strategy is Standard) and evaluated under.
# eps: l2 for images in [0, 1], linf in 1/255.
threat_model = L(ThreatModel)(norm="l2", eps=3.0)

model = L(Pretraining)(
    classifier=L(Classifier)(arch="resnet50", num_classes=1000),
    # A step is relative_step_size * eps / steps long.
    strategy=L(Adversarial)(
        attack=L(PGD)(threat_model="${threat_model}", steps=3, relative_step_size=2.0, random_start=False),
        schedule=L(EpsSchedule)(clean=0.0, warmup=0.0, grows="eps", random=False),
    ),
    resolution=None,  # or L(Resolution)(start=128, until=0.6): smaller images at first
)

dataloader = dict(
    train=L(TrainLoader)(
        dataset=L(FolderDataset)(
            root="datasets/imagenet/train",
            num_classes="${model.classifier.num_classes}",
            transform=L(T.Compose)(
                transforms=[
                    L(RandomResizedCrop)(size=224, scaled_decoding=True),
                    L(T.RandomHorizontalFlip)(),
                ]
            ),
            on_corrupt="stop",
        ),
        # On the device, a batch at a time; or null, for a transform above that does it.
        batch_transform=L(ColorNoise)(brightness=0.1, contrast=0.1, saturation=0.1, lighting=0.05),
        total_batch_size=512,
        num_workers=8,  # loader processes for each training process
        prefetch_factor=2,  # batches that each of them has ready, in /dev/shm
        seed="${train.seed}",
        device="${train.device}",
    ),
    test=L(build_test_loader)(
        dataset=L(FolderDataset)(
            root="datasets/imagenet/val",
            num_classes="${model.classifier.num_classes}",
            transform=L(T.Compose)(transforms=[L(T.Resize)(size=256), L(T.CenterCrop)(size=224)]),
            on_corrupt="stop",
        ),
        batch_size=64,
        num_workers=8,
    ),
)

optimizer = L(torch.optim.SGD)(
    params=L(get_default_optimizer_params)(), lr=0.1, momentum=0.9, weight_decay=1e-4, fused=True
)

lr_multiplier = L(WarmupParamScheduler)(
    scheduler=L(MultiStepParamScheduler)(values=[1.0, 0.1, 0.01], milestones=[30, 60], num_updates=90),
    warmup_length=0.0,
    warmup_factor=1.0,
)

evaluator = L(AccuracyEvaluator)(
    attack=L(PGD)(threat_model="${threat_model}", steps=20, relative_step_size=2.5, random_start=False),
    max_attacked=None,  # or attack only so many of the images
)
