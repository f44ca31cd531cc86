import io
import tarfile

import pytest
import torch
from detectron2.config import LazyConfig

from rt_detectron.modeling.classifier import Classifier
from rt_detectron.pretrain.strategies import Pretraining, Standard


@pytest.fixture(scope="session")
def digit_shards(digit_folders, tmp_path_factory):
    """The same as WebDataset shards, two for each split."""
    root = tmp_path_factory.mktemp("shards")
    for split in ("train", "val"):
        files = sorted((digit_folders / split).rglob("*.png"))
        for shard in range(2):
            with tarfile.open(root / f"{split}-{shard}.tar", "w") as tar:
                for file in files[shard::2]:
                    for ending, content in (("png", file.read_bytes()), ("cls", file.parent.name.encode())):
                        info = tarfile.TarInfo(f"{file.stem}.{ending}")
                        info.size = len(content)
                        tar.addfile(info, io.BytesIO(content))
    return root


@pytest.fixture
def digits_cfg(digit_folders, tmp_path):
    """The demo's pretraining recipe on those digits at their 16 pixels, for seconds."""
    cfg = LazyConfig.load("configs/pretrain/demo_l2.py")
    cfg.dataloader.test.dataset.transform.transforms[0].size = 16
    cfg.dataloader.train.dataset.transform = cfg.dataloader.test.dataset.transform
    overrides = [
        "model.classifier.num_classes=2",
        f"dataloader.train.dataset.root={digit_folders}/train",
        f"dataloader.test.dataset.root={digit_folders}/val",
        "dataloader.train.total_batch_size=16",
        "dataloader.train.num_workers=0",
        "dataloader.test.num_workers=0",
        "model.strategy.attack.steps=1",
        "evaluator.attack.steps=2",
        "evaluator.max_attacked=20",
        "train.device=cpu",
        f"train.output_dir={tmp_path}/out",
    ]
    return LazyConfig.apply_overrides(cfg, overrides)


@pytest.fixture
def model_and_batches():
    """A random classifier of 3 classes and 20 images in batches of 8; all but the first 5 it gets right."""
    torch.manual_seed(0)
    model = Pretraining(Classifier("resnet18", num_classes=3), Standard()).eval()
    images = torch.rand(20, 3, 32, 32)
    with torch.no_grad():
        labels = model.classifier(images).argmax(1)
    labels[:5] = (labels[:5] + 1) % 3
    return model, [(images[i : i + 8], labels[i : i + 8]) for i in range(0, 20, 8)]
