"""What a trial runs, and by what score a learning rate is chosen: all that is special to detectors."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rt_detectron.study.grid import Resources, Trial
from rt_detectron.study.worker import Step

RESULTS = ("results.json", "metrics")  # what tools/train_net.py leaves, and a key of it
ROBUSTNESS = ("robustness.json", "clean")  # the same of tools/evaluate_robustness.py


def trial_steps(trial: Trial, tools: Path, folder: Path, resources: Resources) -> list[Step]:
    """The training, then the evaluation if the trial has one; both resume what ``folder`` already holds."""
    # Trials beside each other on one machine must not meet at one port.
    processes = ("--num-gpus", f"{resources.gpus:g}", "--dist-url", "auto") if resources.gpus > 1 else ()
    options = ("--config-file", trial.config, "--resume", *processes, *trial.opts)
    keys = ("OUTPUT_DIR", str(folder), "SOLVER.BASE_LR", repr(trial.learning_rate), "SEED", str(trial.seed))
    train = (str(tools / "train_net.py"), *options, *keys, "MODEL.WEIGHTS", trial.weights)
    steps = [Step(train, *RESULTS)]
    if trial.evaluations:
        weights = ("MODEL.WEIGHTS", str(folder / "model_final.pth"))
        evaluate = (str(tools / "evaluate_robustness.py"), *options, *keys, *weights, *trial.evaluations)
        steps.append(Step(evaluate, *ROBUSTNESS))
    return steps


def selection_score(results: Mapping[str, Any]) -> float | None:
    """Box AP of a results.json, in percent; mask AP if it has no boxes; None where that is undefined."""
    metrics = results["metrics"]
    score = (metrics["bbox"] if "bbox" in metrics else metrics.get("segm", {})).get("AP")
    return score if isinstance(score, (int, float)) and math.isfinite(score) else None
