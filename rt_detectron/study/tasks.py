"""The downstream tasks that a study can compare backbones on: detection and classification transfer."""

import ast
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar

import yaml
from fvcore.common.config import CfgNode

from rt_detectron.study.grid import DownstreamTask, Resources, Target, Trial
from rt_detectron.study.record import RESULTS, ROBUSTNESS, by_test_set, mean_if_defined
from rt_detectron.study.worker import Step
from rt_detectron.utils.errors import InputError
from rt_detectron.utils.files import text_sha256, write_text
from rt_detectron.utils.numbers import is_number


class Detection(DownstreamTask):
    """Detectron2's YAML configs, trained by tools/train_net.py."""

    key, noun, measure = "detectors", "detector", "AP"
    set_by_the_study: ClassVar = {
        "OUTPUT_DIR": "--output",
        "MODEL.WEIGHTS": "the arms' weights",
        "SOLVER.BASE_LR": "learning_rates",
        "SEED": "seeds",
    }
    set_by_the_selection: ClassVar = dict.fromkeys(
        ("DATASETS.TRAIN", "DATASETS.TEST"),
        "the selection: the parts @fit and @held_out of the training set",
    )
    has_evaluations = True

    def digest(self, config: str) -> str:
        keys = CfgNode.load_yaml_with_base(config)  # with the keys of its _BASE_ files
        return text_sha256(json.dumps(keys, sort_keys=True))

    def copy_config(self, config: str, folder: Path) -> str:
        path = folder / Path(config).name
        keys = CfgNode.load_yaml_with_base(config)  # with those of its _BASE_ files
        write_text(path, yaml.safe_dump(keys, sort_keys=False))
        return str(path)

    def held_out(self, target: Target, opts: tuple[str, ...]) -> tuple[str, ...]:
        names = _datasets(target.config, opts, "TRAIN")
        if not names:
            raise InputError(
                f"detectors.{target.name}: to choose a learning rate, DATASETS.TRAIN must be given in "
                f"{target.config} or in opts"
            )
        fit, held_out = (str(tuple(f"{name}@{part}" for name in names)) for part in ("fit", "held_out"))
        return ("DATASETS.TRAIN", fit, "DATASETS.TEST", held_out)

    def steps(self, trial: Trial, tools: Path, folder: Path, resources: Resources) -> list[Step]:
        # The newest checkpoint is all that a continued training needs.
        options = ("--config-file", trial.config, "--resume", *_processes(resources))
        options += ("SOLVER.MAX_TO_KEEP", "1", *trial.opts)
        keys = (
            "OUTPUT_DIR",
            str(folder),
            "SOLVER.BASE_LR",
            repr(trial.learning_rate),
            "SEED",
            str(trial.seed),
        )
        train = (str(tools / "train_net.py"), *options, *keys, "MODEL.WEIGHTS", trial.weights)
        steps = [Step(train, *RESULTS)]
        if trial.evaluations:
            weights = ("MODEL.WEIGHTS", str(folder / "model_final.pth"))
            evaluate = (str(tools / "evaluate_robustness.py"), *options, *keys, *weights, *trial.evaluations)
            steps.append(Step(evaluate, *ROBUSTNESS))
        return steps

    def score(self, results: Mapping[str, Any]) -> float | None:
        """Box AP, or mask AP if there are no boxes; with several test sets, their mean."""
        return mean_if_defined(
            _finite((metrics["bbox"] if "bbox" in metrics else metrics.get("segm", {})).get("AP"))
            for metrics in by_test_set(results["metrics"])
        )


class ClassificationTransfer(DownstreamTask):
    """LazyConfigs of classification transfer, trained by tools/transfer.py."""

    key, noun, measure = "transfers", "transfer", "accuracy"
    set_by_the_study: ClassVar = {
        "train.output_dir": "--output",
        "weights": "the arms' weights",
        "optimizer.lr": "learning_rates",
        "train.seed": "seeds",
    }
    set_by_the_selection: ClassVar = {"dataset.held_out": "the selection"}
    has_evaluations = False

    def digest(self, config: str) -> str:
        texts = {str(path): path.read_text(encoding="utf-8") for path in _imported(Path(config))}
        return text_sha256("\0".join(texts.values()))

    def copy_config(self, config: str, folder: Path) -> str:
        found = [Path(os.path.abspath(path)) for path in _imported(Path(config))]
        top = os.path.commonpath([path.parent for path in found])
        for path in found:
            copy = folder / path.relative_to(top)
            copy.parent.mkdir(parents=True, exist_ok=True)
            write_text(copy, path.read_text(encoding="utf-8"))
        return str(folder / Path(os.path.abspath(config)).relative_to(top))

    def held_out(self, target: Target, opts: tuple[str, ...]) -> tuple[str, ...]:
        return ("dataset.held_out", "True")

    def steps(self, trial: Trial, tools: Path, folder: Path, resources: Resources) -> list[Step]:
        keys = {
            **dict(zip(trial.opts[::2], trial.opts[1::2], strict=True)),
            "weights": _quoted(trial.weights),
            "optimizer.lr": repr(trial.learning_rate),
            "train.seed": str(trial.seed),
            "train.output_dir": _quoted(str(folder)),
        }
        # YAML's null became Python's None in opts, but Hydra only knows null.
        overrides = (f"{key}={'null' if value == 'None' else value}" for key, value in keys.items())
        options = ("--config-file", trial.config, "--resume", *_processes(resources))
        return [Step((str(tools / "transfer.py"), *options, *overrides), *RESULTS)]

    def score(self, results: Mapping[str, Any]) -> float | None:
        return _finite(results["metrics"].get("accuracy", {}).get("accuracy"))


DOWNSTREAM_TASKS = {task.key: task for task in (Detection(), ClassificationTransfer())}


def _processes(resources: Resources) -> tuple[str, ...]:
    # "auto" gives trials that run side by side on one machine different ports.
    return ("--num-gpus", f"{resources.gpus:g}", "--dist-url", "auto") if resources.gpus > 1 else ()


def _finite(score: Any) -> float | None:
    return score if is_number(score) else None


def _datasets(config: str, opts: tuple[str, ...], which: str) -> tuple[str, ...]:
    """The data sets of DATASETS.TRAIN or DATASETS.TEST, from ``opts`` or the config file."""
    given: Any = dict(zip(opts[::2], opts[1::2], strict=True)).get(f"DATASETS.{which}")
    if given is None:
        given = CfgNode.load_yaml_with_base(config).get("DATASETS", {}).get(which, ())
    return _names(given)


def _names(value: Any) -> tuple[str, ...]:
    """Names of data sets. Config files and opts may give them as a tuple in a string."""
    with suppress(ValueError, SyntaxError):  # raised for a bare name
        value = ast.literal_eval(value) if isinstance(value, str) else value
    return (value,) if isinstance(value, str) else tuple(value)


def _imported(config: Path) -> list[Path]:
    """A LazyConfig file and the files it imports by relative imports, sorted. Nothing is executed."""
    found, waiting = [], [config]
    while waiting:
        path = waiting.pop()
        if path in found:
            continue
        found.append(path)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level and node.module:
                base = path.parents[node.level - 1]
                waiting.append((base / node.module.replace(".", "/")).with_suffix(".py"))
    return sorted(found)


def _quoted(text: str) -> str:
    """``text`` as a quoted string of Hydra's override grammar."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"
