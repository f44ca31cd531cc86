"""What differs between a study of detectors and one of classification transfer; the rest is one machinery."""

import ast
import hashlib
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, ClassVar

from fvcore.common.config import CfgNode

from rt_detectron.study.worker import Step
from rt_detectron.utils.errors import InputError, one_line

if TYPE_CHECKING:
    from rt_detectron.study.grid import Resources, Target, Trial

RESULTS = ("results.json", "metrics")  # what a trial's training leaves, and a key of it
ROBUSTNESS = ("robustness.json", "clean")  # the same of tools/evaluate_robustness.py


class Kind(ABC):
    """A kind of study.

    Attributes:
        key: of the study file; its entries are the targets, what the arms are transferred to.
        noun: what a target is.
        measure: what its trials are scored by.
        set_by_the_grid: config key -> what of the study sets it, so that options may not.
        set_by_the_selection: the same for the options of the selection.
        evaluates: whether a trial's training may be followed by evaluations.
    """

    key: ClassVar[str]
    noun: ClassVar[str]
    measure: ClassVar[str]
    set_by_the_grid: ClassVar[Mapping[str, str]]
    set_by_the_selection: ClassVar[Mapping[str, str]]
    evaluates: ClassVar[bool]

    @abstractmethod
    def digest(self, config: str) -> str:
        """SHA-256 of all that a target's config file says; an exception of any type if it is none."""

    @abstractmethod
    def held_out(self, target: "Target", opts: tuple[str, ...]) -> tuple[str, ...]:
        """Config keys that train on a part of the training set and score on the rest of it.

        Args:
            opts: the config keys of the trial otherwise.
        """

    @abstractmethod
    def steps(self, trial: "Trial", tools: Path, folder: Path, resources: "Resources") -> list[Step]:
        """The trial's processes; all resume what ``folder`` already holds."""

    @abstractmethod
    def score(self, results: Mapping[str, Any]) -> float | None:
        """What a learning rate is chosen by, of a results.json, in percent; None where it is undefined."""


class Detection(Kind):
    """Detectron2's YAML configs, trained by tools/train_net.py."""

    key, noun, measure = "detectors", "detector", "AP"
    set_by_the_grid: ClassVar = {
        "OUTPUT_DIR": "--output",
        "MODEL.WEIGHTS": "the arms' weights",
        "SOLVER.BASE_LR": "learning_rates",
        "SEED": "seeds",
    }
    set_by_the_selection: ClassVar = dict.fromkeys(
        ("DATASETS.TRAIN", "DATASETS.TEST"),
        "the selection: @fit and @held_out of what the detector trains on",
    )
    evaluates = True

    def digest(self, config: str) -> str:
        keys = CfgNode.load_yaml_with_base(config)  # merged with those of every _BASE_ file under it
        return hashlib.sha256(json.dumps(keys, sort_keys=True).encode()).hexdigest()

    def held_out(self, target: "Target", opts: tuple[str, ...]) -> tuple[str, ...]:
        names = dict(zip(opts[::2], opts[1::2], strict=True)).get("DATASETS.TRAIN")
        if names is None:
            names = CfgNode.load_yaml_with_base(target.config).get("DATASETS", {}).get("TRAIN", ())
        names = _names(names)
        if not names:
            raise InputError(
                f"detectors.{target.name}: to choose a learning rate, DATASETS.TRAIN must be given in "
                f"{target.config} or in opts"
            )
        fit, held_out = (str(tuple(f"{name}@{part}" for name in names)) for part in ("fit", "held_out"))
        return ("DATASETS.TRAIN", fit, "DATASETS.TEST", held_out)

    def steps(self, trial: "Trial", tools: Path, folder: Path, resources: "Resources") -> list[Step]:
        options = ("--config-file", trial.config, "--resume", *_processes(resources), *trial.opts)
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
        """Box AP; mask AP if it has no boxes. The mean over the test sets, where there are several."""
        scores = [
            _finite((metrics["bbox"] if "bbox" in metrics else metrics.get("segm", {})).get("AP"))
            for metrics in by_test_set(results["metrics"])
        ]
        return None if None in scores else fmean(scores)


class Transfer(Kind):
    """LazyConfigs of classification transfer, trained by tools/transfer.py."""

    key, noun, measure = "transfers", "transfer", "accuracy"
    set_by_the_grid: ClassVar = {
        "train.output_dir": "--output",
        "weights": "the arms' weights",
        "optimizer.lr": "learning_rates",
        "train.seed": "seeds",
    }
    set_by_the_selection: ClassVar = {"dataset.held_out": "the selection"}
    evaluates = False

    def digest(self, config: str) -> str:
        texts = {str(path): path.read_text(encoding="utf-8") for path in _imported(Path(config))}
        return hashlib.sha256("\0".join(texts.values()).encode()).hexdigest()

    def held_out(self, target: "Target", opts: tuple[str, ...]) -> tuple[str, ...]:
        return ("dataset.held_out", "True")

    def steps(self, trial: "Trial", tools: Path, folder: Path, resources: "Resources") -> list[Step]:
        keys = {
            **dict(zip(trial.opts[::2], trial.opts[1::2], strict=True)),
            "weights": _quoted(trial.weights),
            "optimizer.lr": repr(trial.learning_rate),
            "train.seed": str(trial.seed),
            "train.output_dir": _quoted(str(folder)),
        }
        # YAML's null has become Python's None; Hydra, which reads these, knows null only.
        overrides = (f"{key}={'null' if value == 'None' else value}" for key, value in keys.items())
        options = ("--config-file", trial.config, "--resume", *_processes(resources))
        return [Step((str(tools / "transfer.py"), *options, *overrides), *RESULTS)]

    def score(self, results: Mapping[str, Any]) -> float | None:
        return _finite(results["metrics"].get("accuracy", {}).get("accuracy"))


def is_number(value: Any) -> bool:
    """Whether ``value`` is a finite number. Undefined AP is NaN or null, by who wrote it: that is none."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def by_test_set(metrics: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Task -> metric -> value for each test set; of several sets Detectron2 nests one deeper."""
    is_nested = any(isinstance(value, Mapping) for task in metrics.values() for value in task.values())
    return list(metrics.values()) if is_nested else [metrics]


KINDS = {kind.key: kind for kind in (Detection(), Transfer())}


def read_digest(kind: Kind, config: str, where: str) -> str:
    """The digest of a config file.

    Raises:
        InputError: it is not one of this kind.
    """
    try:
        return kind.digest(config)
    except Exception as error:  # of the file's content, so of any type
        raise InputError(f"{where}: {config} is no config file: {one_line(error)}") from None


def _processes(resources: "Resources") -> tuple[str, ...]:
    # Trials beside each other on one machine must not meet at one port.
    return ("--num-gpus", f"{resources.gpus:g}", "--dist-url", "auto") if resources.gpus > 1 else ()


def _finite(score: Any) -> float | None:
    return score if is_number(score) else None


def _names(value: Any) -> tuple[str, ...]:
    """The data sets of DATASETS.TRAIN, which config files and opts may give as a tuple in a string."""
    with suppress(ValueError, SyntaxError):  # a bare name
        value = ast.literal_eval(value) if isinstance(value, str) else value
    return (value,) if isinstance(value, str) else tuple(value)


def _imported(config: Path) -> list[Path]:
    """A LazyConfig file and those that it imports relatively, in a fixed order; nothing is run."""
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
    """A string for Hydra's grammar, whatever stands in it."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"
