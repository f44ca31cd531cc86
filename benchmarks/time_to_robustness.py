"""Wall time until a classifier is robust: other recipes against ours, on CIFAR-10 with two CPU cores.

    python benchmarks/time_to_robustness.py --data FOLDER_OF_SHARDS [--seeds 0 1 2 --share 3]
    python benchmarks/time_to_robustness.py --data FOLDER_OF_SHARDS --device cuda --amp bf16 --budget 60

The recipe of ours is configs/pretrain/resnet18_l2_eps0_5_cifar10_fast.py, too.

All train torchvision's ResNet-18 from scratch at 32 px, against L2 eps 0.5, with the same augmentation, batch
size, momentum and weight decay. All are then attacked by PGD-20 on the same 2,000 images.

- published: 3-step PGD in a plain loop, as fast as the other packages are (benchmarks/adversarial_step.py).
  The learning rate is the published one: 0.1, divided by 10 after each third of the time, --budget seconds.
- peer: the same with our one-cycle schedule and Nesterov momentum, and a learning rate tuned for it.
- ours: a third of the time, or what --share says. Clean images at first, then strategy Fast (one step, from
  the image) on a growing part of each batch. Images grow from 16 px. Small maps and attacks use the package's
  own kernels.

Each result is written to --output at once. Results that are there already are not measured again.
"""

import argparse
import json
import math
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from detectron2.utils.events import EventStorage
from plain import AMP, Normalised, device_name, plain_pgd, synchronize
from torch import Tensor, nn
from torchvision.transforms.v2 import Identity
from torchvision.transforms.v2.functional import pad
from tqdm import tqdm

from rt_detectron.attacks import PGD, ThreatModel
from rt_detectron.checkpoint.architectures import build_classifier
from rt_detectron.data.shards import ShardDataset
from rt_detectron.layers.small_maps import use_small_maps
from rt_detectron.modeling.classifier import Classifier
from rt_detectron.pretrain.evaluation import AccuracyEvaluator, wilson_interval
from rt_detectron.pretrain.model import Pretraining
from rt_detectron.pretrain.schedules import EpsSchedule, Resolution
from rt_detectron.pretrain.strategies import Fast, Standard
from rt_detectron.utils.errors import one_line_errors
from rt_detectron.utils.files import replaced_atomically
from rt_detectron.utils.ranges import images_are_checked

THREAT_MODEL = ThreatModel("l2", 0.5)
BATCH = 128
SIDES = ("ours", "peer", "published")


def read(pattern: str, count: int, data: Path) -> tuple[Tensor, Tensor]:
    """All images (N, 3, 32, 32), uint8, and labels (N,) of the shards, in order."""
    shards = ShardDataset(str(data / pattern), count, num_classes=10, transform=Identity())
    images, labels, _ = zip(*shards, strict=True)
    return torch.stack(images), torch.tensor(labels)


def batches(images: Tensor, labels: Tensor, seed: int):
    """Endless batches in [0, 1], cropped and flipped at random."""
    generator = torch.Generator().manual_seed(seed)
    crops = pad(images, [4, 4, 4, 4]).unfold(2, 32, 1).unfold(3, 32, 1)  # (N, 3, 9, 9, 32, 32), a view
    device = images.device
    while True:
        for places in torch.randperm(len(images), generator=generator).split(BATCH)[:-1]:
            y, x = torch.randint(0, 9, (2, len(places)), generator=generator)
            crop = crops[places, :, y, x].float() / 255
            flip = torch.rand(len(places), 1, 1, 1, generator=generator) < 0.5
            places, y, x, flip = (part.to(device, non_blocking=True) for part in (places, y, x, flip))
            yield torch.where(flip, crop.flip(3), crop), labels[places]


def peer(args: argparse.Namespace) -> tuple[nn.Module, Callable]:
    model = Normalised(build_classifier("resnet18", 10)).to(args.device)

    def loss(images, labels, progress):
        with torch.autocast(args.device, AMP[args.attack_amp], enabled=args.attack_amp is not None):
            adversarial = plain_pgd(model, images, labels, THREAT_MODEL.eps, steps=3)
        return F.cross_entropy(model.train()(adversarial), labels)

    return model, loss


def ours(args: argparse.Namespace) -> tuple[nn.Module, Callable]:
    schedule = EpsSchedule(args.clean, args.warmup, grows="images")
    strategy = Fast(ThreatModel("l2", args.eps), schedule, random_start=False)
    resolution = Resolution(args.start, args.until, multiple=4)
    model = Pretraining(Classifier("resnet18", 10), strategy, resolution).to(args.device)
    use_small_maps(model, args.device)
    model.attack_dtype = AMP[args.attack_amp]

    def loss(images, labels, progress):
        model.progress = progress
        with images_are_checked():
            return model((images, labels))["loss"]

    return model, loss


def one_cycle(progress: float) -> float:
    """Up over the first fifth, then down to 0 as a cosine."""
    warmup = 0.2
    if progress < warmup:
        return progress / warmup
    return (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup))) / 2


def in_thirds(progress: float) -> float:
    """The published schedule: divided by 10 after each third."""
    return 0.1 ** int(3 * progress)


def train(name: str, data, seconds: float, seed: int, args: argparse.Namespace) -> tuple[nn.Module, int]:
    """The trained model and the number of images seen; evaluation is not timed."""
    torch.manual_seed(seed)
    build, lr, schedule = {
        "published": (peer, 0.1, in_thirds),
        "peer": (peer, args.peer_lr, one_cycle),
        "ours": (ours, args.lr, one_cycle),
    }[name]
    model, loss_of = build(args)
    model.train()
    optimizer = torch.optim.SGD(
        model.parameters(),
        lr=lr,
        momentum=0.9,
        weight_decay=5e-4,
        nesterov=name != "published",
        fused=name == "ours",
    )
    stream = batches(*(part.to(args.device) for part in data), seed)
    scaler = torch.amp.GradScaler(args.device, enabled=args.amp == "fp16")
    device = torch.device(args.device)
    seen = 0
    start = time.perf_counter()
    bar = tqdm(total=round(seconds), desc=f"{name}, seed {seed}", unit="s", disable=None)
    with bar, EventStorage():  # which Fast writes to when it looks out for catastrophic overfitting
        while (elapsed := time.perf_counter() - start) < seconds:
            progress = elapsed / seconds
            for group in optimizer.param_groups:
                group["lr"] = lr * schedule(progress)
            images, labels = next(stream)
            optimizer.zero_grad()
            with torch.autocast(args.device, AMP[args.amp], enabled=args.amp is not None):
                loss = loss_of(images, labels, progress)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            seen += len(labels)
            if seen % (10 * BATCH) == 0:
                synchronize(device)  # so that no GPU's time is left out, or work piles up
            bar.update(round(elapsed) - bar.n)
    return model, seen


def evaluate(state: dict, images: Tensor, labels: Tensor, device: str) -> dict:
    """Clean and PGD-20 accuracy in percent, by the same code for both sides."""
    classifier = Classifier("resnet18", 10).eval()
    classifier.network.load_state_dict(state)
    classifier.to(device)
    evaluator = AccuracyEvaluator(Pretraining(classifier, Standard()), PGD(THREAT_MODEL, steps=20))
    for batch in zip(images.split(250), labels.split(250), strict=True):
        with torch.no_grad():
            evaluator.process(batch, classifier(batch[0].to(device).float() / 255))
    accuracy = evaluator.evaluate()["accuracy"]
    low, high = wilson_interval(round(accuracy["pgd20"] * len(labels) / 100), len(labels))
    return {
        "clean": accuracy["clean"],
        "pgd20": accuracy["pgd20"],
        "pgd20_low": 100 * low,
        "pgd20_high": 100 * high,
    }


def run(name: str, seed: int, args: argparse.Namespace, train_set, test_set) -> dict:
    seconds = args.budget / args.share if name == "ours" else args.budget
    model, seen = train(name, train_set, seconds, seed, args)
    network = model.classifier.network if name == "ours" else model.network
    return {"seconds": seconds, "images": seen, **evaluate(network.state_dict(), *test_set, args.device)}


def table(results: dict) -> str:
    lines = ["| seed | side | seconds | images | images/s | clean % | PGD-20 % | 95 % interval |"]
    lines.append("|---:|---|---:|---:|---:|---:|---:|---:|")
    for seed, sides in sorted(results.items()):
        for name, row in sides.items():
            seconds, images = row["seconds"], row["images"]
            interval = f"{row['pgd20_low']:.1f} to {row['pgd20_high']:.1f}"
            effort = f"{seconds:.0f} | {images} | {images / seconds:.0f}"
            lines.append(
                f"| {seed} | {name} | {effort} | {row['clean']:.1f} | {row['pgd20']:.1f} | {interval} |"
            )
    for name in SIDES:
        rows = [sides[name] for sides in results.values() if name in sides]
        if not rows:
            continue
        means = [statistics.mean(row[key] for row in rows) for key in ("clean", "pgd20")]
        lines.append(f"| mean | {name} | | | | {means[0]:.1f} | {means[1]:.1f} | |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder of cifar10-{train,val}-*.tar.gz")
    parser.add_argument("--budget", type=float, default=300, help="the peer's seconds")
    parser.add_argument("--share", type=float, default=3, help="ours has the budget divided by this")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=SIDES)
    parser.add_argument("--test-images", type=int, default=2000)
    parser.add_argument("--output", type=Path, default=Path("output/time-to-robustness.json"))
    parser.add_argument("--lr", type=float, default=0.05, help="peak learning rate of ours")
    parser.add_argument("--peer-lr", type=float, default=0.1, help="and of the peer")
    parser.add_argument("--clean", type=float, default=0.3, help="share of ours' time on clean images")
    parser.add_argument(
        "--warmup", type=float, default=0.5, help="share over which more and more are attacked"
    )
    parser.add_argument("--eps", type=float, default=0.5, help="of ours' training; 0.5 is what all face")
    parser.add_argument(
        "--start", type=int, default=16, help="side of ours' images at first; 32: always full"
    )
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--amp", choices=("bf16", "fp16"), help="mixed precision in training")
    parser.add_argument("--attack-amp", choices=("bf16", "fp16"), help="in the attacks alone, of all sides")
    parser.add_argument("--until", type=float, default=0.6, help="share of the time until they are 32 px")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: this machine has no GPU that torch can use")
    settings = {
        key: value for key, value in vars(args).items() if key not in ("data", "seeds", "sides", "output")
    }
    stored = (
        json.loads(args.output.read_text()) if args.output.exists() else {"settings": settings, "seeds": {}}
    )
    if stored["settings"] != settings:
        raise SystemExit(
            f"error: {args.output} is of other settings, {stored['settings']}: choose another --output"
        )
    todo = [
        (seed, name)
        for seed in args.seeds
        for name in args.sides
        if name not in stored["seeds"].get(str(seed), {})
    ]
    if todo:
        train_set = read("cifar10-train-*.tar.gz", 50_000, args.data)
        test_set = tuple(part[: args.test_images] for part in read("cifar10-val-*.tar.gz", 10_000, args.data))
    for seed, name in todo:
        stored["seeds"].setdefault(str(seed), {})[name] = run(name, seed, args, train_set, test_set)
        os.makedirs(args.output.parent, exist_ok=True)
        with replaced_atomically(args.output) as temporary, open(temporary, "w") as file:
            json.dump(stored, file, indent=1)
    how = f"{device_name(torch.device(args.device))}, {args.amp or 'float32'}"
    print(f"CIFAR-10, ResNet-18, L2 eps 0.5, {how}, torch {torch.__version__}\n")
    print(table(stored["seeds"]))


if __name__ == "__main__":
    with one_line_errors():
        main()
