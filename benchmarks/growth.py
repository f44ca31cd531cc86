"""How seconds grow: of COCO AP with images, of a training step with their size, of a report with trials.

    python benchmarks/growth.py [--rounds 3]

Each size is twice the one before. Printed are medians and ranges of CPU seconds, and the exponent p of
seconds = c * size^p between the medians of the two largest sizes: 1 is linear. Detections and images are made
up as in coco_eval.py. The step is forward and backward of Mask R-CNN R18-FPN (coco_subset) on two
photographs; pixels grow as the square of the width. Reports are of docs/results/coco-subset, whose arms but
the baseline are entered again under other names.
"""

import argparse
import contextlib
import io
import json
import logging
import math
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from coco_eval import draw
from detection_attack import CONFIG, annotated_photographs
from detectron2.utils.events import EventStorage
from plain import spread
from pycocotools.coco import COCO
from tqdm import tqdm
from train_net import processor

from rt_detectron.detection import Trainer, load_detector_config
from rt_detectron.evaluation import evaluate_detections
from rt_detectron.study.evaluations import compared
from rt_detectron.study.report import write_report
from rt_detectron.study.saved import saved_study
from rt_detectron.utils.errors import one_line_errors

STUDY = Path(__file__).parents[1] / "docs" / "results" / "coco-subset"
PER_IMAGE, IMAGES = 50, 1000


def average_precision(images: int, detections: int, kind: str = "bbox") -> Callable[[], object]:
    dataset, results = draw(images, detections, kind)
    text = json.dumps(dataset)  # an evaluation replaces its polygons

    def work() -> Callable[[], object]:
        coco = COCO()
        coco.dataset = json.loads(text)
        coco.createIndex()
        return lambda: evaluate_detections(coco, results, kind)

    return work


def training_step(width: int) -> Callable[[], object]:
    torch.manual_seed(0)
    model = Trainer.build_model(load_detector_config(CONFIG, ["MODEL.DEVICE", "cpu"])).train()
    given = annotated_photographs(2, width, model.device)

    def step() -> None:
        with EventStorage():
            sum(model(given).values()).backward()

    return lambda: step


def report(times: int) -> Callable[[], object]:
    study, outcomes, command = saved_study(STUDY)
    baselines = {arm.baseline or study.baseline for arm in study.arms} | {study.baseline}
    arms, trials = list(study.arms), list(outcomes)
    for number in range(1, times):
        arms += [replace(arm, name=f"{arm.name}_{number}") for arm in study.arms if arm.name not in baselines]
        trials += [
            replace(one, trial=replace(one.trial, arm=f"{one.trial.arm}_{number}"))
            for one in outcomes
            if one.trial.arm not in baselines
        ]
    larger = replace(study, arms=tuple(arms))

    def work() -> None:
        with tempfile.TemporaryDirectory() as folder:
            write_report(compared(larger, trials), Path(folder), command)

    return lambda: work


# By what grows: the sizes, and from a size to what makes the work that is timed.
MEASURED: dict[str, tuple[list[int], Callable[[int], Callable]]] = {
    "box AP, images": ([1000, 2000, 4000], lambda n: average_precision(n, PER_IMAGE * n)),
    "mask AP, images": ([250, 500, 1000], lambda n: average_precision(n, PER_IMAGE * n, "segm")),
    "box AP, detections an image": ([25, 50, 100], lambda n: average_precision(IMAGES, IMAGES * n)),
    "training step, image width": ([160, 320, 640], training_step),
    "report, times the trials": ([1, 2, 4], report),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    print(f"{processor()}, {torch.get_num_threads()} threads")
    print("| seconds of, against | sizes | CPU seconds | exponent |\n|---|---|---|---:|")
    with one_line_errors():
        for name, (sizes, make) in MEASURED.items():
            seconds = [rounds(make(size), args.rounds) for size in tqdm(sizes, name, disable=None)]
            exponent = math.log2(statistics.median(seconds[-1]) / statistics.median(seconds[-2]))
            columns = [", ".join(map(str, sizes)), ", ".join(map(spread, seconds))]
            print(f"| {name} | {' | '.join(columns)} | {exponent:.2f} |", flush=True)


def rounds(prepare: Callable[[], Callable[[], object]], count: int) -> list[float]:
    """CPU seconds of each."""
    taken = []
    for _ in range(count):
        with contextlib.redirect_stdout(io.StringIO()):
            work = prepare()
            start = time.process_time()
            work()
            taken.append(time.process_time() - start)
    return taken


if __name__ == "__main__":
    main()
