"""CPU seconds of a training on a frozen backbone: Detectron2's against ours, which computes features once.

    DETECTRON2_DATASETS=... python benchmarks/frozen_features.py [--config-file F --images 32 --epochs 12]
        [--size 320 --batch 2 --rounds 2] [KEY VALUE ...]

All train the pyramid and the heads on the first annotated images of coco_2017_val and their mirror images,
with MODEL.BACKBONE.FREEZE_AT 5, from the same random backbone, whose batch norms fit it. Ours takes part
twice: with an empty cache of features (DATALOADER.FEATURE_CACHE_GB), and with the one it left, as the later
seeds and learning rates of a study find it. Loading images, and writing and reading features, counts. The
trainings run one after another in this process, which keeps freed memory, and again in each round.
"""

import argparse
import logging
import os
import tempfile
import warnings

import torch
from evaluate import subset
from plain import ratios, spread
from tqdm import trange
from train_net import Detectron2Trainer, Side, processor, random_backbone

from rt_detectron.data import check_datasets
from rt_detectron.detection import Trainer, load_detector_config
from rt_detectron.utils.errors import one_line_errors
from rt_detectron.utils.memory import keep_freed_memory

CONFIG = "configs/coco_subset/faster_rcnn_r18_fpn.yaml"


def measure(args: argparse.Namespace, folder: str) -> None:
    arch = load_detector_config(args.config_file, args.opts).MODEL.ROBUST.ARCH
    dataset = subset(args.images, folder)
    check_datasets([dataset])
    opts = [
        *("MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", random_backbone(arch, folder), "SOLVER.BASE_LR", "0.0001"),
        *("DATASETS.TRAIN", dataset, "DATASETS.TEST", "()"),
        *("DATALOADER.NUM_WORKERS", "0", "MODEL.BACKBONE.FREEZE_AT", "5"),
        *("INPUT.MIN_SIZE_TRAIN", f"({args.size},)", "INPUT.MAX_SIZE_TRAIN", str(args.size * 5 // 3)),
        *("SOLVER.IMS_PER_BATCH", str(args.batch), *args.opts),
    ]
    cached = [*opts, "DATALOADER.FEATURE_CACHE_GB", "20.0"]
    iterations = args.epochs * (args.images // args.batch)
    print(f"{processor()}, torch {torch.__version__}, {torch.get_num_threads()} threads: {args.config_file}")
    print(f"{iterations} iterations: {args.epochs} epochs of {args.images} images of {args.size} px")
    sides = [("Detectron2", Detectron2Trainer, opts), ("empty", Trainer, cached), ("full", Trainer, cached)]
    seconds: dict[str, list[float]] = {name: [] for name, *_ in sides}
    for number in range(args.rounds):
        os.environ["RT_DETECTRON_CACHE"] = os.path.join(folder, f"cache{number}")
        for name, trainer, keys in sides:
            side = Side(trainer, args.config_file, keys, os.path.join(folder, f"{name}{number}"), None)
            for iteration in trange(iterations, desc=name, disable=None, leave=False):
                side.step(iteration)
            seconds[name].append(sum(side.cpu_times))
            losses = float(sum(side.losses[-5:])) / 5
            print(f"{name:<10} {seconds[name][-1]:8.1f} CPU s, last losses {losses:.4f}")
    theirs, empty, full = seconds.values()
    columns = [f"{arch}, {os.path.basename(args.config_file)}, {args.size} px", spread(theirs, 1)]
    for ours in (empty, full):
        columns += [spread(ours, 1), spread(ratios(theirs, ours), 1)]
    print(f"| {' | '.join(columns)} |")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", default=CONFIG)
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--size", type=int, default=320, help="of the short side")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="KEY VALUE ... of the config")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    keep_freed_memory()
    with tempfile.TemporaryDirectory() as folder, one_line_errors():
        measure(args, folder)


if __name__ == "__main__":
    main()
