"""Wrong files, values and arguments for every tool: does each end in one line, with nothing half-written?

    python benchmarks/bad_inputs.py [--only train_net] [--output campaign.json]

Each tool has one command that works, on a tiny data set and untrained networks. Each case changes one thing:
a file is missing, empty, cut short or of another kind; a field of the annotations, a key or an argument is
wrong. Printed is a table of how the cases ended:

    one line     the tool refused, and its last line says why
    accepted     the tool did its work; a change that does no harm is no mistake
    traceback    an error that the user cannot read: a fault of ours
    silent       it failed without saying why: a fault of ours
    too long     stopped after --timeout seconds: a fault of ours
    half-written a file in the output folder cannot be read: a fault of ours

The exit status is 1 if there is any fault. About 20 minutes of a core.
"""

import argparse
import collections
import io
import json
import os
import random
import runpy
import shutil
import signal
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
OUTCOMES = ("one line", "accepted", "traceback", "silent", "too long", "half-written")
FAULTS = OUTCOMES[2:]
DETECTOR = str(REPOSITORY / "configs/demo/mask_rcnn_r18_fpn.yaml")
LAZY_DETECTOR = str(REPOSITORY / "configs/lazy/mask_rcnn_robust_r50_eps3.py")
PRETRAIN = str(REPOSITORY / "configs/pretrain/demo_l2.py")
SHARDS = str(REPOSITORY / "configs/pretrain/resnet18_l2_eps0_5_cifar10.py")
TRANSFER = str(REPOSITORY / "configs/transfer/small_fixed_feature.py")
ANNOTATIONS = "demo/detection/annotations/instances"
UNCHANGED = "nothing"
BAD_VALUES = ("-1", "0", "nan", "abc", "[]", "None", "1e9999", "''")


@dataclass
class Case:
    """One command with one thing changed.

    Attributes:
        tool: its name under tools/.
        arguments: what follows it.
        change: in words.
        prepare: changes the files of the case's folder, which is the working directory.
    """

    tool: str
    arguments: list[str]
    change: str
    prepare: Callable[[Path], None] = field(default=lambda folder: None)


# Files that work


def build_inputs(folder: Path) -> None:
    """Everything that the tools read, under ``folder``; commands name it by paths relative to it."""
    import torch

    from rt_detectron.checkpoint.convert import convert_checkpoint

    prepare = runpy.run_path(str(REPOSITORY / "datasets/prepare_demo.py"), run_name="prepare")["main"]
    sizes = {"image-size": 64, "detection-train": 4, "detection-val": 3}
    sizes |= {"classification-train": 100, "classification-val": 20, "classification-size": 32}
    prepare(["--output", str(folder / "demo"), *[f"--{key}={size}" for key, size in sizes.items()]])
    shutil.copytree(folder / "demo/detection/val", folder / "pictures")
    for split in ("train", "val"):
        with tarfile.open(folder / f"{split}-0.tar", "w") as tar:
            for number, image in enumerate(sorted((folder / "demo/classification" / split).rglob("*.png"))):
                for ending, content in (("png", image.read_bytes()), ("cls", image.parent.name.encode())):
                    info = tarfile.TarInfo(f"{number}.{ending}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    from torchvision.models import resnet18

    torch.manual_seed(0)
    torch.save(resnet18(num_classes=10).state_dict(), folder / "resnet18.pth")
    convert_checkpoint(str(folder / "resnet18.pth"), str(folder / "backbone.pkl"))
    (folder / "study.yaml").write_text(STUDY.format(config=DETECTOR))
    log = folder / "log.txt"
    if run_tool("train_net", DETECTOR_TRAINING, folder, timeout=300, log=log) != 0:
        raise RuntimeError(log.read_text())
    shutil.move(folder / "out/model_final.pth", folder / "detector.pth")
    shutil.rmtree(folder / "out")


STUDY = """name: campaign
baseline: standard
arms:
  standard: {{weights: backbone.pkl}}
  robust: {{weights: backbone.pkl}}
detectors:
  mask_rcnn: {{config: {config}}}
learning_rates: [0.02]
seeds: [1, 2]
"""
TINY_DETECTOR = [
    *["MODEL.FPN.OUT_CHANNELS", "16", "MODEL.ROI_BOX_HEAD.FC_DIM", "16"],
    *["MODEL.ROI_MASK_HEAD.CONV_DIM", "16", "MODEL.RPN.POST_NMS_TOPK_TRAIN", "20"],
    *["MODEL.RPN.POST_NMS_TOPK_TEST", "10", "TEST.DETECTIONS_PER_IMAGE", "10"],
    *["INPUT.MIN_SIZE_TRAIN", "(64,)", "INPUT.MIN_SIZE_TEST", "64", "DATALOADER.NUM_WORKERS", "0"],
    *["SOLVER.IMS_PER_BATCH", "2", "OUTPUT_DIR", "out"],
]
BACKBONE, FINISHED = ["MODEL.WEIGHTS", "backbone.pkl"], ["MODEL.WEIGHTS", "detector.pth"]
DETECTOR_TRAINING = [
    *["--config-file", DETECTOR, *TINY_DETECTOR, *BACKBONE, "SOLVER.MAX_ITER", "1", "SOLVER.STEPS", "()"]
]
TINY_CLASSIFIER = [
    *["dataloader.train.num_workers=0", "dataloader.test.num_workers=0", "dataloader.test.batch_size=50"],
    *["dataloader.train.total_batch_size=50", "train.device=cpu", "model.strategy.attack.steps=1"],
    *["evaluator.attack.steps=1", "evaluator.max_attacked=10", "train.epochs=1", "train.output_dir=out"],
]
FOLDERS = [
    f"dataloader.{part}.dataset.root=demo/classification/{name}"
    for part, name in (("train", "train"), ("test", "val"))
]
COMMANDS: dict[str, tuple[str, list[str]]] = {
    "train_net": ("train_net", DETECTOR_TRAINING),
    "train_net --eval-only": (
        "train_net",
        ["--config-file", DETECTOR, "--eval-only", *TINY_DETECTOR, *FINISHED],
    ),
    "lazyconfig_train_net": (
        "lazyconfig_train_net",
        [
            *["--config-file", LAZY_DETECTOR, "model.backbone.name=backbone.pkl"],
            *["model.roi_heads.num_classes=10", "model.roi_heads.box_head.fc_dims=[16]"],
            *[
                "model.roi_heads.box_predictor.input_shape.channels=16",
                "model.roi_heads.mask_head.conv_dims=[16,16]",
            ],
            *[
                "model.proposal_generator.post_nms_topk=[20,10]",
                "dataloader.train.dataset.names=rt_demo_train",
            ],
            *[
                "dataloader.test.dataset.names=rt_demo_val",
                "+dataloader.train.mapper.instance_mask_format=bitmask",
            ],
            *["dataloader.train.mapper.augmentations.0.short_edge_length=[64]"],
            *["dataloader.test.mapper.augmentations.0.short_edge_length=64"],
            *["dataloader.train.total_batch_size=2", "dataloader.train.num_workers=0"],
            *["dataloader.test.num_workers=0", "train.max_iter=1", "train.output_dir=out"],
        ],
    ),
    "evaluate_robustness": (
        "evaluate_robustness",
        [
            *["--config-file", DETECTOR, *TINY_DETECTOR, *FINISHED, "TEST.ATTACK.L2_EPS", "[0.5]"],
            *["TEST.ATTACK.STEPS", "1", "TEST.ATTACK.MAX_IMAGES", "1", "TEST.PICTURES", "0"],
            *["TEST.ATTACK.CHECK_IMAGES", "1", "TEST.ATTACK.QUERIES", "3"],
        ],
    ),
    "pretrain": ("pretrain", ["--config-file", PRETRAIN, *FOLDERS, *TINY_CLASSIFIER]),
    "pretrain from shards": (
        "pretrain",
        [
            *["--config-file", SHARDS, *TINY_CLASSIFIER, "dataloader.train.dataset.urls=train-0.tar"],
            *["dataloader.train.dataset.num_samples=100", "dataloader.test.dataset.urls=val-0.tar"],
            *["dataloader.test.dataset.num_samples=100"],
        ],
    ),
    "evaluate_classifier": (
        "evaluate_classifier",
        [
            *["--config-file", PRETRAIN, "--weights", "resnet18.pth", "--attacks", "pgd1", "--images", "4"],
            *["--output", "out", FOLDERS[1], "dataloader.test.num_workers=0"],
        ],
    ),
    "convert_checkpoint": ("convert_checkpoint", ["resnet18.pth", "out/backbone.pkl"]),
    "transfer": (
        "transfer",
        [
            *["--config-file", TRANSFER, "transfer.weights=resnet18.pth", "dataset.name=folder"],
            *["dataset.root=demo/classification", "dataloader.num_workers=0", "train.device=cpu"],
            *["train.epochs=1", "train.output_dir=out"],
        ],
    ),
    "demo": (
        "demo",
        [
            *[
                "--config-file",
                DETECTOR,
                "--weights",
                "detector.pth",
                "--input",
                "pictures",
                "--output",
                "out",
            ],
            *TINY_DETECTOR[:-2],
        ],
    ),
    "compare": ("compare", ["--study", "study.yaml", "--output", "out", "--dry-run"]),
}


# What can be wrong


def overwrite(file: Path, content: bytes | bytearray) -> None:
    """Write a file of a case's folder, which is a link to the sound one."""
    file.unlink()
    file.write_bytes(content)


def damages(
    path: str, also: dict[str, Callable[[Path], None]] | None = None
) -> Iterator[tuple[str, Callable]]:
    """Ways to spoil the file ``path``, relative to the case's folder."""

    def written(content: bytes) -> Callable[[Path], None]:
        return lambda file: overwrite(file, content)

    def cut(share: float) -> Callable[[Path], None]:
        def change(file: Path) -> None:
            content = file.read_bytes()
            overwrite(file, content[: int(len(content) * share)])

        return change

    def flipped(file: Path) -> None:
        content = bytearray(file.read_bytes())
        for position in range(len(content) // 3, len(content), max(len(content) // 50, 1)):
            content[position] ^= 0xFF
        overwrite(file, content)

    def folder(file: Path) -> None:
        file.unlink()
        file.mkdir()

    ways: dict[str, Callable[[Path], None]] = {
        "is missing": lambda file: file.unlink(),
        "is a folder": folder,
        "is empty": written(b""),
        "is text": written(b"hello\n"),
        "is a web page": written(b"<!doctype html><title>404</title>"),
        "is a Git LFS pointer": written(
            b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"
        ),
        "is binary noise": written(random.Random(0).randbytes(5000)),
        "is cut to a half": cut(0.5),
        "lacks its last bytes": cut(0.98),
        "has flipped bytes": flipped,
        "is a dangling link": lambda file: (file.unlink(), file.symlink_to("nowhere")),
        **(also or {}),
    }
    for words, change in ways.items():
        yield f"{path} {words}", lambda folder, change=change: change(folder / path)


JSON_VALUES = (None, "text", -1, 1e400, float("nan"), [], {}, True, 10**20)


def json_damages(path: str) -> Iterator[tuple[str, Callable[[Path], None]]]:
    """Every field of COCO's format left out, and set to values of other types."""

    def edited(edit: Callable[[dict], object]) -> Callable[[Path], None]:
        def change(folder: Path) -> None:
            content = json.loads((folder / path).read_text())
            found = edit(content)
            overwrite(folder / path, json.dumps(content if found is None else found).encode())

        return change

    for value in ([], "text", 3, None, [[]]):
        yield f"{path} holds {value!r}", edited(lambda content, value=value: json.loads(json.dumps([value])))
    for part in ("images", "annotations", "categories"):
        yield f"{path} has no {part}", edited(lambda content, part=part: content.pop(part) and None)
        for value in JSON_VALUES:
            yield (
                f"{path}: {part} is {value!r}",
                edited(lambda content, part=part, value=value: content.update({part: value})),
            )
        keys = {
            "images": ("id", "file_name", "width", "height"),
            "annotations": ("id", "image_id", "category_id", "bbox", "segmentation", "iscrowd", "area"),
            "categories": ("id", "name"),
        }[part]
        for key in keys:
            yield (
                f"{path}: {part}[0] has no {key}",
                edited(lambda content, part=part, key=key: content[part][0].pop(key, None) and None),
            )
            for value in JSON_VALUES:
                yield (
                    f"{path}: {part}[0].{key} is {value!r}",
                    edited(lambda c, part=part, key=key, value=value: c[part][0].update({key: value})),
                )
    for box in ([0, 0], [0, 0, 0, 0], [-50, -50, 10, 10], [0, 0, 1e9, 1e9], ["a"] * 4, [5, 5, -3, -3]):
        yield (
            f"{path}: annotations[0].bbox is {box}",
            edited(lambda content, box=box: content["annotations"][0].update(bbox=box)),
        )


def yaml_damages() -> Iterator[tuple[str, Callable[[Path], None]]]:
    """Studies with a key left out, unknown, of another type."""
    import yaml

    base = yaml.safe_load(STUDY.format(config=DETECTOR))

    def written(content: object) -> Callable[[Path], None]:
        return lambda folder: overwrite(folder / "study.yaml", yaml.safe_dump(content).encode())

    for key in base:
        rest = {name: value for name, value in base.items() if name != key}
        yield f"the study has no {key}", written(rest)
        yield f"the study says {key}s", written({**rest, f"{key}s": base[key]})
        for value in (None, "text", -1, [], {}, [None], ["a", "a"], {"a": 1}, float("nan")):
            yield f"the study's {key} is {value!r}", written({**base, key: value})
    for value in (None, "text", {}, {"weights": 3}, {"weights": "nowhere.pkl"}, {"weight": "backbone.pkl"}):
        arms = {**base["arms"], "robust": value}
        yield f"the study's robust arm is {value!r}", written({**base, "arms": arms})
    for value in (
        None,
        "text",
        {},
        {"config": 3},
        {"config": "nowhere.yaml"},
        {"config": DETECTOR, "opts": 3},
    ):
        yield f"the study's detector is {value!r}", written({**base, "detectors": {"mask_rcnn": value}})


def wrong_values(arguments: list[str]) -> Iterator[tuple[str, list[str]]]:
    """Each value of the command, KEY VALUE or key=value, replaced by bad ones; keys misspelt."""
    for i, word in enumerate(arguments):
        key, equals, _ = word.partition("=")
        if equals:
            rest = [*arguments[:i], *arguments[i + 1 :]]
            yield f"{key} is misspelt", [*rest, word.replace(key, f"{key}x", 1)]
            for value in BAD_VALUES:
                yield f"{key}={value}", [*rest, f"{key}={value}"]
        elif word.split(".")[0].isupper():
            yield f"{word} is misspelt", [*arguments[:i], f"{word}X", *arguments[i + 1 :]]
            for value in BAD_VALUES:
                yield f"{word} {value}", [*arguments[: i + 1], value, *arguments[i + 2 :]]
        elif word.startswith("--") and i + 1 < len(arguments) and not arguments[i + 1].startswith("--"):
            for value in ("", "nowhere", "/", "-1", "\udcff"):
                yield f"{word} {value!r}", [*arguments[: i + 1], value, *arguments[i + 2 :]]
            yield f"{word} is left out", [*arguments[:i], *arguments[i + 2 :]]
    yield "an unknown option", ["--nonsense", *arguments]
    yield "no arguments", []


KEYS = {  # further keys that users set, beside those of the command that works
    "train_net": "MODEL.ROBUST.ARCH MODEL.BACKBONE.NAME MODEL.BACKBONE.FREEZE_AT MODEL.RESNETS.NORM "
    "MODEL.PIXEL_MEAN MODEL.PIXEL_STD MODEL.ROI_HEADS.NUM_CLASSES MODEL.MASK_ON MODEL.DEVICE INPUT.FORMAT "
    "INPUT.MASK_FORMAT DATASETS.TRAIN DATASETS.TEST SOLVER.BASE_LR SOLVER.EMA SOLVER.STEPS "
    "SOLVER.CHECKPOINT_PERIOD SOLVER.ADVERSARIAL.EPS SOLVER.AMP.ENABLED TEST.EVAL_PERIOD SEED",
    "evaluate_robustness": "TEST.ATTACK.LINF_EPS TEST.ATTACK.LOSSES TEST.CORRUPTION.NAMES "
    "TEST.CORRUPTION.SEVERITIES DATASETS.TEST SEED",
    "pretrain": "model.classifier.arch model.classifier.num_classes threat_model.norm threat_model.eps "
    "optimizer.lr train.seed train.amp train.ema train.accumulate train.sync_bn train.init_checkpoint "
    "train.log_period train.eval_epochs model.strategy.schedule.warmup model.resolution",
    "transfer": "dataset.resize dataset.image_size dataset.per_class dataset.held_out transfer.arch "
    "features.amp train.seed",
}


def cases(inputs: Path) -> Iterator[Case]:
    """All of them, the commands that work first; ``inputs`` is the folder of :func:`build_inputs`."""

    def first(folder: str) -> str:
        return str(min((inputs / folder).iterdir()).relative_to(inputs))

    for name, (tool, arguments) in COMMANDS.items():
        yield Case(tool, arguments, f"{UNCHANGED} ({name})")
    files = {
        "train_net": ["backbone.pkl", f"{ANNOTATIONS}_train.json", first("demo/detection/train")],
        "train_net --eval-only": ["detector.pth", f"{ANNOTATIONS}_val.json", first("demo/detection/val")],
        "lazyconfig_train_net": ["backbone.pkl", f"{ANNOTATIONS}_train.json"],
        "evaluate_robustness": ["detector.pth", f"{ANNOTATIONS}_val.json", first("demo/detection/val")],
        "pretrain": [first("demo/classification/train/0")],
        "pretrain from shards": ["train-0.tar", "val-0.tar"],
        "evaluate_classifier": ["resnet18.pth"],
        "convert_checkpoint": ["resnet18.pth"],
        "transfer": ["resnet18.pth", first("demo/classification/val/0")],
        "demo": ["detector.pth", first("pictures")],
        "compare": ["study.yaml"],
    }
    for name, (tool, arguments) in COMMANDS.items():
        for pattern in files[name]:
            for change, prepare in damages(pattern):
                yield Case(tool, arguments, change, prepare)
        for change, changed in wrong_values(arguments):
            yield Case(tool, changed, change)
        for key in KEYS.get(name, "").split():
            for value in BAD_VALUES:
                more = [key, value] if key.split(".")[0].isupper() else [f"{key}={value}"]
                yield Case(tool, [*arguments, *more], " ".join(more))
        yield Case(
            tool, arguments, "the output folder is a file", lambda folder: (folder / "out").write_text("mine")
        )
    for split, name in (("train", "train_net"), ("val", "train_net"), ("val", "evaluate_robustness")):
        for change, prepare in json_damages(f"{ANNOTATIONS}_{split}.json"):
            yield Case(*COMMANDS[name], change, prepare)
    for change, prepare in yaml_damages():
        yield Case(*COMMANDS["compare"], change, prepare)


# Running them


def run_tool(tool: str, arguments: list[str], folder: Path, timeout: float, log: Path) -> int | None:
    """Run a tool in a fork of this process, which has imported all packages.

    Returns:
        The exit status; None if it took too long.
    """
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.setsid()
            os.chdir(folder)
            with open(log, "wb", buffering=0) as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
            sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
            sys.stderr = open(2, "w", closefd=False, errors="backslashreplace")  # noqa: SIM115
            sys.argv = [str(REPOSITORY / "tools" / f"{tool}.py"), *arguments]
            status = _exit_status(sys.argv[0])
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(status)
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        done, code = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(code)
        time.sleep(0.01)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def _exit_status(script: str) -> int:
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        return 1
    return 0


def outcome(status: int | None, printed: str, output: Path) -> str:
    """One of :data:`OUTCOMES`."""
    if status is None:
        return "too long"
    if "Traceback (most recent call last)" in printed:
        return "traceback"
    if any(is_half_written(path) for path in output.rglob("*") if path.is_file()):
        return "half-written"
    if status == 0:
        return "accepted"
    says_why = any(line.startswith("error: ") or ": error: " in line for line in printed.splitlines())
    return "one line" if status in (1, 2) and says_why else "silent"


def is_half_written(path: Path) -> bool:
    """Whether a result cannot be read, or is the temporary file of one."""
    import torch

    try:
        if path.suffix == ".json":
            for line in path.read_text().splitlines() if path.name == "metrics.json" else [path.read_text()]:
                json.loads(line)
        elif path.suffix == ".pth":
            torch.load(path, map_location="meta", weights_only=True)
        elif path.suffix == ".pkl" and path.read_bytes()[-1:] != b".":
            return True
    except Exception:
        return True
    return ".tmp" in path.name or path.name.endswith("~")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", help="only the cases of this tool")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="only each N-th case")
    parser.add_argument("--timeout", type=float, default=60, help="seconds for a case (default: 60)")
    parser.add_argument(
        "--output", metavar="FILE", help="write every case with its outcome and last line, as JSON"
    )
    args = parser.parse_args()
    prepare_process()
    found = []
    with tempfile.TemporaryDirectory() as scratch:
        inputs = Path(scratch) / "inputs"
        inputs.mkdir()
        os.environ["RT_DETECTRON_CACHE"] = f"{scratch}/cache"
        build_inputs(inputs)
        chosen = [case for case in cases(inputs) if args.only in (None, case.tool)][:: args.every]
        for number, case in enumerate(chosen):
            folder = Path(scratch) / "case"
            shutil.copytree(inputs, folder, copy_function=os.link)  # 200 MB
            case.prepare(folder)
            log = Path(scratch) / "log.txt"
            status = run_tool(case.tool, case.arguments, folder, args.timeout, log)
            printed = log.read_text(errors="replace")
            end = outcome(status, printed, folder / "out")
            last = (printed.strip().splitlines() or [""])[-1][:300]
            found.append({"tool": case.tool, "change": case.change, "outcome": end, "last line": last})
            if args.output:  # after each case, so that an interrupted campaign keeps what it found
                Path(args.output).write_text(json.dumps(found, indent=1))
            if case.change.startswith(UNCHANGED) and end != "accepted":  # then its cases would show nothing
                raise RuntimeError(f"{case.tool} fails without any change: {last}")
            if end in FAULTS:
                print(f"{end}: {case.tool}: {case.change}\n    {last}", flush=True)
            elif sys.stderr.isatty():
                print(f"\r{number + 1} of {len(chosen)}", end="", file=sys.stderr)
            shutil.rmtree(folder)
    print(table(found))
    return int(any(case["outcome"] in FAULTS for case in found))


def prepare_process() -> None:
    """Import once what all tools need, on one thread, so that a case is a cheap fork."""
    os.environ["DETECTRON2_DATASETS"] = "."  # a case's folder
    os.environ |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONWARNINGS": "ignore"}
    sys.path.insert(0, str(REPOSITORY / "tools"))
    import torch.utils.cpp_extension
    import torch.utils.tensorboard
    import webdataset  # noqa: F401

    import rt_detectron.detection
    import rt_detectron.evaluation.robustness
    import rt_detectron.pretrain.evaluation
    import rt_detectron.study.report
    import rt_detectron.study.run
    import rt_detectron.transfer.trainer  # noqa: F401

    torch.set_num_threads(1)


def table(found: list[dict]) -> str:
    """Markdown: how many cases of each tool ended in which way."""
    counts: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
    for case in found:
        for row in (case["tool"], "**all**"):
            counts[row][case["outcome"]] += 1
    lines = [f"| tool | cases | {' | '.join(OUTCOMES)} |", f"|---|{'--:|' * (1 + len(OUTCOMES))}"]
    rows = sorted(counts, key=lambda row: (row == "**all**", row))
    for row in rows:
        numbers = [sum(counts[row].values()), *(counts[row][end] for end in OUTCOMES)]
        lines.append(f"| {row} | {' | '.join(map(str, numbers))} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
