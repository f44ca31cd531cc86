"""Stands in for tools/evaluate_robustness.py: the same command line and file, AP made up.

Config keys it understands: TEST.CRASH_EVALUATION_ONCE (a file: crash unless it exists, and make it).
"""

import argparse
import ast
import json
from pathlib import Path

parser = argparse.ArgumentParser()
parser.add_argument("--config-file", required=True)
parser.add_argument("--resume", action="store_true", required=True)
parser.add_argument("opts", nargs="*")
args = parser.parse_args()
keys = dict(zip(args.opts[::2], args.opts[1::2], strict=True))
output = Path(keys["OUTPUT_DIR"])
ap = float(Path(keys["MODEL.WEIGHTS"]).read_text())
print("evaluating with", args.opts)

if "TEST.CRASH_EVALUATION_ONCE" in keys and not Path(keys["TEST.CRASH_EVALUATION_ONCE"]).exists():
    Path(keys["TEST.CRASH_EVALUATION_ONCE"]).touch()
    raise RuntimeError("no attack today")


def metrics(ap):
    return {"bbox": {"AP": ap, "AP50": 2 * ap}, "segm": {"AP": ap - 1, "AP50": 2 * ap - 1}}


def values(key):
    return ast.literal_eval(keys.get(key, "[]"))


attack = [
    {
        "norm": "l2",
        "eps": eps,
        "loss": "all",
        "steps": int(keys["TEST.ATTACK.STEPS"]),
        "restarts": 1,
        "images": 4,
        "metrics": metrics(ap / (1 + eps)),
        "clean": metrics(ap),
        "noise": None,
    }
    for eps in values("TEST.ATTACK.L2_EPS")
]
names = values("TEST.CORRUPTION.NAMES")
corruption = {
    "images": 6,
    "names": names,
    "severities": [3],
    "clean": metrics(ap),
    "results": [{"corruption": name, "severity": 3, "metrics": metrics(ap / 2)} for name in names],
    "mPC": {"bbox": ap / 2, "segm": ap / 2},
    "rPC": {"bbox": 50.0, "segm": 50.0},
}
robustness = {
    "clean": {"images": 6, "metrics": metrics(ap)},
    "attack": attack,
    "corruption": corruption if names else None,
    "pictures": [],
    "seed": int(keys["SEED"]),
    "wall_time_s": 3.5,
    "config_sha256": "0",
    "weights": keys["MODEL.WEIGHTS"],
    "versions": {"torch": "2.14.1"},
    "datasets": [],
}
(output / "robustness.json").write_text(json.dumps(robustness))
