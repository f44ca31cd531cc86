"""Fixed-feature transfer, 150 epochs: tools/transfer.py against the published protocol as a plain loop.

    python benchmarks/transfer.py --weights classifier.pth --dataset shards --root FOLDER_OF_SHARDS \\
        --classes 6 7 8 9 --images 1000 --seeds 0 1 2 [--device cuda --amp bf16]

Ours computes the features once and trains the layer on them: "cold" with an empty cache, "cached" for each
further seed or learning rate. The plain loop ("peer") runs torchvision's network in the default memory format
forward on each image in each epoch, and computes a gradient for the last layer. Both read the same PNG files,
mirror images at random, and are tested on the same images.

--crop gives the peer the publication's random resized crops instead of centre crops.
--peer-epochs 3 stops the peer after 3 epochs and EXTRAPOLATES its time to --epochs, where all epochs would
take days. There is then no accuracy to compare.
Without --root the images are scikit-learn's digits.
"""

import argparse
import json
import logging
import os
import statistics
import tempfile
import time
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from plain import Normalised, spread
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.io import write_png
from torchvision.transforms import v2 as T
from tqdm import tqdm
from train_net import PRECISIONS

from rt_detectron.checkpoint.convert import read_network
from rt_detectron.transfer.datasets import classification_dataset
from rt_detectron.transfer.recipe import load_transfer_config
from rt_detectron.transfer.trainer import do_transfer
from rt_detectron.utils.errors import one_line_errors

CONFIG = Path(__file__).parents[1] / "configs" / "transfer" / "fixed_feature.py"
BATCH = 64


def write_images(args: argparse.Namespace, folder: Path) -> None:
    """PNG files in class folders below ``folder``/train and ``folder``/test, evenly spread over the set."""
    for split, count in (("train", args.images), ("test", args.test_images)):
        if args.root:
            found = classification_dataset(args.dataset, split, args.root, classes=args.classes)
        else:
            digits, part = load_digits(), slice(split == "test", None, 2)
            images = torch.as_tensor(digits.images[part] * 15).byte()[:, None].expand(-1, 3, -1, -1)
            found = list(zip(images, digits.target[part].tolist(), strict=True))
        count = min(count, len(found))
        for i in range(count):
            image, label = found[i * len(found) // count][:2]
            path = folder / split / f"{label:04d}" / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            write_png(image, str(path))


def ours(args: argparse.Namespace, folder: Path, seed: int) -> tuple[float, float]:
    """Seconds and top-1 of what the tool runs."""
    output = tempfile.mkdtemp(dir=folder)
    overrides = {
        "weights": args.weights,
        "dataset.name": "folder",
        "dataset.root": folder,
        "dataset.resize": args.resize,
        "dataset.image_size": args.size,
        "dataloader.num_workers": args.workers,
        "optimizer.lr": args.lr,
        "train.epochs": args.epochs,
        "train.seed": seed,
        "train.device": args.device,
        "features.amp": "fp16" if args.amp else "null",
        "train.export": "false",
        "train.output_dir": output,
    }
    cfg = load_transfer_config(str(CONFIG), [f"{key}={value}" for key, value in overrides.items()])
    start = time.perf_counter()
    do_transfer(cfg)
    seconds = time.perf_counter() - start
    return seconds, json.loads(Path(output, "results.json").read_text())["metrics"]["accuracy"]["top1"]


def peer(args: argparse.Namespace, folder: Path, seed: int) -> tuple[float, float | None]:
    """Seconds (extrapolated with --peer-epochs) and top-1 of the plain loop."""
    device = torch.device(args.device)
    mixed = torch.autocast(device.type, PRECISIONS.get(args.amp), enabled=bool(args.amp))
    torch.manual_seed(seed)
    start = time.perf_counter()
    centre = [T.Resize(args.resize, antialias=True), T.CenterCrop(args.size)]
    crop = [T.RandomResizedCrop(args.size, antialias=True)] if args.crop else centre
    to_float = [T.ToImage(), T.ToDtype(torch.float32, scale=True)]
    train_images, test_images = (
        ImageFolder(str(folder / split), T.Compose(transforms + to_float))
        for split, transforms in (("train", [*crop, T.RandomHorizontalFlip()]), ("test", centre))
    )
    model, head = frozen_network(args, len(train_images.classes))
    model.to(device).eval()
    optimizer = torch.optim.SGD(head.parameters(), lr=args.lr, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, max(args.epochs // 3, 1))
    options = {"batch_size": BATCH, "num_workers": args.workers, "persistent_workers": args.workers > 0}
    loader = DataLoader(train_images, shuffle=True, drop_last=True, **options)
    epochs = min(args.peer_epochs or args.epochs, args.epochs)
    for _ in tqdm(range(epochs), f"peer, seed {seed}", unit="epoch", disable=None):
        for images, labels in loader:
            with mixed:
                loss = F.cross_entropy(model(images.to(device)), labels.to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    seconds = (time.perf_counter() - start) * args.epochs / epochs
    if epochs < args.epochs:
        return seconds, None
    right = 0
    with torch.no_grad(), mixed:
        for images, labels in DataLoader(test_images, BATCH, num_workers=args.workers):
            right += (model(images.to(device)).argmax(1).cpu() == labels).sum().item()
    return time.perf_counter() - start, 100 * right / len(test_images)


def frozen_network(args: argparse.Namespace, num_classes: int) -> tuple[nn.Module, nn.Linear]:
    """torchvision's network with a fresh last layer, and that layer, which alone has gradients."""
    weights = read_network(args.weights)
    architecture, state_dict = weights.architecture, weights.state_dict
    head = architecture.head
    classes = len([tensor for name, tensor in state_dict.items() if name.startswith(head)][-1])
    network = architecture.build(classes)
    network.load_state_dict(state_dict)
    network.requires_grad_(False)
    name, last = [item for item in network.named_modules() if isinstance(item[1], nn.Linear)][-1]
    layer = nn.Linear(last.in_features, num_classes)
    network.set_submodule(name, layer)
    return Normalised(network), layer


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--weights", required=True, help="a classifier's file, of torchvision's networks")
    parser.add_argument("--dataset", default="folder", help="of datasets/README.md")
    parser.add_argument("--root", help="the data set's root")
    parser.add_argument("--classes", nargs="+", type=int, help="only these class indices")
    parser.add_argument("--images", type=int, default=1000, help="training images")
    parser.add_argument("--test-images", type=int, default=2000)
    parser.add_argument("--resize", type=int, default=32, help="short side in pixels, before the centre crop")
    parser.add_argument("--size", type=int, default=32, help="of that crop")
    parser.add_argument("--epochs", type=int, default=150)
    parser.add_argument("--lr", type=float, default=0.01)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--workers", type=int, default=0, help="loader processes of both sides")
    parser.add_argument("--crop", action="store_true", help="the peer sees random resized crops")
    parser.add_argument("--peer-epochs", type=int, help="extrapolate the peer's time from so many epochs")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--amp", default="", choices=["", *PRECISIONS], help="the peer's; ours takes fp16")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.INFO)
    with tempfile.TemporaryDirectory() as temporary, one_line_errors():
        folder = Path(temporary)
        write_images(args, folder)
        os.environ["RT_DETECTRON_CACHE"] = str(folder / "cache")
        mine = [ours(args, folder, seed) for seed in args.seeds]
        theirs = [peer(args, folder, seed) for seed in args.seeds]
    report(args, mine, theirs)


def report(args: argparse.Namespace, mine: list[tuple], theirs: list[tuple]) -> None:
    cold, cached = [mine[0][0]], [seconds for seconds, _ in mine[1:]]
    peers = [seconds for seconds, _ in theirs]
    print(f"{args.images} images of {args.size} px, {args.epochs} epochs, {torch.get_num_threads()} threads")
    print(f"{'':<20} {'seconds':>22} {'x peer':>8}   top-1 by seed")
    rows = [("ours, cold", cold, mine)]
    if cached:
        rows.append(("ours, cached", cached, []))
    rows.append(("peer, EXTRAPOLATED" if theirs[0][1] is None else "peer", peers, theirs))
    for name, seconds, runs in rows:
        found = " ".join("-" if top1 is None else f"{top1:.2f}" for _, top1 in runs)
        gain = statistics.median(peers) / statistics.median(seconds)
        print(f"{name:<20} {spread(seconds, 1):>22} {gain:>8.1f}   {found}")
    top1 = [
        ", ".join("-" if each is None else f"{each:.2f} %" for _, each in runs) for runs in (theirs, mine)
    ]
    what = f"{args.epochs} epochs of {args.images} images, {args.size} px"
    gain = statistics.median(peers) / cold[0]
    print(f"| {what} | {spread(peers, 1)} | {cold[0]:.1f} | {gain:.1f} | {' | '.join(top1)} |")


if __name__ == "__main__":
    main()
