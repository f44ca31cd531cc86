"""What several rooms' tests share: a real photograph, and networks cheap enough to make by the dozen."""

import pytest
import torch
from detectron2 import model_zoo
from detectron2.config import get_cfg
from sklearn.datasets import load_sample_image

import rt_detectron  # noqa: F401  (registers the backbones)
from rt_detectron.checkpoint.architectures import build_classifier
from rt_detectron.config import add_robust_config

POOL_SIZE = 100_003  # prime, so that no two filters get the same stretch of it


@pytest.fixture(scope="session")
def photograph() -> torch.Tensor:
    """A real photograph: uint8 RGB, (3, 96, 128)."""
    image = load_sample_image("china.jpg")[150:342:2, 200:456:2]
    return torch.as_tensor(image.transpose(2, 0, 1).copy())


@pytest.fixture(scope="session")
def random_classifier():
    """``random_classifier(arch, num_classes)``: torchvision's network in eval mode, BN statistics included.

    Initialised from a pool of random numbers, since drawing each of 200 million weights takes seconds.
    """

    def build(arch: str, num_classes: int = 5) -> torch.nn.Module:
        with torch.device("meta"):
            network = build_classifier(arch, num_classes)
        network = network.to_empty(device="cpu").eval()
        generator = torch.Generator().manual_seed(0)
        pool = torch.randn(POOL_SIZE, generator=generator)
        for name, tensor in network.state_dict().items():
            if tensor.dim() > 1:
                tensor.copy_(pool.repeat(tensor.numel() // POOL_SIZE + 1)[: tensor.numel()].view_as(tensor))
                tensor.mul_((2 / tensor[0].numel()) ** 0.5)
            elif name.endswith("num_batches_tracked"):
                tensor.fill_(100)
            elif name.endswith(("running_var", "weight")):
                tensor.uniform_(0.5, 1.5, generator=generator)
            else:
                tensor.normal_(0, 0.1, generator=generator)
        return network

    return build


@pytest.fixture
def make_cfg():
    """``make_cfg(arch, detector, **resnets)``: a small detector under the weights' own preprocessing.

    ``detector`` is "fpn", "retinanet", "c4" or "dc5"; ``resnets`` are keys of MODEL.RESNETS.
    """

    def make(arch: str = "", detector: str = "fpn", **resnets):
        cfg = get_cfg()
        add_robust_config(cfg)
        zoo = {
            "fpn": "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml",
            "retinanet": "COCO-Detection/retinanet_R_50_FPN_1x.yaml",
            "c4": "COCO-InstanceSegmentation/mask_rcnn_R_50_C4_1x.yaml",
            "dc5": "COCO-InstanceSegmentation/mask_rcnn_R_50_DC5_1x.yaml",
        }
        cfg.merge_from_file(model_zoo.get_config_file(zoo[detector]))
        name = cfg.MODEL.BACKBONE.NAME
        cfg.MODEL.BACKBONE.NAME = name.replace("resnet", "robust_resnet")
        cfg.MODEL.WEIGHTS = ""
        cfg.MODEL.DEVICE = "cpu"
        cfg.MODEL.ROBUST.ARCH = arch
        cfg.MODEL.RESNETS.update(resnets)
        cfg.INPUT.FORMAT = "RGB"
        cfg.MODEL.PIXEL_MEAN = [123.675, 116.28, 103.53]
        cfg.MODEL.PIXEL_STD = [58.395, 57.12, 57.375]
        # Narrow heads, so that the tests spend their time on the backbone.
        cfg.MODEL.FPN.OUT_CHANNELS = 16
        cfg.MODEL.ROI_BOX_HEAD.FC_DIM = 16
        cfg.MODEL.ROI_MASK_HEAD.CONV_DIM = 16
        cfg.MODEL.ROI_HEADS.NUM_CLASSES = cfg.MODEL.RETINANET.NUM_CLASSES = 3
        cfg.MODEL.RPN.POST_NMS_TOPK_TEST = 5
        return cfg

    return make
