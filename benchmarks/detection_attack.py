"""The cost and strength of a k-step attack on a detector, beside a plain PGD loop, torchattacks and ART.

    python benchmarks/detection_attack.py [--weights FILE] [--steps 3] [--batch 8] [--rounds 5] [--sizes 160]
        [--device cuda --amp bf16]

The unit of cost is the least that a step can cost: the forward pass of Mask R-CNN R18-FPN in training mode
with its losses, and the gradient of their sum with respect to the images, with frozen parameters. Each attack
takes as many passes, one forward and one backward a step. Strength is the mean over the images of the sum of
all losses. Everything takes turns on the same crops of a photograph with six objects each; the times are
medians and ranges, on a CPU those of the processor, which other work on the machine changes less. ART's and
torchattacks' PGD take part where they are installed (benchmarks/requirements.txt). torchattacks attacks
classifiers: it sees the detector as one of two classes, whose cross entropy rises with the sum of the losses.
foolbox and robustness want a prediction for each image, so they cannot. On a CPU all keep freed memory, as
our tools do.

On a GPU each attack ends when the GPU has done it. --amp is the peers' mixed precision; ours is the attack's
own, float16 on GPUs with its losses scaled.
"""

import argparse
import importlib.util
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils.events import EventStorage
from plain import ratios, spread
from sklearn.datasets import load_sample_image
from tabulate import tabulate
from torch import Tensor, nn
from train_net import PRECISIONS

import rt_detectron  # noqa: F401  (registers the backbones)
from rt_detectron.attacks import PGD, ThreatModel, build_detector_attack
from rt_detectron.attacks.detection import DETECTOR_ATTACKS
from rt_detectron.checkpoint.checkpointer import RobustCheckpointer
from rt_detectron.detection import load_detector_config
from rt_detectron.detection.steps import fast
from rt_detectron.utils.errors import one_line_errors
from rt_detectron.utils.memory import keep_freed_memory

CONFIG = "configs/coco_subset/mask_rcnn_r18_fpn.yaml"
OBJECTS = 6
EPS = 4.0  # in 1/255
TARGET = 1.05
UNIT = "forward + backward"


def annotated_photographs(count: int, width: int, device: torch.device) -> list[dict]:
    """A detector's inputs: uint8 RGB, 3:2, with rectangles all over them as ground truth."""
    picture = torch.as_tensor(load_sample_image("china.jpg").transpose(2, 0, 1).copy())[None].float()
    height = width * 2 // 3
    given = []
    for number in range(count):
        crop = picture[..., 8 * number :, 12 * number :]
        image = nn.functional.interpolate(crop, (height, width), mode="bilinear", antialias=True)[0]
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
        image = image.round().byte().to(device)
        given.append({"image": image, "instances": instances.to(device), "image_id": number})
    return given


def gradients(model: nn.Module, given: list[dict], images: list[Tensor]) -> tuple[Tensor, ...]:
    """Those of the sum of Detectron2's training losses, with respect to images in 0..255."""
    images = [image.detach().requires_grad_(True) for image in images]
    model.train()
    with EventStorage():
        losses = model([{**each, "image": image} for each, image in zip(given, images, strict=True)])
    return torch.autograd.grad(sum(losses.values()), images)


def unit(model: nn.Module, given: list[dict], steps: int) -> list[dict]:
    for _ in range(steps):
        gradients(model, given, [each["image"].float() for each in given])
    return given


def plain_loop(model: nn.Module, given: list[dict], steps: int) -> list[dict]:
    """PGD as one writes it down."""
    clean = [each["image"].float() for each in given]
    images, size = clean, 2.5 * EPS / steps
    for _ in range(steps):
        moved = zip(images, gradients(model, given, images), clean, strict=True)
        images = [
            torch.min(torch.max(image + size * grad.sign(), start - EPS), start + EPS).clamp(0, 255)
            for image, grad, start in moved
        ]
    return [{**each, "image": image} for each, image in zip(given, images, strict=True)]


class _Losses(nn.Module):
    """A Detectron2 detector as torchvision's are called, which ART knows."""

    def __init__(self, model: nn.Module, given: list[dict]):
        super().__init__()
        self.model, self.given = model, given

    def forward(self, images, targets=None):
        with EventStorage():
            inputs = [{**each, "image": 255 * image} for each, image in zip(self.given, images, strict=True)]
            return {"loss": sum(self.model(inputs).values())}


def art_pgd(model: nn.Module, given: list[dict], steps: int) -> list[dict]:
    from art.attacks.evasion import ProjectedGradientDescent
    from art.estimators.object_detection import PyTorchObjectDetector

    shape = tuple(given[0]["image"].shape)
    model.train()
    detector = PyTorchObjectDetector(
        _Losses(model, given),
        shape,
        clip_values=(0, 1),
        attack_losses=("loss",),
        device_type=model.device.type,
    )
    attack = ProjectedGradientDescent(
        detector,
        eps=EPS / 255,
        eps_step=2.5 * EPS / steps / 255,
        max_iter=steps,
        batch_size=len(given),
        verbose=False,
    )
    boxes = [each["instances"].get_fields() for each in given]
    targets = [
        {
            "boxes": fields["gt_boxes"].tensor.cpu().numpy(),
            "labels": fields["gt_classes"].cpu().numpy(),
            "scores": np.ones(OBJECTS, np.float32),
        }
        for fields in boxes
    ]
    images = np.stack([each["image"].cpu().numpy() for each in given]).astype(np.float32) / 255
    found = torch.as_tensor(attack.generate(images, targets)).to(model.device)
    return [{**each, "image": 255 * image} for each, image in zip(given, found, strict=True)]


class _TwoClasses(nn.Module):
    """A detector as one example of a classifier: the logits of class 0 and of the sum of its losses."""

    def __init__(self, model: nn.Module, given: list[dict]):
        super().__init__()
        self.losses = _Losses(model, given)

    def forward(self, images: Tensor) -> Tensor:
        total = self.losses(images)["loss"]
        return torch.stack([torch.zeros_like(total), total])[None]


def torchattacks_pgd(model: nn.Module, given: list[dict], steps: int) -> list[dict]:
    import torchattacks

    detector = _TwoClasses(model, given).train()
    alpha = 2.5 * EPS / steps / 255
    attack = torchattacks.PGD(detector, eps=EPS / 255, alpha=alpha, steps=steps, random_start=False)
    attack.set_model_training_mode(model_training=True, batchnorm_training=True, dropout_training=True)
    images = torch.stack([each["image"].float() / 255 for each in given])
    found = attack(images, torch.zeros(1, dtype=torch.long, device=model.device))
    return [{**each, "image": 255 * image} for each, image in zip(given, found, strict=True)]


def seconds(work: Callable[[], object], device: torch.device) -> float:
    if device.type == "cpu":
        start = time.process_time()
        work()
        return time.process_time() - start
    start = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", default="", help="of a detector of the config; default: random")
    parser.add_argument("--config-file", default=CONFIG)
    parser.add_argument("--losses", nargs="+", default=["all"], help=", ".join(DETECTOR_ATTACKS))
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sizes", type=int, nargs="+", default=[160], help="widths of the images")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--amp", default="", choices=["", *PRECISIONS], help="mixed precision")
    args = parser.parse_args()
    if args.device == "cpu":
        keep_freed_memory()
    with one_line_errors():
        opts = ["MODEL.WEIGHTS", args.weights, "MODEL.DEVICE", args.device]
        print(table(load_detector_config(args.config_file, opts), args))


def attacks(args: argparse.Namespace, device: torch.device, num_classes: int) -> dict[str, Callable]:
    """By name: functions of (model, inputs) that give attacked inputs."""
    mixed = torch.autocast(device.type, PRECISIONS.get(args.amp), enabled=bool(args.amp))
    found: dict[str, Callable] = {UNIT: lambda model, given: unit(model, given, args.steps)}
    found["plain PGD loop"] = lambda model, given: plain_loop(model, given, args.steps)
    if importlib.util.find_spec("art"):
        found["ART's PGD"] = lambda model, given: art_pgd(model, given, args.steps)
    if importlib.util.find_spec("torchattacks"):
        found["torchattacks' PGD"] = lambda model, given: torchattacks_pgd(model, given, args.steps)
    found = {name: mixed(attack) for name, attack in found.items()}
    for loss in args.losses:
        counts = (1,) * num_classes if DETECTOR_ATTACKS[loss].needs_object_counts else ()
        pgd = PGD(ThreatModel("linf", EPS), args.steps)
        attack = build_detector_attack(loss, pgd, object_counts=counts, amp=bool(args.amp))
        found[f"ours, {loss}"] = attack.perturb
    return found


def table(cfg: CfgNode, args: argparse.Namespace) -> str:
    torch.manual_seed(0)
    model = build_model(cfg)
    RobustCheckpointer(model).load(cfg.MODEL.WEIGHTS)
    fast(model)
    for parameter in model.parameters():  # so that the unit has no gradient of a weight either
        parameter.requires_grad_(False)
    strength = build_detector_attack("all", PGD(ThreatModel("linf", EPS), 1))
    rows = []
    for width in args.sizes:
        given = annotated_photographs(args.batch, width, model.device)
        times: dict[str, list[float]] = {}
        reached = {}
        for number in range(args.rounds + 1):  # the first one warms up
            for name, attack in attacks(args, model.device, model.roi_heads.num_classes).items():
                found: list[dict] = []
                model.eval()
                took = seconds(lambda: found.extend(attack(model, given)), model.device)  # noqa: B023
                if number:
                    times.setdefault(name, []).append(took / args.steps)
                model.eval()
                reached[name] = statistics.mean(strength.value(model, found))
        for name, took in times.items():
            milliseconds = spread([1000 * each for each in took], 0)
            rows.append([width, name, milliseconds, spread(ratios(took, times[UNIT])), reached[name]])
    headers = ["width", "attack", "ms a step", f"ratio (target {TARGET})", "sum of losses"]
    return tabulate(rows, headers, tablefmt="github", floatfmt=("d", "", "", "", ".3f"))


if __name__ == "__main__":
    main()
