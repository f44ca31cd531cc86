"""Short trainings with each option of docs/pretrain-imagenet.md.

Run it as `pretraining_variants.py DATA OUTPUT PROCESSES URL`, with the folders of digits.
For each variant every process leaves OUTPUT/VARIANT-RANK.pth, the weights it has at the end.
"""

import dataclasses
import sys
from collections import OrderedDict

import torch
from detectron2.config import LazyCall as L
from detectron2.config import instantiate
from detectron2.engine import launch
from detectron2.utils import comm
from torch import nn

from rt_detectron.checkpoint.architectures import get_architecture
from rt_detectron.checkpoint.checkpointer import TrainingCheckpointer
from rt_detectron.data.augmentation import ColorNoise
from rt_detectron.engine.train_hooks import ExponentialMovingAverage
from rt_detectron.modeling.classifier import Classifier
from rt_detectron.pretrain.label_free import LabelFree
from rt_detectron.pretrain.recipe import load_pretrain_config
from rt_detectron.pretrain.schedules import Resolution
from rt_detectron.pretrain.strategies import Fast, Free, Standard, Trades
from rt_detectron.pretrain.trainer import ClassifierTrainer, build_model, start, train_classifier

INTERRUPTED = 5  # iterations of the variant that is


def _schedule(cfg, **keys):
    cfg.model.strategy.schedule.update(keys)


def _label_free(cfg):
    cfg.model.strategy.attack.random_start = True
    cfg.model.strategy = L(LabelFree)(attack=cfg.model.strategy.attack)


def _from_file(cfg):
    """Of another number of classes; each process has other tensors, as if its copy of the file were old."""
    cfg.train.init_checkpoint = f"{cfg.train.output_dir}-{comm.get_rank()}.start"
    torch.save(tiny_classifier(3).network.state_dict(), cfg.train.init_checkpoint)


def _label_free_from_file(cfg):
    _from_file(cfg)
    _label_free(cfg)


def _free(cfg):
    cfg.model.strategy = L(Free)(threat_model="${threat_model}", replays=3)
    cfg.train.update(epochs=0.5, checkpoint_epochs=INTERRUPTED / 24)  # of 24 iterations each


def _accumulate(cfg):
    """Four parts in all, each with batch norm of its own."""
    cfg.model.strategy = L(Standard)()
    cfg.train.update(sync_bn=False, accumulate=4 // comm.get_world_size())


def _noise(cfg):
    cfg.dataloader.train.batch_transform = L(ColorNoise)(
        brightness=0.3, contrast=0.3, saturation=0.3, lighting=0.1
    )


# Those that train as one process does with the same batch ...
EQUAL = {
    "plain": lambda cfg: None,
    "ema": lambda cfg: cfg.train.update(ema=0.9),
    "eps grows": lambda cfg: _schedule(cfg, clean=0.2, warmup=0.6),
    "images grow": lambda cfg: _schedule(cfg, clean=0.2, warmup=0.6, grows="images"),
    "small at first": lambda cfg: cfg.model.update(resolution=L(Resolution)(start=8, until=0.6, multiple=4)),
    "accumulate": _accumulate,
    "from a file": _from_file,
    "colour noise": _noise,
    "free": _free,
    "free, interrupted": _free,
}
# ... and those that draw random numbers in each process, or round much.
OTHERS = {
    "fast": lambda cfg: cfg.model.update(strategy=L(Fast)(threat_model="${threat_model}", check_every=1)),
    "trades": lambda cfg: cfg.model.update(
        strategy=L(Trades)(attack={**cfg.model.strategy.attack, "random_start": True})
    ),
    "eps at random": lambda cfg: _schedule(cfg, random=True),
    "without labels": _label_free_from_file,
    "amp": lambda cfg: cfg.train.update(amp="bf16"),
    "amp of the attack": lambda cfg: cfg.train.update(attack_amp="bf16"),
    "batch norm of each process": lambda cfg: cfg.train.update(sync_bn=False, ema=0.9),
}


def tiny_classifier(num_classes: int, **_) -> Classifier:
    def build(num_classes: int) -> nn.Module:
        layers = {"conv1": nn.Conv2d(3, 8, 3, 2, 1, bias=False), "bn1": nn.BatchNorm2d(8), "relu1": nn.ReLU()}
        layers |= {"conv2": nn.Conv2d(8, 16, 3, 2, 1, bias=False), "bn2": nn.BatchNorm2d(16)}
        layers |= {"relu2": nn.ReLU(), "pool": nn.AdaptiveAvgPool2d(1), "flatten": nn.Flatten()}
        return nn.Sequential(OrderedDict(layers, fc=nn.Linear(16, num_classes)))

    return Classifier(dataclasses.replace(get_architecture("resnet18"), build=build), num_classes)


def train_all(data: str, output: str) -> None:
    averages = []
    begin = ExponentialMovingAverage.before_train
    ExponentialMovingAverage.before_train = lambda self: averages.append(self.averaged) or begin(self)
    save = TrainingCheckpointer.save
    for name, change in {**EQUAL, **OTHERS}.items():
        averages.clear()
        # In single precision a few steps make much of rounding; autocast leaves double precision alone.
        torch.set_default_dtype(torch.float32 if "amp" in name else torch.float64)
        TrainingCheckpointer.save = save if "interrupted" in name else lambda *_, **__: None
        cfg = recipe(data, f"{output}/{name}")
        torch.manual_seed(comm.get_rank())  # weights of their own, until the first process's are shared
        change(cfg)
        model = _trained(cfg, "interrupted" in name)
        found = {"weights": dict(model.classifier.named_parameters())}
        if "original" in (state := getattr(model.strategy, "state_dict", dict)()):
            found["original"] = state["original"]
        if averages:
            found["average"] = averages[0].state_dict()
        torch.save(found, f"{output}/{name}-{comm.get_rank()}.pth")


def recipe(data: str, output: str):
    sizes = [f"dataloader.{split}.dataset.transform.transforms.0.size=16" for split in ("train", "test")]
    cfg = load_pretrain_config(
        "configs/pretrain/demo_l2.py",
        [
            *sizes,
            "model.classifier._target_=pretraining_variants.tiny_classifier",
            "model.classifier.num_classes=2",
            f"dataloader.train.dataset.root={data}/train",
            "dataloader.train.total_batch_size=8",
            "dataloader.train.num_workers=0",
            "model.strategy.attack.steps=1",
            "optimizer.lr=0.1",
            "train.device=cpu",
            "train.sync_bn=true",
            "train.epochs=0.5",
            "train.eval_epochs=9",
            "train.log_period=1",
            f"train.output_dir='{output}'",
        ],
    )
    cfg.dataloader.train.dataset.transform.transforms = cfg.dataloader.test.dataset.transform.transforms
    return cfg


def _trained(cfg, is_interrupted: bool):
    if is_interrupted:
        run_step = ClassifierTrainer.run_step

        def interrupted(self):
            if self.iter == INTERRUPTED + 1:
                raise KeyboardInterrupt
            run_step(self)

        ClassifierTrainer.run_step = interrupted
        try:
            _train(cfg, resume=False)
            raise AssertionError("it was not interrupted")
        except KeyboardInterrupt:
            pass
        finally:
            ClassifierTrainer.run_step = run_step
    return _train(cfg, resume=is_interrupted)


def _train(cfg, resume: bool):
    model = build_model(cfg)
    start(model, cfg.train.init_checkpoint, resume)
    loader = instantiate(cfg.dataloader.train)
    train_classifier(cfg, model, loader, evaluate=lambda _: {}, finish=lambda *_: None, resume=resume)
    return model


if __name__ == "__main__":
    data, output, processes, url = sys.argv[1:]
    launch(train_all, int(processes), dist_url=url, args=(data, output))
