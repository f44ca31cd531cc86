"""A finished study without training: predictions made from the ground truth, better for the better arm.

AP is pycocotools' of these predictions, so a report's numbers, intervals and pictures fit together.
"""

import contextlib
import io
import json
from pathlib import Path

import numpy as np
import yaml
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from rt_detectron.study.grid import Trial
from rt_detectron.study.load import load_study
from rt_detectron.study.record import Outcome

QUALITY = {"standard": 0.75, "robust": 0.5, "robust_small": 0.72}  # the share of objects an arm finds
EPS = {"standard": 0, "robust": 3, "robust_small": 0.25}
for number in range(20):  # of a study with many arms
    QUALITY[f"l2_{number}"], EPS[f"l2_{number}"] = 0.9 - 0.03 * number, number + 1


def build(
    folder: Path,
    json_file: Path,
    image_root: Path,
    seeds=(1, 2),
    detectors=("mask_rcnn", "faster_rcnn"),
    rates=(0.01, 0.02, 0.04),
    arms=("standard", "robust", "robust_small"),
    name="Robust against standard backbones on a made-up set",
):
    """Write a study and its trials' files into ``folder``; gives (study, outcomes).

    Detectors called mask_rcnn have masks; without several rates there is no selection.
    """
    for arm in arms:
        (folder / f"{arm}.pkl").write_text(arm)
    (folder / "base.yaml").write_text("DATASETS:\n  TRAIN: ('tiny_train',)\n")
    content = {
        "name": name,
        "baseline": "standard",
        "arms": {arm: {"weights": str(folder / f"{arm}.pkl"), "eps": EPS[arm]} for arm in arms},
        "detectors": {detector: {"config": str(folder / "base.yaml")} for detector in detectors},
        "learning_rates": list(rates),
        "seeds": list(seeds),
        "evaluations": {"attack": ["TEST.ATTACK.L2_EPS", [0.5, 1.0]]},
    }
    (folder / "study.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    study = load_study(folder / "study.yaml")
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(str(json_file))
    pairs = [(arm.name, detector.name) for arm in study.arms for detector in study.targets]
    chosen = {pair: rates[0] if pair[0] == "robust" else rates[len(rates) // 2] for pair in pairs}
    trials = study.selection_trials() + study.final_trials(chosen)
    return study, [_outcome(trial, folder, coco, json_file, image_root, chosen) for trial in trials]


def _outcome(trial: Trial, output: Path, coco: COCO, json_file, image_root, chosen) -> Outcome:
    folder = output / "out" / "trials" / trial.name
    folder.mkdir(parents=True)
    tasks = ("bbox", "segm") if trial.target == "mask_rcnn" else ("bbox",)
    if trial.stage == "selection":
        best = trial.learning_rate == chosen[trial.arm, trial.target]
        ap = 100 * QUALITY[trial.arm] * (0.4 if best else 0.3)
        return Outcome(trial, folder, {"metrics": {"bbox": {"AP": ap}}, "versions": {}, "datasets": []})
    # The same for all arms of a seed, so that they are paired.
    generator = np.random.default_rng([trial.seed, len(trial.target)])
    predictions = _predictions(coco, QUALITY[trial.arm], generator, masks="segm" in tasks)
    (folder / "predictions.json").write_text(json.dumps(predictions))
    (folder / "metrics.json").write_text(_losses(trial))
    results = {
        "metrics": {task: _metrics(coco, predictions, task) for task in tasks},
        "seed": trial.seed,
        "iterations": 300,
        "wall_time_s": 12.5,
        "versions": {"torch": "2.14.1", "detectron2": "0.7.2"},
        "datasets": [
            {
                "name": "tiny_val",
                "json_file": str(json_file),
                "image_root": str(image_root),
                "predictions": str(folder / "predictions.json"),
            }
        ],
    }
    return Outcome(trial, folder, results, _robustness(trial, folder, results["metrics"], coco, image_root))


def _predictions(coco: COCO, quality: float, generator, masks: bool) -> list[dict]:
    found = []
    for annotation in coco.anns.values():
        luck, score, *shift = generator.uniform(size=6)
        if annotation.get("iscrowd"):
            continue
        x, y, width, height = annotation["bbox"]
        moved = np.subtract(shift, 0.5) * (1.2 - quality) * 0.5
        box = [x + moved[0] * width, y + moved[1] * height, width * (1 + moved[2]), height * (1 + moved[3])]
        detection = {key: annotation[key] for key in ("image_id", "category_id")}
        detection |= {"bbox": box, "score": score if luck < quality else 0.2 * score}
        if masks:
            rle = coco.annToRLE({**annotation, "segmentation": [_polygon(box)]})
            detection["segmentation"] = {"size": rle["size"], "counts": rle["counts"].decode()}
        found.append(detection)
    return found


def _polygon(box):
    x, y, width, height = box
    return [x, y, x + width, y, x + width, y + height, x, y + height]


def _metrics(coco: COCO, predictions: list[dict], task: str) -> dict[str, float | None]:
    with contextlib.redirect_stdout(io.StringIO()):
        evaluator = COCOeval(coco, coco.loadRes(json.loads(json.dumps(predictions))), task)
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
    metrics = dict(zip(("AP", "AP50", "AP75", "APs", "APm", "APl"), evaluator.stats[:6], strict=True))
    for index, category in enumerate(evaluator.params.catIds):
        precision = evaluator.eval["precision"][:, :, index, 0, -1]
        defined = precision[precision > -1]
        metrics[f"AP-{coco.cats[category]['name']}"] = defined.mean() if defined.size else -1
    return {name: None if not value >= 0 else 100 * float(value) for name, value in metrics.items()}


def _robustness(trial: Trial, folder: Path, metrics, coco: COCO, image_root) -> dict:
    fragility = 0.8 if trial.arm == "robust" else 2.5

    def scaled(factor):
        return {
            task: {name: value and value * factor for name, value in values.items()}
            for task, values in metrics.items()
        }

    (folder / "robustness").mkdir()
    image = coco.dataset["images"][0]
    with Image.open(Path(image_root) / image["file_name"]) as picture:
        pair = Image.new("RGB", (2 * picture.width, picture.height))
        pair.paste(picture.convert("RGB"), (0, 0))
        pair.paste(picture.convert("L").convert("RGB"), (picture.width, 0))
        pair.save(folder / "robustness" / "attack.png")
    attack = [
        {
            "norm": "l2",
            "eps": eps,
            "loss": loss,
            "steps": 10,
            "restarts": 1,
            "images": 4,
            "metrics": scaled(np.exp(-fragility * eps * weight)),
            "clean": scaled(1.0),
            "noise": scaled(1 - 0.05 * eps),
        }
        for loss, weight in (("all", 1.0), ("vanishing", 1.3))
        for eps in (0.5, 1.0)
    ]
    mpc = 0.7 if trial.arm == "robust" else 0.6
    return {
        "clean": {"images": len(coco.imgs), "metrics": metrics},
        "attack": attack,
        "corruption": {
            "images": len(coco.imgs),
            "names": ["gaussian_noise", "fog"],
            "severities": [2, 4],
            "clean": scaled(1.0),
            "results": [
                {"corruption": name, "severity": severity, "metrics": scaled(mpc + 0.2 * change)}
                for name in ("gaussian_noise", "fog")
                for severity, change in ((2, 1), (4, -1))
            ],
            "mPC": {task: values["AP"] * mpc for task, values in metrics.items()},
            "rPC": dict.fromkeys(metrics, 100 * mpc),
        },
        "pictures": [{"file": "robustness/attack.png", "caption": "image 1 before and after the attack"}],
    }


def _losses(trial: Trial) -> str:
    generator = np.random.default_rng(trial.seed)
    losses = 3 * 0.99 ** np.arange(19, 300, 20) + 0.4 + generator.normal(0, 0.05, 15)
    lines = [json.dumps({"iteration": 19 + 20 * i, "total_loss": loss}) for i, loss in enumerate(losses)]
    return "\n".join([*lines, '{"iteration": 29'])  # as a killed process leaves it
