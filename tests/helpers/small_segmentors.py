"""Models of segmentation and keypoints that know the tiny training set by heart, and their test sets.

The masks of the tiny pictures' objects become the labels of pixels, and the middle and two corners of an
object's box its keypoints.
"""

import json
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import (
    load_sem_seg,
    register_coco_instances,
    register_coco_panoptic_separated,
)
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from PIL import Image
from pycocotools.coco import COCO

from rt_detectron.attacks.losses import preprocess
from rt_detectron.evaluation.robustness.test_set import annotated_test_mapper

CONFIG = "configs/demo/mask_rcnn_r18_fpn.yaml"
STUFF = 1000  # the id of the background's category
SIGMAS = (0.1, 0.1, 0.1)
SMALL_HEAD = {
    "MODEL.SEM_SEG_HEAD.IN_FEATURES": "['p2']",
    "MODEL.SEM_SEG_HEAD.CONVS_DIM": 16,
    "MODEL.SEM_SEG_HEAD.NORM": "",
}


def as_opts(keys: dict) -> list[str]:
    return [str(part) for pair in keys.items() for part in pair]


@contextmanager
def segmentation_sets(source: str, folder: Path):
    """``rt_test_semantic``, of the classes of things, and ``rt_test_panoptic_separated``."""
    metadata = MetadataCatalog.get(source)
    coco = COCO(metadata.json_file)
    for kind in ("semantic", "stuff", "panoptic"):
        (folder / kind).mkdir()
    numbers = {category: number for number, category in enumerate(sorted(coco.cats))}
    annotations = [write_labels(coco, image, numbers, folder) for image in coco.imgs]
    categories = [{"id": one, "isthing": 1} for one in numbers] + [{"id": STUFF, "isthing": 0}]
    panoptic = folder / "panoptic.json"
    panoptic.write_text(json.dumps({"annotations": annotations, "categories": categories}))
    semantic = ["background", *metadata.thing_classes]
    DatasetCatalog.register(
        "rt_test_semantic", lambda: load_sem_seg(str(folder / "semantic"), metadata.image_root)
    )
    MetadataCatalog.get("rt_test_semantic").set(
        evaluator_type="sem_seg", stuff_classes=semantic, ignore_label=255
    )
    register_coco_panoptic_separated(
        "rt_test_panoptic",
        {
            "thing_classes": metadata.thing_classes,
            "thing_dataset_id_to_contiguous_id": numbers,
            "stuff_classes": ["things", "background"],
            "stuff_dataset_id_to_contiguous_id": {0: 0, STUFF: 1},
        },
        metadata.image_root,
        str(folder / "panoptic"),
        str(panoptic),
        str(folder / "stuff"),
        metadata.json_file,
    )
    yield
    for name in ("rt_test_semantic", "rt_test_panoptic_separated", "rt_test_panoptic_stuffonly"):
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def write_labels(coco: COCO, image: int, numbers: dict[int, int], folder: Path) -> dict:
    """The label files of an image, some pixels of them without a label, and its panoptic annotation."""
    size = coco.imgs[image]["height"], coco.imgs[image]["width"]
    semantic, ids = np.zeros(size, np.uint8), np.full(size, 1, np.int64)
    segments = {1: STUFF}
    for each in coco.imgToAnns[image]:
        mask = coco.annToMask(each).astype(bool)
        semantic[mask] = numbers[each["category_id"]] + 1
        ids[mask] = number = len(segments) + 300
        segments[number] = each["category_id"]
    stuff = (ids == 1).astype(np.uint8)
    for labels in (semantic, stuff):
        labels[:3] = 255
    ids[:3] = 0
    name = Path(coco.imgs[image]["file_name"]).stem + ".png"
    Image.fromarray(semantic).save(folder / "semantic" / name)
    Image.fromarray(stuff).save(folder / "stuff" / name)
    colors = np.stack([ids % 256, ids // 256 % 256, ids // 256**2], 2)
    Image.fromarray(colors.astype(np.uint8)).save(folder / "panoptic" / name)
    info = [
        {"id": number, "category_id": category, "area": int((ids == number).sum()), "iscrowd": 0}
        for number, category in segments.items()
        if (ids == number).any()
    ]
    return {"image_id": image, "file_name": name, "segments_info": info}


@contextmanager
def keypoint_set(source: str, folder: Path):
    """``rt_test_keypoints``."""
    metadata = MetadataCatalog.get(source)
    content = json.loads(Path(metadata.json_file).read_text())
    for each in content["annotations"]:
        x, y, width, height = each["bbox"]
        points = [(x + width / 2, y + height / 2), (x + 1, y + 1), (x + width - 1, y + height - 1)]
        each.update(keypoints=[value for point in points for value in (*point, 2)], num_keypoints=3)
    path = folder / "keypoints.json"
    path.write_text(json.dumps(content))
    names = {"keypoint_names": ["middle", "first", "last"], "keypoint_flip_map": [("first", "last")]}
    register_coco_instances("rt_test_keypoints", names, str(path), metadata.image_root)
    yield
    DatasetCatalog.remove("rt_test_keypoints")
    MetadataCatalog.remove("rt_test_keypoints")


def semantic_segmentor(learned):
    """The config and a SemanticSegmentor that has learned the pictures."""
    keys = {
        **SMALL_HEAD,
        "MODEL.META_ARCHITECTURE": "SemanticSegmentor",
        "MODEL.MASK_ON": False,
        "MODEL.SEM_SEG_HEAD.NUM_CLASSES": 11,
    }
    return variant(learned, "rt_test_semantic", keys, "sem_seg_head", 80)


def panoptic_fpn(learned):
    keys = {
        **SMALL_HEAD,
        "MODEL.META_ARCHITECTURE": "PanopticFPN",
        "MODEL.SEM_SEG_HEAD.NUM_CLASSES": 2,
        "MODEL.PANOPTIC_FPN.COMBINE.STUFF_AREA_LIMIT": 64,
        "MODEL.PANOPTIC_FPN.COMBINE.INSTANCES_CONFIDENCE_THRESH": 0.3,
    }
    return variant(learned, "rt_test_panoptic_separated", keys, "sem_seg_head", 40)


def keypoint_rcnn(learned):
    keys = {
        "MODEL.KEYPOINT_ON": True,
        "MODEL.MASK_ON": False,
        "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS": 3,
        "MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS": "[16]",
        "TEST.KEYPOINT_OKS_SIGMAS": list(SIGMAS),
    }
    return variant(learned, "rt_test_keypoints", keys, "roi_heads.keypoint_head", 60)


def variant(learned, dataset, keys, head, iterations):
    """A model on the backbone of the learned detector, of which one head still has to learn."""
    cfg = learned[0].clone()
    cfg.defrost()
    cfg.merge_from_list(
        as_opts({**keys, "DATASETS.TRAIN": f"('{dataset}',)", "DATASETS.TEST": f"('{dataset}',)"})
    )
    torch.manual_seed(0)
    model = build_model(cfg)
    own = model.state_dict()
    known = {name: value for name, value in learned[1].state_dict().items() if name in own}
    model.load_state_dict({**own, **known})
    mapper = annotated_test_mapper(cfg)
    inputs = [mapper(each) for each in DatasetCatalog.get(dataset)]
    optimizer = torch.optim.Adam(model.get_submodule(head).parameters(), 0.02)
    loss_of = (semantic_loss if head == "sem_seg_head" else keypoint_loss)(model, inputs)
    with EventStorage():
        for _ in range(iterations):
            optimizer.zero_grad()
            loss_of().backward()
            optimizer.step()
    return cfg, model.eval()


def semantic_loss(model, inputs):
    """A function that gives the loss of the head, on features that were computed once."""
    images = preprocess(model, inputs)
    with torch.no_grad():
        features = model.eval().backbone(images.tensor)
    labels = torch.stack([each["sem_seg"] for each in inputs])
    head = model.sem_seg_head.train()
    return lambda: head(features, labels)[1]["loss_sem_seg"]


def keypoint_loss(model, inputs):
    images = model.preprocess_image(inputs)
    targets = [each["instances"] for each in inputs]
    with torch.no_grad(), EventStorage():
        features = model.eval().backbone(images.tensor)
        proposals, _ = model.train().proposal_generator(images, features, targets)
        proposals = model.roi_heads.label_and_sample_proposals(proposals, targets)
    return lambda: model.roi_heads._forward_keypoint(features, proposals)["loss_keypoint"]
