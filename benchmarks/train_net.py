"""Seconds per iteration of fine-tuning: ours against Detectron2's own trainer on the same config.

    DETECTRON2_DATASETS=... python benchmarks/train_net.py [--config-file F --rounds 5 --threads 1,2]
        [--size 320 --images 2] [--device cuda --amp bf16] [KEY VALUE ...]

Without MODEL.WEIGHTS the backbone is random, with batch norms that fit it, and the learning rate is 0.0001.

Detectron2's is its DefaultTrainer, with the same backbone, seed and loader. Both train on the same
batches with all of their hooks, and waiting for the loader counts. Their iterations alternate; medians
and ranges of the rounds are printed, and what took longest in one more iteration of each. In each round ours
starts from Detectron2's weights, so that the losses can be compared: if both do the same work, they differ by
rounding alone. (An untrained detector has proposals of nearly equal scores, and rounding may choose others.)

On a CPU both keep freed memory, as our tools do. On a busy machine only "CPU s" counts, the seconds that this
process computed, without the loader's workers. On a GPU each iteration ends when the GPU has done it. The
last lines are rows of docs/results/speed.md.
"""

import argparse
import logging
import os
import platform
import tempfile
import time
import warnings

import torch
from detectron2.engine import DefaultTrainer, SimpleTrainer
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import EventStorage
from plain import ratios, spread
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

import rt_detectron  # noqa: F401  (registers the backbones)
from rt_detectron.checkpoint.architectures import build_classifier
from rt_detectron.checkpoint.convert import convert_checkpoint
from rt_detectron.detection import Trainer, load_detector_config
from rt_detectron.utils.errors import InputError, one_line_errors
from rt_detectron.utils.memory import keep_freed_memory

SEED = 1
PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16}


def random_backbone(arch: str, folder: str) -> str:
    """A converted file of random weights, which as they are would give frozen norms ever larger features."""
    torch.manual_seed(SEED)
    network = build_classifier(arch)
    for module in network.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.momentum = None  # the mean over all that it sees
    with torch.no_grad():
        network.train()(torch.randn(8, 3, 128, 128))
    classifier, backbone = (os.path.join(folder, name) for name in ("classifier.pth", "backbone.pkl"))
    torch.save(network.state_dict(), classifier)
    convert_checkpoint(classifier, backbone, arch=arch)
    return backbone


class Detectron2Trainer(DefaultTrainer):
    """Detectron2's, on our batches."""

    @classmethod
    def build_train_loader(cls, cfg):
        return Trainer.build_train_loader(cfg)


class Side:
    """One trainer, whose iterations are run one at a time."""

    def __init__(
        self,
        trainer_class: type[DefaultTrainer],
        config_file: str,
        opts: list[str],
        folder: str,
        precision: torch.dtype | None,
    ):
        cfg = load_detector_config(
            config_file, [*opts, "OUTPUT_DIR", folder, "SOLVER.CHECKPOINT_PERIOD", "1000000"]
        )
        seed_all_rng(SEED)
        self.trainer = trainer_class(cfg)
        self.trainer.resume_or_load(resume=False)
        if precision is not None:
            self.trainer._trainer.precision = precision
        self.storage = EventStorage()
        self.trainer.storage = self.storage
        self.times: list[float] = []
        self.cpu_times: list[float] = []
        self.losses: list[torch.Tensor] = []
        self._keep_losses(self.trainer._trainer)
        seed_all_rng(SEED)
        with self.storage:
            self.trainer.before_train()
        iter(self.trainer._trainer._data_loader_iter)  # starts the workers, under this seed

    def _keep_losses(self, trainer: SimpleTrainer) -> None:
        """Keep each step's total loss, which ours writes to the storage every 20 steps alone."""
        write = trainer._write_metrics

        def keep_and_write(loss_dict, *args, **kwargs):
            self.losses.append(sum(loss.detach() for loss in loss_dict.values()))
            write(loss_dict, *args, **kwargs)

        trainer._write_metrics = keep_and_write

    def step(self, iteration: int) -> None:
        with self.storage:
            self.trainer.iter = iteration
            start, cpu_start = time.perf_counter(), time.process_time()
            self.trainer.before_step()
            torch.manual_seed(iteration)  # the two draw the same proposals
            self.trainer.run_step()
            self.trainer.after_step()
            self._synchronise()
            self.times.append(time.perf_counter() - start)
            self.cpu_times.append(time.process_time() - cpu_start)
            self.storage.step()

    def _synchronise(self) -> None:
        if self.trainer.cfg.MODEL.DEVICE != "cpu":
            torch.cuda.synchronize()


def alternate(sides: dict[str, Side], iterations: range) -> None:
    detectron2, ours = sides.values()
    for side in sides.values():
        side.times, side.cpu_times, side.losses = [], [], []
    for iteration in tqdm(iterations, desc="rounds", disable=None):
        ours.trainer.model.load_state_dict(detectron2.trainer.model.state_dict())
        for side in (detectron2, ours) if iteration % 2 else (ours, detectron2):
            side.step(iteration)


def print_times(sides: dict[str, Side], warm_up: int) -> None:
    detectron2 = sides["Detectron2"]
    print(f"{torch.get_num_threads()} threads, {len(detectron2.times) - warm_up} iterations of each")
    print(f"{'':<10} {'s':>22} {'CPU s':>22} {'x':>19} {'x, CPU':>19} {'first loss':>11} {'last loss':>11}")
    for name, side in sides.items():
        seconds = [spread(times[warm_up:], 3) for times in (side.times, side.cpu_times)]
        faster = [
            spread(ratios(theirs[warm_up:], mine[warm_up:]))
            for theirs, mine in ((detectron2.times, side.times), (detectron2.cpu_times, side.cpu_times))
        ]
        columns = [f"{each:>22}" for each in seconds] + [f"{each:>19}" for each in faster]
        columns += [f"{loss:>11.5f}" for loss in (side.losses[0], side.losses[-1])]
        print(f"{name:<10} {' '.join(columns)}")
    pairs = zip(*(side.losses for side in sides.values()), strict=True)
    print(f"largest relative difference of two losses: {max(abs(a - b) / abs(a) for a, b in pairs):.1e}")


def rows_to_paste(sides: dict[str, Side], args: argparse.Namespace) -> list[str]:
    """Of a table of docs/results/speed.md: seconds of each round, and how many times as fast."""
    on_cpu = args.device == "cpu"
    where = f"{torch.get_num_threads()} threads" if on_cpu else torch.cuda.get_device_name()
    what = [os.path.basename(args.config_file), f"{args.size} px" if args.size else "", args.amp, where]
    theirs, ours = (side.times[args.warm_up :] for side in sides.values())
    columns = [", ".join(filter(None, what)), spread(theirs), spread(ours), spread(ratios(theirs, ours))]
    return [f"| {' | '.join(columns)} |"]


def processor() -> str:
    """Its name, where the system tells it."""
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    return platform.processor()


def print_profile(sides: dict[str, Side], iteration: int, device: str, rows: int = 12) -> None:
    """What takes longest in one iteration, in percent of Detectron2's whole iteration."""
    activities, time_of = [ProfilerActivity.CPU], "self_cpu_time_total"
    if device != "cpu":
        activities, time_of = [*activities, ProfilerActivity.CUDA], "self_device_time_total"
    seconds = {}
    for name, side in sides.items():
        with profile(activities=activities) as profiler:
            side.step(iteration)
        seconds[name] = {event.key: getattr(event, time_of) / 1e6 for event in profiler.key_averages()}
    whole = sum(seconds["Detectron2"].values())
    keys = sorted(
        set().union(*seconds.values()), key=lambda key: -max(s.get(key, 0) for s in seconds.values())
    )
    print(f"{'% of an iteration of Detectron2':<45} {' '.join(f'{name:>11}' for name in sides)}")
    for key in keys[:rows]:
        shares = (f"{100 * seconds[name].get(key, 0) / whole:>11.1f}" for name in sides)
        print(f"{key[:45]:<45} {' '.join(shares)}")
    wholes = (f"{100 * sum(seconds[name].values()) / whole:>11.1f}" for name in sides)
    print(f"{'all':<45} {' '.join(wholes)}")


def measure(args: argparse.Namespace, folder: str) -> None:
    if (args.device != "cpu" and not torch.cuda.is_available()) or (args.amp and args.device == "cpu"):
        raise InputError(
            f"--device {args.device} --amp {args.amp}: no GPU found, or --device cuda is missing"
        )
    opts = ["MODEL.DEVICE", args.device, *args.opts]
    if "MODEL.WEIGHTS" not in opts:
        arch = load_detector_config(args.config_file, opts).MODEL.ROBUST.ARCH
        random = ["MODEL.WEIGHTS", random_backbone(arch, folder), "SOLVER.BASE_LR", "0.0001"]
        opts = [*random, *opts]
    if args.amp:
        opts = ["SOLVER.AMP.ENABLED", "True", *opts]
    if args.size:
        longest = args.size * 5 // 3
        opts = ["INPUT.MIN_SIZE_TRAIN", f"({args.size},)", "INPUT.MAX_SIZE_TRAIN", str(longest), *opts]
    if args.images:
        opts = ["SOLVER.IMS_PER_BATCH", str(args.images), *opts]
    trainers = {"Detectron2": Detectron2Trainer, "ours": Trainer}
    sides = {
        name: Side(trainer_class, args.config_file, opts, f"{folder}/{name}", PRECISIONS.get(args.amp))
        for name, trainer_class in trainers.items()
    }
    print(f"{processor()}, torch {torch.__version__}: {args.config_file} {' '.join(opts)}")
    table = []
    threads = [int(number) for number in args.threads.split(",")]
    for number, count in enumerate(threads):
        torch.set_num_threads(count)
        rounds = args.rounds + args.warm_up
        alternate(sides, range(number * rounds, (number + 1) * rounds))
        print_times(sides, args.warm_up)
        table += rows_to_paste(sides, args)
    print_profile(sides, len(threads) * rounds, args.device)
    print("\n".join(table))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", default="configs/robust_r50_eps3.yaml")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--warm-up", type=int, default=1, help="iterations that are not counted")
    parser.add_argument("--threads", default="1,2", help="one measurement for each of these numbers")
    parser.add_argument("--size", type=int, default=320, help="of the short side; 0: as the config says")
    parser.add_argument("--images", type=int, default=2, help="in a batch; 0: as the config says")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--amp", default="", choices=["", *PRECISIONS], help="on a GPU, of both sides")
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="KEY VALUE ... of the config")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    if args.device == "cpu":
        keep_freed_memory()
    with tempfile.TemporaryDirectory() as folder, one_line_errors():
        measure(args, folder)


if __name__ == "__main__":
    main()
