"""Which objective, and how many steps, leave the least box AP: for the defaults of TEST.ATTACK.

    python benchmarks/attack_objectives.py --detector CONFIG WEIGHTS [--detector CONFIG WEIGHTS ...]
        [--losses all A_cls ...] [--steps 10 40] [--eps 4] [--images 20] [--output DIR] [KEY VALUE ...]

Attacks the same images of each detector's test set by PGD and by APGD, with each objective and number of
steps, and prints box AP, its mean over the detectors, and the worst case over the objectives. Measurements
are kept in DIR, so the command goes on where it stopped. An image's step costs a forward and a backward pass:
7 objectives, 10 and 40 steps, PGD and APGD on 20 images are 14,000 of them for each detector.
"""

import argparse
import statistics
from pathlib import Path

from tabulate import tabulate

import rt_detectron  # noqa: F401  (registers the backbones)
from rt_detectron.checkpoint.checkpointer import RobustCheckpointer
from rt_detectron.data import check_datasets
from rt_detectron.detection import Trainer, load_detector_config
from rt_detectron.evaluation.robustness import evaluate_robustness
from rt_detectron.utils.errors import one_line_errors

LOSSES = ["all", "no_regression", "classification", "A_cls", "A_box", "A_cwa", "vanishing"]
Found = dict[tuple[str, int, bool], float]  # objective, steps, whether by APGD -> box AP


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--detector", nargs=2, action="append", required=True, metavar=("CONFIG", "WEIGHTS"))
    parser.add_argument("--losses", nargs="+", default=LOSSES)
    parser.add_argument("--steps", type=int, nargs="+", default=[10, 40])
    parser.add_argument("--eps", type=float, default=4.0, help="Linf, in 1/255")
    parser.add_argument("--images", type=int, default=20)
    parser.add_argument("--output", type=Path, default=Path("output/attack_objectives"))
    parser.add_argument("opts", nargs="*", default=[], metavar="KEY VALUE")
    args = parser.parse_args()
    with one_line_errors():
        parts, tables = [], []
        for number, (config, weights) in enumerate(args.detector):
            clean, found = measured(args, config, weights, args.output / str(number))
            tables.append(f"{config} {weights}: {clean:.2f} without attack\n\n{table(found)}")
            parts.append(found)
        if len(parts) > 1:
            mean = {key: statistics.mean(found[key] for found in parts) for key in parts[0]}
            tables.append(f"mean of {len(parts)} detectors\n\n{table(mean)}")
        print("", *tables, sep="\n\n")  # below what evaluators print


def measured(args: argparse.Namespace, config: str, weights: str, folder: Path) -> tuple[float, Found]:
    """Box AP without attack, and under each."""
    keys = ["MODEL.WEIGHTS", weights, "OUTPUT_DIR", str(folder), "TEST.ATTACK.MAX_IMAGES", str(args.images)]
    keys += ["TEST.ATTACK.NOISE", "False", "TEST.ATTACK.CHECK_IMAGES", "0", "SEED", "0"]
    cfg = load_detector_config(config, [*keys, *args.opts])
    cfg.defrost()
    cfg.TEST.ATTACK.LINF_EPS, cfg.TEST.ATTACK.LOSSES = (args.eps,), tuple(args.losses)
    check_datasets(cfg.DATASETS.TEST)
    model = Trainer.build_model(cfg)
    RobustCheckpointer(model, trained=True, input_format=cfg.INPUT.FORMAT).load(cfg.MODEL.WEIGHTS)
    found: Found = {}
    for steps in args.steps:
        for adaptive in (False, True):
            cfg.TEST.ATTACK.STEPS, cfg.TEST.ATTACK.ADAPTIVE = steps, adaptive
            entries = [each for each in evaluate_robustness(cfg, model)["attack"] if each["requested"]]
            for each in entries:
                found[each["loss"], steps, adaptive] = each["metrics"]["bbox"]["AP"]
    return entries[0]["clean"]["bbox"]["AP"], found


def table(found: Found) -> str:
    columns = list(dict.fromkeys(key[1:] for key in found))
    rows = [
        [loss, *(found[loss, steps, adaptive] for steps, adaptive in columns)]
        for loss in dict.fromkeys(loss for loss, *_ in found)
    ]
    headers = ["objective", *(f"{'APGD' if adaptive else 'PGD'}-{steps}" for steps, adaptive in columns)]
    return tabulate(rows, headers, tablefmt="github", floatfmt=".2f")


if __name__ == "__main__":
    main()
