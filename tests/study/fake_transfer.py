"""Stands in for tools/transfer.py: same command line and files, accuracy made up from weights and seed."""

import argparse
import json
import sys
from pathlib import Path

import yaml

parser = argparse.ArgumentParser()
parser.add_argument("--config-file", required=True)
parser.add_argument("--resume", action="store_true", required=True)
parser.add_argument("opts", nargs="*")
args = parser.parse_args()
keys = dict(opt.split("=", 1) for opt in args.opts)
output, seed = Path(yaml.safe_load(keys["train.output_dir"])), int(keys["train.seed"])
rate = float(keys["optimizer.lr"])

accuracy = float(Path(yaml.safe_load(keys["weights"])).read_text()) + seed**2 / 2
if keys.get("dataset.held_out") == "True":
    accuracy -= 10 * rate
results = {
    "metrics": {
        "accuracy": {"accuracy": accuracy, "top1": accuracy, "mean_per_class": accuracy - 1}
        | {f"accuracy-{name}": accuracy + shift for shift, name in enumerate(("cat", "dog"))}
    },
    "seed": seed,
    "wall_time_s": 1.5,
    "iterations": 100,
    "weights": keys["weights"],
    "versions": {"torch": "2.14.1"},
    "source": {"arch": "resnet18", "norm": "l2", "eps": 0.0, "sha256": ""},
    "datasets": [
        {
            "name": "cifar10",
            "images": 100,
            "metric": "top1",
            "predictions": str(output / "predictions.json"),
        }
    ],
}
labels = [image % 2 for image in range(100)]
predicted = [label if image < accuracy else 1 - label for image, label in enumerate(labels)]
(output / "predictions.json").write_text(
    json.dumps({"keys": list(map(str, range(100))), "labels": labels, "predicted": predicted})
)
(output / "results.json").write_text(json.dumps(results))
sys.exit(0)
