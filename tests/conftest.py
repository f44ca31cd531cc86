"""What several rooms' tests share: a real photograph, a tiny detection set, and networks that cost little."""

import importlib.util
from pathlib import Path

import pytest
import torch
from detectron2 import model_zoo
from detectron2.config import get_cfg
from sklearn.datasets import load_sample_image

import rt_detectron  # noqa: F401  (registers the backbones)
from rt_detectron.checkpoint.architectures import build_classifier
from rt_detectron.checkpoint.convert import convert_checkpoint
from rt_detectron.config import add_robust_config
from rt_detectron.study.cluster import ray_session

POOL_SIZE = 100_003  # prime, so that no two filters get the same stretch of it


@pytest.fixture(scope="session")
def photograph() -> torch.Tensor:
    """A real photograph: uint8 RGB, (3, 96, 128)."""
    image = load_sample_image("china.jpg")[150:342:2, 200:456:2]
    return torch.as_tensor(image.transpose(2, 0, 1).copy())


@pytest.fixture(scope="session")
def ray_here():
    """Ray on this machine, once for all tests of studies, since it takes seconds to start."""
    with ray_session(None) as ray:
        yield ray


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


@pytest.fixture(scope="session")
def tiny_datasets(tmp_path_factory) -> Path:
    """A folder for DETECTRON2_DATASETS with the demo set in it: 6 and 4 detection pictures of 96 pixels."""
    pytest.importorskip("skimage")
    script = Path(__file__).parents[1] / "datasets" / "prepare_demo.py"
    spec = importlib.util.spec_from_file_location("prepare_demo_for_tests", script)
    prepare_demo = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(prepare_demo)
    root = tmp_path_factory.mktemp("datasets")
    sizes = {"image-size": 96, "detection-train": 6, "detection-val": 4}
    sizes.update({"classification-train": 10, "classification-val": 10, "classification-size": 32})
    prepare_demo.main(["--output", str(root / "demo"), *[f"--{key}={size}" for key, size in sizes.items()]])
    return root


@pytest.fixture(scope="session")
def backbone_file(tmp_path_factory, random_classifier) -> str:
    """An untrained ResNet-18 as tools/convert_checkpoint.py writes it."""
    folder = tmp_path_factory.mktemp("backbone")
    source, output = folder / "resnet18_l2_eps3.pth", folder / "backbone.pkl"
    torch.save(random_classifier("resnet18").state_dict(), source)
    convert_checkpoint(str(source), str(output))
    return str(output)


@pytest.fixture(scope="session")
def tiny_opts(backbone_file) -> list[str]:
    """What makes configs/demo/mask_rcnn_r18_fpn.yaml train within a second on ``tiny_datasets``."""
    keys = {
        "MODEL.WEIGHTS": backbone_file,
        "MODEL.FPN.OUT_CHANNELS": 16,
        "MODEL.ROI_BOX_HEAD.FC_DIM": 16,
        "MODEL.ROI_MASK_HEAD.CONV_DIM": 16,
        "MODEL.RPN.POST_NMS_TOPK_TRAIN": 20,
        "MODEL.RPN.POST_NMS_TOPK_TEST": 10,
        "MODEL.ROI_HEADS.SCORE_THRESH_TEST": 0.0,  # so that an untrained detector predicts something
        "INPUT.MIN_SIZE_TRAIN": "(64,)",
        "INPUT.MIN_SIZE_TEST": 64,
        "DATALOADER.NUM_WORKERS": 0,
        "SOLVER.IMS_PER_BATCH": 2,
        "SOLVER.BASE_LR": 0.001,
        "TEST.DETECTIONS_PER_IMAGE": 10,
        "SEED": 1,
    }
    return [str(part) for pair in keys.items() for part in pair]
