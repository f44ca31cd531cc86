"""Stands in for tools/train_net.py: the same command line and files, AP made up from weights and seed.

Config keys it understands: TEST.COCO (a folder with val.json: predictions are the ground truth, shifted),
TEST.CRASH_ONCE (a file: crash unless it exists, and make it), TEST.SLEEP_ONCE (a file: unless it exists,
write the process id into it, then wait), TEST.SLEEP (seconds),
TEST.RATES (learning rate -> AP on @held_out, None: undefined).
"""

import argparse
import ast
import copy
import json
import os
import sys
import time
from pathlib import Path

parser = argparse.ArgumentParser()
parser.add_argument("--config-file", required=True)
parser.add_argument("--resume", action="store_true", required=True)
parser.add_argument("opts", nargs="*")
args = parser.parse_args()
keys = dict(zip(args.opts[::2], args.opts[1::2], strict=True))
output, seed = Path(keys["OUTPUT_DIR"]), int(keys["SEED"])
print("training with", args.opts)

if "TEST.SLEEP_ONCE" in keys and not Path(keys["TEST.SLEEP_ONCE"]).exists():
    Path(keys["TEST.SLEEP_ONCE"]).write_text(str(os.getpid()))
    time.sleep(120)
time.sleep(float(keys.get("TEST.SLEEP", 0)))
if "TEST.CRASH_ONCE" in keys and not Path(keys["TEST.CRASH_ONCE"]).exists():
    Path(keys["TEST.CRASH_ONCE"]).touch()
    raise RuntimeError("CUDA out of memory")

datasets = []
if "TEST.COCO" in keys:
    root = Path(keys["TEST.COCO"])
    predictions = []
    for annotation in json.loads((root / "val.json").read_text())["annotations"]:
        prediction = copy.deepcopy(annotation)
        prediction["bbox"][0] += seed
        prediction["score"] = 0.9 if annotation["id"] % 3 else 0.2
        predictions.append(
            {k: prediction[k] for k in ("image_id", "category_id", "bbox", "score", "segmentation")}
        )
    (output / "predictions.json").write_text(json.dumps(predictions))
    datasets.append(
        {
            "name": "tiny_val",
            "json_file": str(root / "val.json"),
            "image_root": str(root),
            "predictions": str(output / "predictions.json"),
        }
    )

with (output / "metrics.json").open("w") as stream:
    for iteration in range(19, 300, 20):
        loss = 3 * 0.99**iteration + 0.4 + 0.02 * ((iteration * 7 + seed) % 5)
        stream.write(json.dumps({"iteration": iteration, "total_loss": loss}) + "\n")
    stream.write('{"iteration": 29')  # as a killed process leaves it

ap = float(Path(keys["MODEL.WEIGHTS"]).read_text()) + seed**2 / 2
if "@held_out" in keys.get("DATASETS.TEST", ""):
    ap = ast.literal_eval(keys.get("TEST.RATES", "{}")).get(float(keys["SOLVER.BASE_LR"]), ap)
(output / "model_final.pth").write_text(str(ap))
(output / "config.yaml").write_text(f"SEED: {seed}\nOMP_NUM_THREADS: {os.environ['OMP_NUM_THREADS']}\n")
results = {
    "metrics": {
        "bbox": {"AP": ap, "AP50": 2 * ap, "AP75": ap / 2, "AP-person": float("nan")},
        "segm": {"AP": ap - 1, "AP50": 2 * ap - 1},
    },
    "seed": seed,
    "wall_time_s": 12.5,
    "iterations": 300,
    "weights": keys["MODEL.WEIGHTS"],
    "versions": {"torch": "2.14.1"},
    "datasets": datasets,
}
(output / "results.json").write_text(json.dumps(results))
sys.exit(0)
