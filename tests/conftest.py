"""What several rooms' tests share: a real photograph, a tiny detection set, and networks that cost little."""

import importlib.util
import logging
from pathlib import Path

import pytest
import torch
from detectron2 import model_zoo
from detectron2.config import LazyConfig, get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.utils.env import seed_all_rng
from PIL import Image
from sklearn.datasets import load_digits, load_sample_image
from small_detectors import ThreeConvolutions  # noqa: F401  (registers it)
from tool_process import launch_two, start_server

import rt_detectron  # noqa: F401  (registers the backbones)
from rt_detectron.checkpoint.architectures import build_classifier
from rt_detectron.checkpoint.convert import convert_checkpoint
from rt_detectron.config import add_robust_config
from rt_detectron.detection import load_detector_config
from rt_detectron.study.run import ray_session

DETECTOR_CONFIG = "configs/demo/mask_rcnn_r18_fpn.yaml"
POOL_SIZE = 100_003  # prime, so that no two filters get the same stretch of it


@pytest.fixture(autouse=True)
def loggers_as_they_were():
    """A tool that a test runs in its own process logs to that test's output, which is closed after it."""
    loggers = [logging.getLogger(name) for name in ("fvcore", "detectron2", "rt_detectron")]
    before = [(list(logger.handlers), logger.propagate, logger.level) for logger in loggers]
    yield
    for logger, (handlers, propagate, level) in zip(loggers, before, strict=True):
        logger.handlers[:] = handlers
        logger.propagate = propagate
        logger.setLevel(level)


@pytest.fixture(scope="session")
def photograph() -> torch.Tensor:
    """A real photograph: uint8 RGB, (3, 96, 128)."""
    image = load_sample_image("china.jpg")[150:342:2, 200:456:2]
    return torch.as_tensor(image.transpose(2, 0, 1).copy())


@pytest.fixture
def rendezvous(tmp_path_factory):
    """``rendezvous()``: a --dist-url for one launch of several processes.

    It is a file, since a port that was free when it was found (--dist-url auto) may be taken when it is used.
    """
    return lambda: f"file://{tmp_path_factory.mktemp('rendezvous')}/store"


@pytest.fixture
def launch(tool_server, rendezvous):
    """``launch(function, arguments ...)`` runs a function of a test file in two processes, by Detectron2."""
    return lambda function, *arguments: launch_two(function, arguments, rendezvous())


@pytest.fixture
def two_processes(rendezvous):
    """``two_processes()``: the arguments that have a tool run in two processes."""
    return lambda: ["--num-gpus", "2", "--dist-url", rendezvous()]


@pytest.fixture(scope="session")
def digit_folders(tmp_path_factory):
    """scikit-learn's handwritten 0s and 1s as a class-folder tree: 64 to train on, 40 to test on."""
    root = tmp_path_factory.mktemp("digits")
    digits = load_digits(n_class=2)
    for i, (pixels, label) in enumerate(zip(digits.images[:104], digits.target, strict=False)):
        folder = root / ("train" if i < 64 else "val") / str(label)
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray((pixels * 15.9).astype("uint8")).resize((16, 16)).save(folder / f"{i}.png")
    return root


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
def tool_server(tiny_datasets):
    """What processes of tool_process.py are forked from; the demo set is where they look for data."""
    start_server(DETECTRON2_DATASETS=str(tiny_datasets))


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


@pytest.fixture(scope="session")
def learned(tiny_datasets, tmp_path_factory):
    """The config of a Mask R-CNN that knows the six pictures of the tiny training set by heart, of which they
    are DATASETS.TEST, and that detector in eval mode."""
    from rt_detectron.detection import Trainer, load_detector_config  # here: most test files do without

    name = "rt_test_learned"
    folder = tiny_datasets / "demo" / "detection"
    annotations = folder / "annotations" / "instances_train.json"
    register_coco_instances(name, {}, str(annotations), str(folder / "train"))
    keys = {
        "MODEL.WEIGHTS": "",
        "MODEL.BACKBONE.NAME": "ThreeConvolutions",
        "MODEL.BACKBONE.FREEZE_AT": 0,
        "MODEL.RPN.IN_FEATURES": "['p2']",
        "MODEL.RPN.POST_NMS_TOPK_TRAIN": 40,
        "MODEL.RPN.POST_NMS_TOPK_TEST": 30,
        "MODEL.ANCHOR_GENERATOR.SIZES": "[[12, 20, 30]]",
        "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS": "[[1.0]]",
        "MODEL.ROI_HEADS.IN_FEATURES": "['p2']",
        "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": 32,
        "MODEL.ROI_BOX_HEAD.FC_DIM": 64,
        "MODEL.ROI_MASK_HEAD.CONV_DIM": 8,
        "MODEL.ROI_MASK_HEAD.NUM_CONV": 1,
        "MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION": 14,
        "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG": False,
        "INPUT.MIN_SIZE_TRAIN": "(96,)",
        "INPUT.MIN_SIZE_TEST": 96,
        "DATALOADER.NUM_WORKERS": 0,
        "DATASETS.TRAIN": f"('{name}',)",
        "DATASETS.TEST": f"('{name}',)",
        "SOLVER.IMS_PER_BATCH": 3,
        "SOLVER.OPTIMIZER": "SGD",
        "SOLVER.WEIGHT_DECAY": 0.0001,
        "SOLVER.BASE_LR": 0.05,
        "SOLVER.WARMUP_ITERS": 10,
        "SOLVER.STEPS": "()",
        "SOLVER.MAX_ITER": 150,
        "SEED": 1,
        "OUTPUT_DIR": tmp_path_factory.mktemp("learned"),
    }
    opts = [str(part) for pair in keys.items() for part in pair]
    cfg = load_detector_config("configs/demo/mask_rcnn_r18_fpn.yaml", opts)
    seed_all_rng(0)  # numpy's decides the order of the pictures
    trainer = Trainer(cfg)
    trainer.train()
    yield cfg, trainer.model.eval()
    DatasetCatalog.remove(name)
    MetadataCatalog.remove(name)


@pytest.fixture(scope="session")
def tiny_lazy_opts(backbone_file) -> list[str]:
    """The same for configs/lazy/mask_rcnn_robust_r50_eps3.py."""
    return [
        f"model.backbone.name={backbone_file}",
        "model.roi_heads.num_classes=10",
        "model.roi_heads.box_head.fc_dims=[16]",
        "model.roi_heads.box_predictor.input_shape.channels=16",
        "model.roi_heads.box_predictor.test_score_thresh=0.0",
        "+model.roi_heads.box_predictor.test_topk_per_image=10",
        "model.roi_heads.mask_head.conv_dims=[16,16]",
        "model.proposal_generator.post_nms_topk=[20,10]",
        "+dataloader.train.mapper.instance_mask_format=bitmask",
        "dataloader.train.mapper.augmentations.0.short_edge_length=[64]",
        "dataloader.test.mapper.augmentations.0.short_edge_length=64",
        "dataloader.train.total_batch_size=2",
        "dataloader.train.num_workers=0",
        "dataloader.test.num_workers=0",
        "optimizer.lr=0.001",
        "train.max_iter=2",
    ]


@pytest.fixture(scope="session")
def sets(tiny_datasets):
    """Names of the tiny training and test set."""
    names = {}
    for split in ("train", "val"):
        folder = tiny_datasets / "demo" / "detection"
        names[split] = f"rt_test_detection_{split}"
        annotations = folder / "annotations" / f"instances_{split}.json"
        register_coco_instances(names[split], {}, str(annotations), str(folder / split))
    yield names
    for name in names.values():
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


@pytest.fixture(scope="session")
def tiny_cfg(sets, tiny_opts):
    """``tiny_cfg(output folder, KEY=value pairs ...)``"""

    def make(output, *opts):
        names = ["DATASETS.TRAIN", f"('{sets['train']}',)", "DATASETS.TEST", f"('{sets['val']}',)"]
        return load_detector_config(
            DETECTOR_CONFIG, [*tiny_opts, *names, "OUTPUT_DIR", str(output), *map(str, opts)]
        )

    return make


@pytest.fixture(scope="session")
def make_digits_cfg(digit_folders):
    """``make_digits_cfg(folder)``: the demo's pretraining on those digits, at 16 pixels, for seconds.

    Its output folder is folder/out.
    """

    def make(folder):
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
            f"train.output_dir={folder}/out",
        ]
        return LazyConfig.apply_overrides(cfg, overrides)

    return make


@pytest.fixture
def digits_cfg(make_digits_cfg, tmp_path):
    return make_digits_cfg(tmp_path)
