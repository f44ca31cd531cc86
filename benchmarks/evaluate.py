"""Seconds of evaluating a detector with masks, from images to AP: ours against Detectron2's evaluator.

    DETECTRON2_DATASETS=... python benchmarks/evaluate.py [--config-file F --images 24 --size 320 --rounds 3]
        [--detections 50] [--keep] [--device cuda --amp bf16] [KEY VALUE ...]

Both sides have the same weights and images of coco_2017_val, and each has a process of its own. Detectron2's
is its build_model, its DefaultTrainer.test and its COCOEvaluator, ours what tools/train_net.py --eval-only
runs, which keeps freed memory (--keep: Detectron2 as well). The network is random and finds nothing. So that
AP and the masks are as of a trained one, what it would return is replaced: by boxes near the annotated
objects, others at random, and soft masks of 28 x 28 pixels. All of its layers run all the same, the mask head
on these boxes. The sides take turns. On CPUs "s" are CPU seconds of its process, on a GPU it is waited for.
"""

import argparse
import contextlib
import io
import json
import logging
import multiprocessing
import os
import tempfile
import time
import warnings

import numpy as np
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.engine import DefaultTrainer
from detectron2.evaluation import COCOEvaluator
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from plain import ratios, spread
from torch import nn
from train_net import PRECISIONS, processor, random_backbone

from rt_detectron.checkpoint.checkpointer import RobustCheckpointer
from rt_detectron.data import check_datasets
from rt_detectron.detection import Trainer, load_detector_config
from rt_detectron.utils.errors import InputError, one_line_errors
from rt_detectron.utils.memory import keep_freed_memory

MASK = 28  # pixels
CONFIG = "configs/coco_subset/mask_rcnn_r18_fpn.yaml"


def subset(images: int, folder: str) -> str:
    """The name of a data set of the first images of coco_2017_val that have objects."""
    whole = MetadataCatalog.get("coco_2017_val")
    if not os.path.isfile(whole.json_file):
        raise InputError(f"{whole.json_file}: no such file; set DETECTRON2_DATASETS to the folder of coco/")
    with open(whole.json_file) as file:
        content = json.load(file)
    annotated = {annotation["image_id"] for annotation in content["annotations"]}
    content["images"] = [image for image in content["images"] if image["id"] in annotated][:images]
    kept = {image["id"] for image in content["images"]}
    content["annotations"] = [each for each in content["annotations"] if each["image_id"] in kept]
    path = os.path.join(folder, "annotations.json")
    with open(path, "w") as file:
        json.dump(content, file)
    return f"coco:{path}:{whole.image_root}"


def detections(record: dict, count: int, classes: int) -> Instances:
    """What a trained detector might find in an image, in its pixels."""
    rng = np.random.default_rng(record["image_id"])
    height, width = record["height"], record["width"]
    objects = [each for each in record["annotations"] if not each.get("iscrowd")]
    boxes = [np.array(each["bbox"]) for each in objects for _ in range(2)][:count]  # x, y, width, height
    boxes = [box + rng.normal(0, 0.08, 4) * np.tile(box[2:], 2) for box in boxes]
    labels = [each["category_id"] for each in objects for _ in range(2)][:count]
    rest = count - len(boxes)
    size = np.exp(rng.uniform(np.log(8), np.log(min(height, width)), (rest, 2)))
    random = np.hstack([rng.random((rest, 2)) * ((width, height) - size), size])
    found = np.vstack([*boxes, random]).astype(np.float32)
    found[:, 2:] = found[:, :2] + np.abs(found[:, 2:]).clip(2)
    instances = Instances((height, width))
    instances.pred_boxes = Boxes(torch.from_numpy(found))
    instances.pred_boxes.clip((height, width))
    instances.pred_classes = torch.tensor([*labels, *rng.integers(0, classes, rest)])
    instances.scores = torch.from_numpy(rng.random(count) ** np.where(np.arange(count) < len(boxes), 1, 3))
    return instances[instances.pred_boxes.nonempty(1)]


def soft_masks(count: int, seed: int) -> torch.Tensor:
    """(count, 1, MASK, MASK): blurred discs with a ragged edge."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.linspace(-1, 1, MASK)
    radius = (x[:, None] ** 2 + x**2).sqrt()
    edge = 0.9 + 0.1 * torch.randn(count, 1, MASK, MASK, generator=generator)
    return torch.sigmoid(8 * (edge - radius))


class Finding(nn.Module):
    """A detector whose box head finds what :func:`detections` gives."""

    def __init__(self, model: nn.Module, records: dict[int, dict], count: int, dtype: torch.dtype | None):
        super().__init__()
        self.model, self.records, self.count, self.dtype = model, records, count, dtype
        model.roi_heads.forward = self._heads

    def forward(self, inputs: list[dict]) -> list[dict]:
        self.inputs = inputs
        with torch.autocast(self.model.device.type, self.dtype, enabled=self.dtype is not None):
            return self.model(inputs)

    def _heads(self, images, features, proposals, targets=None):
        heads = self.model.roi_heads
        heads._forward_box(features, proposals)
        given = []
        for each, (height, width) in zip(self.inputs, images.image_sizes, strict=True):
            found = detections(self.records[each["image_id"]], self.count, heads.num_classes)
            boxes = Boxes(found.pred_boxes.tensor.clone())
            boxes.scale(width / found.image_size[1], height / found.image_size[0])
            fields = {**found.get_fields(), "pred_boxes": boxes}
            given.append(Instances((height, width), **fields).to(self.model.device))
        found = heads.forward_with_given_boxes(features, given)
        for each, instances in zip(self.inputs, found, strict=True):
            instances.pred_masks = soft_masks(len(instances), each["image_id"]).to(self.model.device)
        return found, {}


def evaluated(side: str, model: nn.Module, cfg, folder: str) -> tuple[float, dict]:
    """Seconds and metrics."""
    (name,) = cfg.DATASETS.TEST
    if side == "ours":
        test, evaluator = Trainer.test, Trainer.build_evaluator(cfg, name, folder)
    else:
        test = DefaultTrainer.test
        evaluator = COCOEvaluator(name, output_dir=folder, use_fast_impl=False)
    clock = time.process_time if cfg.MODEL.DEVICE == "cpu" else time.perf_counter
    start = clock()
    with contextlib.redirect_stdout(io.StringIO()):
        metrics = test(cfg, model, [evaluator])
    if cfg.MODEL.DEVICE != "cpu":
        torch.cuda.synchronize()
    return clock() - start, metrics


def take_turns(side: str, args: argparse.Namespace, opts: list[str], folder: str, connection) -> None:
    """A process that evaluates each time it is sent True, and sends seconds and metrics."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    if side == "ours" or args.keep:
        keep_freed_memory()
    cfg = load_detector_config(args.config_file, opts)
    check_datasets(cfg.DATASETS.TEST)
    records = {record["image_id"]: record for record in DatasetCatalog.get(cfg.DATASETS.TEST[0])}
    torch.manual_seed(0)  # both have the same heads
    model = Trainer.build_model(cfg) if side == "ours" else build_model(cfg)
    RobustCheckpointer(model).load(cfg.MODEL.WEIGHTS)
    finding = Finding(model, records, args.detections, PRECISIONS.get(args.amp)).eval()
    while connection.recv():
        connection.send(evaluated(side, finding, cfg, os.path.join(folder, side)))


def measure(args: argparse.Namespace, folder: str) -> None:
    if (args.device != "cpu" and not torch.cuda.is_available()) or (args.amp and args.device == "cpu"):
        raise InputError(
            f"--device {args.device} --amp {args.amp}: no GPU found, or --device cuda is missing"
        )
    arch = load_detector_config(args.config_file, []).MODEL.ROBUST.ARCH
    sizes = ["INPUT.MIN_SIZE_TEST", args.size, "INPUT.MAX_SIZE_TEST", args.size * 5 // 3]
    opts = [
        *("MODEL.DEVICE", args.device, "MODEL.WEIGHTS", random_backbone(arch, folder)),
        *("MODEL.MASK_ON", "True", "DATASETS.TEST", subset(args.images, folder)),
        *("DATALOADER.NUM_WORKERS", "0", *map(str, sizes), *args.opts),
    ]
    check_datasets(load_detector_config(args.config_file, opts).DATASETS.TEST)  # here an error is one line
    spawn = multiprocessing.get_context("spawn")
    seconds: dict[str, list[float]] = {"Detectron2": [], "ours": []}
    results, turns = {}, {}
    for side in seconds:
        turns[side], connection = spawn.Pipe()
        spawn.Process(target=take_turns, args=(side, args, opts, folder, connection), daemon=True).start()
    for number in range(args.rounds + 1):
        for side in list(seconds)[:: -1 if number % 2 else 1]:
            turns[side].send(True)
            took, results[side] = turns[side].recv()
            if number:  # the first one warms up
                seconds[side].append(took)
    for turn in turns.values():
        turn.send(False)
    print(f"{processor()}, torch {torch.__version__}, {torch.get_num_threads()} threads: {args.config_file}")
    print(f"{args.images} images of {args.size} px, {args.detections} detections each, {args.rounds} rounds")
    print(f"{'':<12} {'s':<22} {'box AP':>9} {'mask AP':>9}")
    for side, times in seconds.items():
        aps = " ".join(f"{results[side][task]['AP']:>9.5f}" for task in ("bbox", "segm"))
        print(f"{side:<12} {spread(times):<22} {aps}")
    theirs, ours = seconds.values()
    what = [os.path.basename(args.config_file), f"{args.size} px", f"{args.detections} detections", args.amp]
    columns = [", ".join(filter(None, what)), spread(theirs), spread(ours), spread(ratios(theirs, ours))]
    print(f"| {' | '.join(columns)} |")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", default=CONFIG)
    parser.add_argument("--images", type=int, default=24)
    parser.add_argument("--size", type=int, default=320, help="of the short side, in the network")
    parser.add_argument("--detections", type=int, default=50, help="in each image")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--keep", action="store_true", help="freed memory on both sides")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--amp", default="", choices=["", *PRECISIONS], help="on a GPU, of both sides")
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="KEY VALUE ... of the config")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as folder, one_line_errors():
        measure(args, folder)


if __name__ == "__main__":
    main()
