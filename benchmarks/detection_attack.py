"""The cost of a k-step attack on a detector, relative to k forward and backward passes.

    python benchmarks/detection_attack.py [--weights FILE] [--steps 10] [--rounds 5] [--sizes 320 640]

The unit is the least that a step can cost: the forward pass of Mask R-CNN R18-FPN in training mode with its
losses, and the gradient of their sum with respect to the image, with frozen parameters. Both take turns on
the same photograph with six objects; the figures are medians.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils.events import EventStorage
from sklearn.datasets import load_sample_image
from tabulate import tabulate
from torch import nn

import rt_detectron  # noqa: F401  (registers the backbones)
from rt_detectron.attacks import PGD, DetectorAttack, ThreatModel, build_detector_attack
from rt_detectron.attacks.detection import DETECTOR_ATTACKS
from rt_detectron.checkpoint.checkpointer import RobustCheckpointer
from rt_detectron.detection import load_detector_config
from rt_detectron.utils.errors import one_line_errors

CONFIG = "configs/coco_subset/mask_rcnn_r18_fpn.yaml"
OBJECTS = 6
TARGET = 1.2


def annotated_photograph(width: int, device: torch.device) -> dict:
    """A detector's input: uint8 RGB, 3:2, with rectangles all over it as ground truth."""
    image = torch.as_tensor(load_sample_image("china.jpg").transpose(2, 0, 1).copy())[None].float()
    height = width * 2 // 3
    image = nn.functional.interpolate(image, (height, width), mode="bilinear", antialias=True)[0]
    corners = torch.rand(OBJECTS, 2) * 0.6
    boxes = torch.cat([corners, corners + 0.15 + 0.2 * torch.rand(OBJECTS, 2)], 1)
    boxes *= torch.tensor([width, height, width, height])
    masks = torch.zeros(OBJECTS, height, width, dtype=torch.bool)
    for mask, (x0, y0, x1, y1) in zip(masks, boxes.int().tolist(), strict=True):
        mask[y0:y1, x0:x1] = True
    instances = Instances((height, width))
    instances.gt_boxes = Boxes(boxes)
    instances.gt_classes = torch.arange(OBJECTS)
    instances.gt_masks = BitMasks(masks)
    return {
        "image": image.round().byte().to(device),
        "instances": instances.to(device),
        "image_id": 1,
        "height": height,
        "width": width,
    }


def forward_and_backward(model: nn.Module, given: dict) -> None:
    image = given["image"].float().requires_grad_(True)
    losses = model([{**given, "image": image}])
    torch.autograd.grad(sum(losses.values()), image)


def seconds(work: Callable[[], object], device: torch.device) -> float:
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(model: nn.Module, given: dict, attack: DetectorAttack, rounds: int) -> tuple[float, float]:
    """Median seconds of (a forward and a backward pass, the attack), in turns after one warm-up of each."""
    steps = attack.pgd.steps
    plain_times, attack_times = [], []
    for _ in range(rounds + 1):
        model.train()
        with EventStorage():
            plain = seconds(lambda: [forward_and_backward(model, given) for _ in range(steps)], model.device)
        plain_times.append(plain / steps)
        model.eval()
        attack_times.append(seconds(lambda: attack(model, [given]), model.device))
    return statistics.median(plain_times[1:]), statistics.median(attack_times[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", default="", help="of a detector of the config; default: random")
    parser.add_argument("--config-file", default=CONFIG)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sizes", type=int, nargs="+", default=[320, 640], help="widths of the image")
    args = parser.parse_args()
    with one_line_errors():
        print(table(load_detector_config(args.config_file, ["MODEL.WEIGHTS", args.weights]), args))


def table(cfg: CfgNode, args: argparse.Namespace) -> str:
    torch.manual_seed(0)
    model = build_model(cfg)
    RobustCheckpointer(model).load(cfg.MODEL.WEIGHTS)
    for parameter in model.parameters():  # so that the unit has no gradient of a weight either
        parameter.requires_grad_(False)
    rows = []
    for width in args.sizes:
        given = annotated_photograph(width, model.device)
        for loss, kind in DETECTOR_ATTACKS.items():
            if kind.task in ("sem_seg", "keypoints"):  # of other detectors
                continue
            options = {}
            if kind.needs_object_counts:
                options["object_counts"] = (1,) * model.roi_heads.num_classes
            attack = build_detector_attack(loss, PGD(ThreatModel("linf", 4.0), args.steps), **options)
            unit, attacked = measure(model, given, attack, args.rounds)
            rows.append(
                [width, loss, 1000 * unit, 1000 * attacked / args.steps, attacked / args.steps / unit]
            )
    headers = ["width", "loss", "forward + backward, ms", "attack, ms a step", f"ratio (target {TARGET})"]
    return tabulate(rows, headers, tablefmt="github", floatfmt=("d", "", ".1f", ".1f", ".2f"))


if __name__ == "__main__":
    main()
