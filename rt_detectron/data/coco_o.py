"""COCO-O: COCO's classes in drawings, paintings, bad weather and the like, as test sets by name.

Mao et al. (ICCV 2023), "COCO-O: A Benchmark for Object Detectors under Natural Distribution Shifts",
https://arxiv.org/abs/2307.12730: six domains, 6,782 images and 26,624 boxes. Each domain lies like COCO's
validation set in a folder of its own.
"""

import os
from collections.abc import Sequence

from detectron2.data.datasets import register_coco_instances
from detectron2.data.datasets.builtin_meta import _get_builtin_metadata

DOMAINS = ("sketch", "cartoon", "painting", "weather", "handmake", "tattoo")
SETS = tuple(f"coco_o_{domain}" for domain in DOMAINS)
# Of the AP on COCO that a detector is expected to keep. It gives their number for Faster R-CNN, which a test
# has; the paper itself was not at hand.
KEPT = 0.45


def register_coco_o(root: str) -> None:
    """``coco_o_sketch`` and so on, from ``root``/coco-o/sketch/{val2017,annotations}."""
    for domain, name in zip(DOMAINS, SETS, strict=True):
        folder = os.path.join(root, "coco-o", domain)
        annotations = os.path.join(folder, "annotations", "instances_val2017.json")
        metadata = _get_builtin_metadata("coco")
        register_coco_instances(name, metadata, annotations, os.path.join(folder, "val2017"))


def effective_robustness(domain_aps: Sequence[float], coco_ap: float) -> float:
    """The mean box AP over the domains minus what the AP on COCO val2017 predicts, in percent."""
    return sum(domain_aps) / len(domain_aps) - KEPT * coco_ap
