"""A study: arms (backbones) x detectors x learning rates x seeds, read from a YAML file."""

import ast
import hashlib
import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from fvcore.common.config import CfgNode

from rt_detectron.errors import InputError, one_line
from rt_detectron.files import file_sha256
from rt_detectron.study import schema

SELECTION, FINAL = "selection", "final"  # a trial's stage

_SET_BY_THE_GRID = {
    "OUTPUT_DIR": "--output",
    "MODEL.WEIGHTS": "the arms' weights",
    "SOLVER.BASE_LR": "learning_rates",
    "SEED": "seeds",
}
_SET_BY_THE_SELECTION = dict.fromkeys(
    ("DATASETS.TRAIN", "DATASETS.TEST"), "the selection: @fit and @held_out of what the detector trains on"
)


@dataclass(frozen=True)
class Arm:
    """What is compared: a backbone's weights, and config keys that go with them.

    Attributes:
        eps: the threat model's radius that the weights were trained with, if given; a figure's axis.
        baseline: the arm to compare with, where it is not the study's.
    """

    name: str
    weights: str
    weights_sha256: str | None  # None for weights behind a scheme, such as detectron2://
    opts: tuple[str, ...]
    eps: float | None = None
    baseline: str | None = None


@dataclass(frozen=True)
class Detector:
    """A Detectron2 config file, and config keys that go with it."""

    name: str
    config: str
    config_sha256: str  # of its keys, merged with those of every _BASE_ file under it
    opts: tuple[str, ...]
    train: tuple[str, ...]  # DATASETS.TRAIN of the file


@dataclass(frozen=True)
class Selection:
    """How the learning rate of each arm and detector is chosen: by these seeds, with these config keys."""

    seeds: tuple[int, ...]
    opts: tuple[str, ...]


@dataclass(frozen=True)
class Resources:
    """What one trial occupies; a part of a GPU (0.5) is shared with other trials."""

    cpus: int = 1
    gpus: float = 0


@dataclass(frozen=True)
class Trial:
    """One training run and its evaluations. Its fields decide its result: trial.json records them."""

    arm: str
    detector: str
    learning_rate: float
    seed: int
    stage: str  # SELECTION or FINAL
    config: str
    config_sha256: str
    weights: str
    weights_sha256: str | None
    opts: tuple[str, ...]
    evaluations: tuple[str, ...]  # config keys of the robustness evaluation; empty: there is none

    @property
    def name(self) -> str:
        """``arm/detector/lr0.02/seed1``: unique in the study, and the trial's folder under trials/."""
        prefix = "" if self.stage == FINAL else f"{self.stage}-"
        return f"{self.arm}/{self.detector}/lr{self.learning_rate!r}/{prefix}seed{self.seed}"

    def specification(self) -> dict[str, Any]:
        """The trial as JSON gives it back."""
        return {**asdict(self), "opts": list(self.opts), "evaluations": list(self.evaluations)}


@dataclass(frozen=True)
class Study:
    """The whole grid.

    Attributes:
        baseline: name of the arm that the others are compared with; see :meth:`baseline_of`.
        learning_rates: the same for every arm; where there are several, the selection chooses one for each
            arm and detector.
        evaluations: name -> config keys of tools/evaluate_robustness.py, for the final trials.
        selection: None with a single learning rate.
        retries: how often a crashed trial is started again.
    """

    name: str
    baseline: str
    arms: tuple[Arm, ...]
    detectors: tuple[Detector, ...]
    learning_rates: tuple[float, ...]
    seeds: tuple[int, ...]
    opts: tuple[str, ...]
    evaluations: Mapping[str, tuple[str, ...]]
    selection: Selection | None
    resources: Resources
    retries: int

    def baseline_of(self, arm: str) -> str:
        """The arm that the arm of this name is compared with; a baseline's is itself."""
        return next(entry.baseline for entry in self.arms if entry.name == arm) or self.baseline

    def selection_trials(self) -> list[Trial]:
        """Those that choose the learning rate, trained and scored within the training set; may be none."""
        if self.selection is None:
            return []
        return [
            self._trial(arm, detector, rate, seed, SELECTION)
            for seed in self.selection.seeds
            for detector in self.detectors
            for arm in self.arms
            for rate in self.learning_rates
        ]

    def final_trials(self, rates: Mapping[tuple[str, str], float] = MappingProxyType({})) -> list[Trial]:
        """Those that are reported, for each (arm, detector) that has its learning rate chosen in ``rates``.

        Seed by seed and the arms next to each other: an unfinished study compares early. With a single
        learning rate nothing needs choosing.
        """
        if self.selection is None:
            pairs = [(arm.name, detector.name) for arm in self.arms for detector in self.detectors]
            rates = dict.fromkeys(pairs, self.learning_rates[0])
        return [
            self._trial(arm, detector, rates[arm.name, detector.name], seed, FINAL)
            for seed in self.seeds
            for detector in self.detectors
            for arm in self.arms
            if (arm.name, detector.name) in rates
        ]

    def possible_trials(self) -> list[Trial]:
        """Every trial that any outcome of the selection can lead to."""
        pairs = [(arm.name, detector.name) for arm in self.arms for detector in self.detectors]
        finals = [self.final_trials(dict.fromkeys(pairs, rate)) for rate in self.learning_rates]
        return self.selection_trials() + [trial for trials in finals for trial in trials]

    def count_trials(self) -> int:
        """How many trials the study takes, whatever the selection chooses."""
        return len(self.selection_trials()) + len(self.arms) * len(self.detectors) * len(self.seeds)

    def _trial(self, arm: Arm, detector: Detector, rate: float, seed: int, stage: str) -> Trial:
        opts = self.opts + detector.opts + arm.opts
        evaluations = tuple(opt for evaluation in self.evaluations.values() for opt in evaluation)
        if stage == SELECTION:
            names = dict(zip(opts[::2], opts[1::2], strict=True)).get("DATASETS.TRAIN")
            names = detector.train if names is None else _names(names)
            if not names:
                raise InputError(
                    f"detectors.{detector.name}: to choose a learning rate, DATASETS.TRAIN must be given in "
                    f"{detector.config} or in opts"
                )
            opts += self.selection.opts
            opts += ("DATASETS.TRAIN", str(tuple(f"{name}@fit" for name in names)))
            opts += ("DATASETS.TEST", str(tuple(f"{name}@held_out" for name in names)))
            evaluations = ()
        return Trial(
            arm=arm.name,
            detector=detector.name,
            learning_rate=rate,
            seed=seed,
            stage=stage,
            config=detector.config,
            config_sha256=detector.config_sha256,
            weights=arm.weights,
            weights_sha256=arm.weights_sha256,
            opts=opts,
            evaluations=evaluations,
        )


def load_study(file: str | Path) -> Study:
    """Read and check a study file; paths in it are relative to the current directory.

    Raises:
        InputError: naming the file and the key that is wrong.
    """
    study = schema.mapping(
        schema.read_yaml(file),
        f"{file}",
        required={"name", "baseline", "arms", "detectors", "learning_rates", "seeds"},
        optional={"opts", "evaluations", "selection", "resources", "retries"},
    )
    rates = schema.numbers(study["learning_rates"], f"{file}: learning_rates", schema.number)
    seeds = schema.numbers(study["seeds"], f"{file}: seeds", schema.whole)
    result = Study(
        name=schema.text(study["name"], f"{file}: name"),
        baseline=study["baseline"],
        arms=tuple(_arm(*entry) for entry in schema.named(study["arms"], f"{file}: arms")),
        detectors=tuple(
            _detector(*entry) for entry in schema.named(study["detectors"], f"{file}: detectors")
        ),
        learning_rates=rates,
        seeds=seeds,
        opts=_opts(study.get("opts"), f"{file}: opts"),
        evaluations=_evaluations(study.get("evaluations"), f"{file}: evaluations"),
        selection=_selection(study.get("selection", {}), f"{file}: selection", seeds, len(rates) > 1),
        resources=_resources(study.get("resources", {}), f"{file}: resources"),
        retries=schema.whole(study.get("retries", 0), f"{file}: retries"),
    )
    _check_baselines(result, str(file))
    return result


def _arm(name: str, entry: Any, where: str) -> Arm:
    entry = schema.mapping(entry, where, required={"weights"}, optional={"eps", "baseline", "opts"})
    weights = schema.file(entry["weights"], f"{where}.weights")
    return Arm(
        name,
        weights,
        None if "://" in weights else file_sha256(schema.local(weights)),
        _opts(entry.get("opts"), f"{where}.opts"),
        schema.number(entry["eps"], f"{where}.eps", zero=True) if "eps" in entry else None,
        entry.get("baseline"),
    )


def _detector(name: str, entry: Any, where: str) -> Detector:
    entry = schema.mapping(entry, where, required={"config"}, optional={"opts"})
    config = schema.file(entry["config"], f"{where}.config")
    try:
        keys = CfgNode.load_yaml_with_base(config)
        digest = hashlib.sha256(json.dumps(keys, sort_keys=True).encode()).hexdigest()
        train = _names(keys.get("DATASETS", {}).get("TRAIN", ()))
    except Exception as error:  # of the file's content, so of any type
        raise InputError(f"{where}.config: {config} is no config file: {one_line(error)}") from None
    return Detector(name, config, digest, _opts(entry.get("opts"), f"{where}.opts"), train)


def _opts(value: Any, where: str) -> tuple[str, ...]:
    return schema.opts(value, where, _SET_BY_THE_GRID)


def _evaluations(value: Any, where: str) -> dict[str, tuple[str, ...]]:
    if value is None:
        return {}
    result, used = {}, {}
    for name, entry, place in schema.named(value, where):
        # All run in one process, so a key can have one value only.
        result[name] = schema.opts(entry, place, {**_SET_BY_THE_GRID, **used})
        used |= dict.fromkeys(result[name][::2], place)
    return result


def _selection(value: Any, where: str, seeds: tuple[int, ...], wanted: bool) -> Selection | None:
    entry = schema.mapping(value, where, optional={"seeds", "opts"})
    selection = Selection(
        schema.numbers(entry.get("seeds", [seeds[0]]), f"{where}.seeds", schema.whole),
        schema.opts(entry.get("opts"), f"{where}.opts", {**_SET_BY_THE_GRID, **_SET_BY_THE_SELECTION}),
    )
    return selection if wanted else None


def _resources(value: Any, where: str) -> Resources:
    entry = schema.mapping(value, where, optional={"cpus", "gpus"})
    gpus = schema.number(entry.get("gpus", 0), f"{where}.gpus", zero=True)
    if gpus > 1 and not gpus.is_integer():
        raise InputError(f"{where}.gpus: {gpus} is neither a whole number of GPUs nor a part of one")
    return Resources(schema.whole(entry.get("cpus", 1), f"{where}.cpus", least=1), gpus)


def _check_baselines(study: Study, file: str) -> None:
    names = [arm.name for arm in study.arms]
    given = {f"arms.{arm.name}.baseline": arm.baseline for arm in study.arms if arm.baseline is not None}
    given = {"baseline": study.baseline, **given}
    for place, baseline in given.items():
        if baseline not in names:
            raise InputError(f"{file}: {place}: {baseline!r} is not an arm; arms are {', '.join(names)}")
    for place, baseline in given.items():
        if (other := study.baseline_of(baseline)) != baseline:
            raise InputError(
                f"{file}: {place}: {baseline} itself is compared with {other}: "
                f"give arms.{baseline}.baseline: {baseline}"
            )


def _names(value: Any) -> tuple[str, ...]:
    """The data sets of DATASETS.TRAIN, which config files and opts may give as a tuple in a string."""
    with suppress(ValueError, SyntaxError):  # a bare name
        value = ast.literal_eval(value) if isinstance(value, str) else value
    return (value,) if isinstance(value, str) else tuple(value)
