"""Seconds per iteration of fine-tuning: ours against Detectron2's own trainer on the same config.

    DETECTRON2_DATASETS=... python benchmarks/train_net.py [--config-file F --rounds 20] [KEY VALUE ...]

Detectron2's is its DefaultTrainer, with the same backbone, seed and loader. Both train on the same
batches with all of their hooks, and waiting for the loader counts. Their iterations alternate; the median
over the rounds is printed. In each round ours starts from Detectron2's weights, so that the losses can be
compared: if both do the same work, they differ by rounding alone.
"""

import argparse
import logging
import statistics
import tempfile
import time
import warnings

import torch
from detectron2.engine import DefaultTrainer
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import EventStorage
from tqdm import tqdm

import rt_detectron  # noqa: F401  (registers the backbones)
from rt_detectron.detection import Trainer, load_detector_config

SEED = 1


class Detectron2Trainer(DefaultTrainer):
    """Detectron2's, on our batches."""

    @classmethod
    def build_train_loader(cls, cfg):
        return Trainer.build_train_loader(cfg)


class Side:
    """One trainer, whose iterations are run one at a time."""

    def __init__(self, trainer_class: type[DefaultTrainer], config_file: str, opts: list[str], folder: str):
        cfg = load_detector_config(
            config_file, [*opts, "OUTPUT_DIR", folder, "SOLVER.CHECKPOINT_PERIOD", "1000000"]
        )
        seed_all_rng(SEED)
        self.trainer = trainer_class(cfg)
        self.trainer.resume_or_load(resume=False)
        self.storage = EventStorage()
        self.trainer.storage = self.storage
        self.times: list[float] = []
        self.losses: list[float] = []
        seed_all_rng(SEED)
        with self.storage:
            self.trainer.before_train()
        iter(self.trainer._trainer._data_loader_iter)  # starts the workers, under this seed

    def step(self, iteration: int) -> None:
        with self.storage:
            self.trainer.iter = iteration
            start = time.perf_counter()
            self.trainer.before_step()
            torch.manual_seed(iteration)  # the two draw the same proposals
            self.trainer.run_step()
            self.trainer.after_step()
            self._synchronise()
            self.times.append(time.perf_counter() - start)
            self.losses.append(self.storage.history("total_loss").latest())
            self.storage.step()

    def _synchronise(self) -> None:
        if self.trainer.cfg.MODEL.DEVICE != "cpu":
            torch.cuda.synchronize()


def measure(args: argparse.Namespace, folder: str) -> None:
    sides = {
        name: Side(trainer_class, args.config_file, args.opts, f"{folder}/{number}")
        for number, (name, trainer_class) in enumerate(
            {"Detectron2": Detectron2Trainer, "ours": Trainer}.items()
        )
    }
    for iteration in tqdm(range(args.rounds + args.warm_up), desc="rounds", disable=None):
        order = list(sides.values())
        order[1].trainer.model.load_state_dict(order[0].trainer.model.state_dict())
        for side in order if iteration % 2 else reversed(order):
            side.step(iteration)
    medians = {name: statistics.median(side.times[args.warm_up :]) for name, side in sides.items()}
    print(f"{args.config_file} {' '.join(args.opts)}")
    print(f"{torch.get_num_threads()} threads, {args.rounds} iterations of each")
    print(f"{'':<12} {'s/iteration':>12} {'x Detectron2':>13} {'first loss':>11} {'last loss':>11}")
    for name, side in sides.items():
        faster = medians["Detectron2"] / medians[name]
        first, last = side.losses[0], side.losses[-1]
        print(f"{name:<12} {medians[name]:>12.3f} {faster:>13.2f} {first:>11.5f} {last:>11.5f}")
    pairs = zip(*(side.losses for side in sides.values()), strict=True)
    print(f"largest relative difference of two losses: {max(abs(a - b) / abs(a) for a, b in pairs):.1e}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", default="configs/coco_subset/mask_rcnn_r18_fpn.yaml")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--warm-up", type=int, default=2, help="iterations that are not counted")
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="KEY VALUE ... of the config")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.INFO)
    with tempfile.TemporaryDirectory() as folder:
        measure(args, folder)


if __name__ == "__main__":
    main()
