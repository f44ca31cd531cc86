"""Images per second and core of the ImageNet loader, against torchvision's reference pipeline and DALI.

    python benchmarks/loader.py --root /data/imagenet/train
    python benchmarks/loader.py --root FOLDER_OF_PHOTOGRAPHS --long-side 500

All sides read the same JPEG files with one worker (DALI, on the CPU: one thread) and give batches of random
resized crops of 224 pixels, mirrored at random, with colour jitter of 0.1:

- torchvision: ImageFolder (PIL), RandomResizedCrop, RandomHorizontalFlip and ColorJitter in a DataLoader
- in the workers: the loader of configs/pretrain, with ColorJitter and Lighting image by image in its worker
- ours: the loader of configs/pretrain as shipped; --device applies its colour noise
- DALI: image_random_crop, resize, flip, brightness_contrast and saturation

"images/s per core" is images per CPU second of the worker; "with the main process" adds that one's, where
a CPU applies the colour noise. The sides alternate; medians over the rounds, and their range.

--long-side 500 copies the photographs first, resized to that longer side at JPEG quality --quality, as a
stand-in for ImageNet's. --names 1281167 measures by how much a worker's memory grows when it reads a list of
so many files, and nothing else. DALI is measured if it is installed (pip install nvidia-dali-cuda120).
"""

import argparse
import functools
import importlib
import logging
import multiprocessing
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from detectron2.config import LazyCall as L
from PIL import Image
from plain import spread
from torch.utils.data import DataLoader, RandomSampler
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2 as T

from rt_detectron.data.augmentation import Lighting
from rt_detectron.data.class_folders import ImageList
from rt_detectron.data.loader import to_device
from rt_detectron.engine.lazy_config import build
from rt_detectron.pretrain.recipe import load_pretrain_config
from rt_detectron.utils.errors import InputError, one_line_errors

CONFIG = Path(__file__).parents[1] / "configs" / "pretrain" / "resnet50_l2_eps3.py"
JITTER = 0.1
WARM_UP = 3  # batches: the first ones are waited for, or were made ahead


def copy_resized(args: argparse.Namespace, folder: Path) -> None:
    """``args.images`` of the photographs below ``args.root`` as one class, resized."""
    paths = sorted(path for path in Path(args.root).rglob("*") if path.suffix.lower() in (".jpg", ".jpeg"))
    if not paths:
        raise InputError(f"{args.root}: no JPEG files below it; give --root a folder that has some")
    (folder / "photographs").mkdir()
    for i in range(args.images):
        with Image.open(paths[i % len(paths)]) as opened:
            image = opened.convert("RGB")
        factor = args.long_side / max(image.size)
        size = [max(round(length * factor), 1) for length in image.size]
        image.resize(size, Image.Resampling.BICUBIC).save(
            folder / "photographs" / f"{i:05d}.jpg", quality=args.quality
        )


def torchvision_batches(args: argparse.Namespace, root: str) -> Iterator:
    transform = T.Compose(
        [
            T.RandomResizedCrop(224, antialias=True),
            T.RandomHorizontalFlip(),
            T.ColorJitter(JITTER, JITTER, JITTER),
            T.ToImage(),
            T.ToDtype(torch.float32, scale=True),
        ]
    )
    images = ImageFolder(root, transform)
    endless = RandomSampler(images, num_samples=10**9)
    options = {"num_workers": 1, "pin_memory": args.device != "cpu"}
    loader = DataLoader(images, args.batch, sampler=endless, **options)
    for images, _ in loader:
        yield images.to(args.device, non_blocking=True)


def our_batches(args: argparse.Namespace, root: str, in_workers: bool = False) -> Iterator:
    overrides = {
        "train.device": args.device,
        "dataloader.train.dataset.root": root,
        "dataloader.train.total_batch_size": args.batch,
        "dataloader.train.num_workers": 1,
    }
    cfg = load_pretrain_config(str(CONFIG), [f"{key}={value}" for key, value in overrides.items()])
    cfg.dataloader.train.dataset.num_classes = None
    if in_workers:
        transforms = cfg.dataloader.train.dataset.transform.transforms
        jitter = L(T.ColorJitter)(brightness=JITTER, contrast=JITTER, saturation=JITTER)
        transforms[0] = L(T.RandomResizedCrop)(size=224, antialias=True)
        cfg.dataloader.train.dataset.transform.transforms = [*transforms, jitter, L(Lighting)(std=0.05)]
        cfg.dataloader.train.batch_transform = None
    loader = build(cfg.dataloader.train, "dataloader.train")
    for batch in loader:
        yield to_device(batch, torch.device(args.device))[0]


def dali_batches(args: argparse.Namespace, root: str) -> Iterator:
    from nvidia.dali import fn, pipeline_def, types

    @pipeline_def(batch_size=args.batch, num_threads=1, device_id=None, prefetch_queue_depth=2)
    def pipeline():
        files, _ = fn.readers.file(file_root=root, random_shuffle=True, name="files")
        images = fn.decoders.image_random_crop(
            files, device="cpu", random_area=[0.08, 1.0], random_aspect_ratio=[3 / 4, 4 / 3]
        )
        images = fn.resize(images, size=[224, 224], interp_type=types.INTERP_TRIANGULAR)
        images = fn.flip(images, horizontal=fn.random.coin_flip())
        near_1 = [1 - JITTER, 1 + JITTER]
        images = fn.brightness_contrast(
            images, brightness=fn.random.uniform(range=near_1), contrast=fn.random.uniform(range=near_1)
        )
        return fn.saturation(images, saturation=fn.random.uniform(range=near_1))

    built = pipeline()
    built.build()
    while True:
        (images,) = built.run()
        yield torch.as_tensor(images.as_array()).to(args.device).float().div_(255)


def cpu_seconds() -> tuple[float, float]:
    """Of this process, and of its workers."""
    ticks = 0
    for worker in multiprocessing.active_children():
        stat = Path(f"/proc/{worker.pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(stat[11]) + int(stat[12])  # in user and in system mode
    return time.process_time(), ticks / os.sysconf("SC_CLK_TCK")


def measure(args: argparse.Namespace, batches: Iterator) -> tuple[float, float, float]:
    """Images per CPU second of the workers (of this process if there is none), of all, and per second."""
    images = 0
    for _ in range(WARM_UP):
        next(batches)
    start, before = time.perf_counter(), cpu_seconds()
    while images < args.images:
        images += len(next(batches))
    if args.device != "cpu":
        torch.cuda.synchronize()
    passed = time.perf_counter() - start
    own, workers = (after - first for after, first in zip(cpu_seconds(), before, strict=True))
    batches.close()
    return images / (workers or own), images / (own + workers), images / passed


def missing(module: str) -> str | None:
    """Why a side is not measured; None if its module can be imported."""
    try:
        importlib.import_module(module)
    except Exception as error:
        return f"not measured: {module} cannot be imported ({type(error).__name__})"
    return None


def private_growth(args: argparse.Namespace) -> None:
    """Megabytes that a forked process copies when it reads all items of a list, printed for two kinds."""
    names = [f"n{i // 1300:08d}/n{i // 1300:08d}_{i:08d}.JPEG" for i in range(args.names)]
    samples = [(os.path.join("/data/imagenet/train", name), i // 1300) for i, name in enumerate(names)]
    ends = torch.tensor([len(name) for name in names]).cumsum(0)
    blob = torch.frombuffer(bytearray("".join(names), "ascii"), dtype=torch.uint8)
    ours = ImageList("/data/imagenet/train", blob, ends, torch.arange(args.names, dtype=torch.int32) // 1300)
    assert ours[-1] == samples[-1]
    for name, images in (("a list of tuples (ImageFolder's)", samples), ("ours", ours)):
        receiver, sender = os.pipe()
        if not os.fork():
            before = private_bytes()
            for i in range(len(images)):
                _path, _label = images[i]
            os.write(sender, str(private_bytes() - before).encode())
            os._exit(0)
        os.wait()
        print(f"{name:34s} {int(os.read(receiver, 100)) / 1e6:8.1f} MB")


def private_bytes() -> int:
    with open("/proc/self/smaps_rollup") as file:
        return 1024 * sum(int(line.split()[1]) for line in file if line.startswith("Private_Dirty"))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--root", help="class folders with images; with --long-side any folder with photographs"
    )
    parser.add_argument(
        "--long-side", type=int, help="copy the photographs first, resized to this many pixels"
    )
    parser.add_argument("--quality", type=int, default=95, help="of the copies")
    parser.add_argument("--images", type=int, default=512, help="of a round, and number of copies")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--names", type=int, help="measure the growth of memory for so many files instead")
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    if args.names:
        private_growth(args)
        return
    if not args.root:
        raise InputError("--root is missing: give a folder with images")
    with tempfile.TemporaryDirectory() as folder:
        root = args.root
        if args.long_side:
            root = folder
            copy_resized(args, Path(folder))
        sides = {
            "torchvision": (torchvision_batches, None),
            "in the workers": (functools.partial(our_batches, in_workers=True), None),
            "ours": (our_batches, None),
            "DALI": (dali_batches, missing("nvidia.dali")),
        }
        found: dict[str, list] = {name: [] for name, (_, why_not) in sides.items() if not why_not}
        for _ in range(args.rounds):
            for name in found:
                found[name].append(measure(args, sides[name][0](args, root)))
    print(f"{'':16s} {'images/s per core':>24s} {'with the main process':>22s} {'images/s':>18s}")
    for name, (_, why_not) in sides.items():
        if why_not:
            print(f"{name:16s} {why_not}")
            continue
        core, whole, passed = zip(*found[name], strict=True)
        columns = [f"{spread(core, 0):>24s}", f"{spread(whole, 0):>22s}", f"{spread(passed, 0):>18s}"]
        print(f"{name:16s} {' '.join(columns)}")


if __name__ == "__main__":
    with one_line_errors():
        main()
