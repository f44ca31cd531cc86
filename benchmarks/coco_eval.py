"""Seconds of COCO evaluation: ours against pycocotools as Detectron2 runs it, on the same detections.

    python benchmarks/coco_eval.py [--kind bbox|segm --images 5000 --detections 250000 --rounds 3]
    python benchmarks/coco_eval.py --annotations FILE --predictions FILE     of your own

The time is from the list of detections to the printed AP: preparing the detections, matching, precision. It
is CPU time of this process, in which each side has one thread, so that other processes hardly disturb it.
The two take turns. Printed are medians and ranges of the rounds, and the largest difference between their
precisions (at any IoU threshold, recall, category, size and limit of detections), of which AP is the mean.
Without files, images are made up: 7 objects on average, two jittered detections of each, and random ones for
the rest.
"""

import argparse
import contextlib
import io
import json
import time

import numpy as np
from detectron2.evaluation.coco_evaluation import _evaluate_predictions_on_coco
from plain import ratios, spread
from pycocotools import mask as rle_masks
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from rt_detectron.evaluation import evaluate_detections
from rt_detectron.utils.errors import InputError, one_line_errors

HEIGHT, WIDTH = 480, 640
CATEGORIES = 80
OBJECTS = 7  # of an image, on average


def random_boxes(rng: np.random.Generator, count: int) -> np.ndarray:
    """(count, 4) boxes (x, y, width, height) within the image, sides from 8 to 400 pixels."""
    size = np.exp(rng.uniform(np.log(8), np.log(400), (count, 2)))
    return np.hstack([rng.uniform(0, 1, (count, 2)) * ((WIDTH, HEIGHT) - size), size])


def octagons(boxes: np.ndarray) -> list[list[float]]:
    """A polygon in each box."""
    x, y, w, h = boxes.T
    near, far = 0.3, 0.7
    corners = [(near, 0), (far, 0), (1, near), (1, far), (far, 1), (near, 1), (0, far), (0, near)]
    return np.stack([c for u, v in corners for c in (x + u * w, y + v * h)], axis=1).tolist()


def draw(images: int, detections: int, kind: str) -> tuple[dict, list[dict]]:
    """A dataset and detections in COCO's format."""
    rng = np.random.default_rng(0)
    count = OBJECTS * images
    image = rng.integers(1, images + 1, count)
    category = rng.integers(1, CATEGORIES + 1, count)
    boxes = random_boxes(rng, count)
    crowd = rng.random(count) < 0.01
    seen = rng.permutation(np.repeat(np.arange(count), 2))[:detections]
    jitter = rng.normal(0, 0.08, (len(seen), 4)) * boxes[seen][:, [2, 3, 2, 3]]
    right = rng.random(len(seen)) < 0.8
    rest = detections - len(seen)
    columns = {
        "image": np.append(image[seen], rng.integers(1, images + 1, rest)),
        "category": np.append(
            np.where(right, category[seen], rng.integers(1, CATEGORIES + 1, len(seen))),
            rng.integers(1, CATEGORIES + 1, rest),
        ),
        "score": np.append(rng.random(len(seen)), rng.random(rest) ** 3),
    }
    found = np.vstack([boxes[seen] + jitter, random_boxes(rng, rest)])
    found[:, 2:] = np.abs(found[:, 2:]).clip(1)
    annotations = [
        {"id": n, "image_id": i, "category_id": c, "bbox": b, "area": b[2] * b[3], "iscrowd": int(ignored)}
        for n, (i, c, b, ignored) in enumerate(
            zip(image.tolist(), category.tolist(), boxes.tolist(), crowd, strict=True), start=1
        )
    ]
    results = [
        {"image_id": i, "category_id": c, "bbox": b, "score": s}
        for i, c, b, s in zip(
            *(v.tolist() for v in (*list(columns.values())[:2], found)),
            columns["score"].tolist(),
            strict=True,
        )
    ]
    if kind == "segm":
        for annotation, polygon in zip(annotations, octagons(boxes), strict=True):
            annotation["segmentation"] = [polygon]
        for result, rle in zip(results, rle_masks.frPyObjects(octagons(found), HEIGHT, WIDTH), strict=True):
            result["segmentation"] = {"size": rle["size"], "counts": rle["counts"].decode()}
    dataset = {
        "images": [{"id": i, "height": HEIGHT, "width": WIDTH} for i in range(1, images + 1)],
        "categories": [{"id": c, "name": str(c)} for c in range(1, CATEGORIES + 1)],
        "annotations": annotations,
    }
    return dataset, results


def pycocotools(coco: COCO, results: list[dict], kind: str) -> COCOeval:
    return _evaluate_predictions_on_coco(coco, results, kind, cocoeval_fn=COCOeval)


SIDES = {"pycocotools": pycocotools, "ours": evaluate_detections}


def timed(side: str, dataset: str, results: str, kind: str) -> tuple[float, COCOeval]:
    """Seconds, and the evaluation; from JSON texts, since pycocotools changes what it is given."""
    coco, detections = COCO(), json.loads(results)
    coco.dataset = json.loads(dataset)
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
        start = time.process_time()
        evaluation = SIDES[side](coco, detections, kind)
        return time.process_time() - start, evaluation


def measure(args: argparse.Namespace) -> None:
    if args.annotations:
        with open(args.annotations) as annotations, open(args.predictions) as predictions:
            dataset, results = json.load(annotations), json.load(predictions)
    else:
        dataset, results = draw(args.images, args.detections, args.kind)
    if not results:
        raise InputError(f"{args.predictions}: no detections to evaluate")
    print(f"{args.kind}: {len(dataset['images'])} images, {len(results)} detections, {args.rounds} rounds")
    texts = json.dumps(dataset), json.dumps(results)
    seconds: dict[str, list[float]] = {side: [] for side in SIDES}
    evaluations = {}
    for _ in range(args.rounds):
        for side in SIDES:
            took, evaluations[side] = timed(side, *texts, args.kind)
            seconds[side].append(took)
    print(f"{'':<12} {'s':>22} {'x faster':>20} {'AP':>20}")
    for side, taken in seconds.items():
        faster = spread(ratios(seconds["pycocotools"], taken), 1)
        print(f"{side:<12} {spread(taken):>22} {faster:>20} {100 * evaluations[side].stats[0]:>20.15f}")
    theirs, ours = (evaluations[side].eval["precision"] for side in SIDES)
    print(f"largest difference of a precision: {np.abs(theirs - ours).max():.1e}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kind", choices=["bbox", "segm"], default="bbox")
    parser.add_argument("--images", type=int, default=5_000)
    parser.add_argument("--detections", type=int, default=250_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--annotations", help="a COCO annotation file instead of drawn images")
    parser.add_argument("--predictions", help="its coco_instances_results.json")
    args = parser.parse_args()
    if bool(args.annotations) != bool(args.predictions):
        parser.error("--annotations and --predictions go together")
    with one_line_errors():
        measure(args)


if __name__ == "__main__":
    main()
