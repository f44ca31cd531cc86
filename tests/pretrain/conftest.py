import io
import tarfile

import pytest
import torch

from rt_detectron.modeling.classifier import Classifier
from rt_detectron.pretrain.model import Pretraining
from rt_detectron.pretrain.strategies import Standard


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
def model_and_batches():
    """A random classifier of 3 classes and 20 images in batches of 8; all but the first 5 it gets right."""
    torch.manual_seed(0)
    model = Pretraining(Classifier("resnet18", num_classes=3), Standard()).eval()
    images = torch.rand(20, 3, 32, 32)
    with torch.no_grad():
        labels = model.classifier(images).argmax(1)
    labels[:5] = (labels[:5] + 1) % 3
    return model, [(images[i : i + 8], labels[i : i + 8]) for i in range(0, 20, 8)]
