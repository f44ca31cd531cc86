"""A study: arms (backbones) x targets x learning rates x seeds, and the trials that they make."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

from rt_detectron.study.worker import Step

SELECTION, FINAL = "selection", "final"  # a trial's stage


@dataclass(frozen=True)
class Checkpoint:
    """One training of an arm's recipe.

    Attributes:
        name: such as "1", its pretraining seed; "" for the only one of an arm.
        weights_sha256: None for weights behind a scheme, such as ``detectron2://``.
    """

    name: str
    weights: str
    weights_sha256: str | None


@dataclass(frozen=True)
class Arm:
    """What is compared: a backbone, as one checkpoint of its recipe or as several, with config keys.

    Attributes:
        weights: as the study file gives them.
        eps: radius of the threat model that the weights were trained for, if given. Used in figures.
        source_accuracy: accuracy of the weights' classifier on its own data set, in percent, if given.
        baseline: the arm to compare with, if it is not the study's baseline.
    """

    name: str
    weights: str
    checkpoints: tuple[Checkpoint, ...]
    opts: tuple[str, ...]
    eps: float | None = None
    source_accuracy: float | None = None
    baseline: str | None = None


@dataclass(frozen=True)
class Target:
    """What a backbone is transferred to: a config file, with config keys.

    Attributes:
        config_sha256: see :meth:`DownstreamTask.digest`.
    """

    name: str
    config: str
    config_sha256: str
    opts: tuple[str, ...]


@dataclass(frozen=True)
class Selection:
    """The trials that choose the learning rate of each arm and target: their seeds and config keys."""

    seeds: tuple[int, ...]
    opts: tuple[str, ...]


@dataclass  # not frozen, since OmegaConf fills it in
class Resources:
    """What one trial needs. With a fraction of a GPU, such as 0.5, trials share one."""

    cpus: int = 1
    gpus: float = 0


@dataclass(frozen=True)
class Trial:
    """One training and its evaluations. Its fields determine its result; trial.json records them.

    Attributes:
        stage: SELECTION or FINAL.
        evaluations: config keys of tools/evaluate_robustness.py; empty without an evaluation.
        checkpoint: name of the arm's checkpoint; "" if it has only one.
    """

    arm: str
    target: str
    learning_rate: float
    seed: int
    stage: str
    config: str
    config_sha256: str
    weights: str
    weights_sha256: str | None
    opts: tuple[str, ...]
    evaluations: tuple[str, ...]
    checkpoint: str = ""

    @property
    def name(self) -> str:
        """``arm/target/lr0.02/seed1``: unique in the study, and the trial's folder under trials/.

        With several checkpoints ``arm/target/lr0.02/checkpoint1-seed1``.
        """
        prefix = "" if self.stage == FINAL else f"{self.stage}-"
        prefix += f"checkpoint{self.checkpoint}-" if self.checkpoint else ""
        return f"{self.arm}/{self.target}/lr{self.learning_rate!r}/{prefix}seed{self.seed}"

    def specification(self) -> dict[str, Any]:
        """The trial as trial.json holds it."""
        content = {**asdict(self), "opts": list(self.opts), "evaluations": list(self.evaluations)}
        if not self.checkpoint:
            del content["checkpoint"]  # as in files from before there were several
        return content

    @classmethod
    def from_specification(cls, content: Mapping[str, Any]) -> "Trial":
        """The trial of a trial.json or of an entry of results.json, which has more keys."""
        known = {key.name: content[key.name] for key in fields(cls) if key.name in content}
        lists = {key: tuple(known[key]) for key in ("opts", "evaluations")}
        return cls(**{**known, **lists})


class DownstreamTask(ABC):
    """What the arms are transferred to: detection, or classification. See :mod:`rt_detectron.study.tasks`.

    Attributes:
        key: the key of the study file that lists the targets.
        noun: what one target is called.
        measure: what a learning rate is chosen by.
        set_by_the_study: config key -> what sets it. ``opts`` may not.
        set_by_the_selection: the same, for the ``opts`` of the selection.
        has_evaluations: whether an evaluation can follow a trial's training.
        weights_files: patterns of the checkpoints in a trial's folder.
    """

    weights_files: ClassVar[tuple[str, ...]] = ("*.pth", "last_checkpoint")

    key: ClassVar[str]
    noun: ClassVar[str]
    measure: ClassVar[str]
    set_by_the_study: ClassVar[Mapping[str, str]]
    set_by_the_selection: ClassVar[Mapping[str, str]]
    has_evaluations: ClassVar[bool]

    @abstractmethod
    def digest(self, config: str) -> str:
        """SHA-256 of everything that a config file says, including the files it imports.

        Raises:
            Exception: of any type, if it is no config file of this task.
        """

    @abstractmethod
    def copy_config(self, config: str, folder: Path) -> str:
        """Write into ``folder`` a copy of a config file with all that it imports; gives the copy's path."""

    @abstractmethod
    def held_out(self, target: Target, opts: tuple[str, ...]) -> tuple[str, ...]:
        """Config keys to train on a part of the training set and to score on the rest of it.

        Args:
            opts: the other config keys of the trial.
        """

    @abstractmethod
    def steps(self, trial: Trial, tools: Path, folder: Path, resources: Resources) -> list[Step]:
        """The processes of a trial. Each resumes from what ``folder`` already holds."""

    @abstractmethod
    def score(self, results: Mapping[str, Any]) -> float | None:
        """The score in a results.json, in percent, that learning rates are compared by. None if undefined."""


@dataclass(frozen=True)
class Study:
    """The whole grid.

    Attributes:
        baseline: name of the arm that the others are compared with. See :meth:`baseline_of`.
        learning_rates: the same for every arm. If there are several, the selection chooses one for each arm
            and target.
        evaluations: name -> config keys of tools/evaluate_robustness.py, for the final trials.
        selection: None with a single learning rate.
        retries: how often a crashed trial is started again.
        margin: differences below it, in points, do not matter; None if every difference does.
        keep_checkpoints: whether the weights of a trial are kept once it has its record.
        copies: target -> the copy of its config that trials read; empty before the study has begun.
    """

    name: str
    downstream: DownstreamTask
    baseline: str
    arms: tuple[Arm, ...]
    targets: tuple[Target, ...]
    learning_rates: tuple[float, ...]
    seeds: tuple[int, ...]
    opts: tuple[str, ...]
    evaluations: Mapping[str, tuple[str, ...]]
    selection: Selection | None
    resources: Resources
    retries: int
    margin: float | None = None
    keep_checkpoints: bool = False
    copies: dict[str, str] = field(default_factory=dict)

    def arm(self, name: str) -> Arm:
        return next(arm for arm in self.arms if arm.name == name)

    def baseline_of(self, arm: str) -> str:
        """Name of the arm that ``arm`` is compared with. A baseline is its own."""
        return self.arm(arm).baseline or self.baseline

    def selection_trials(self) -> list[Trial]:
        """The trials that choose learning rates. They train and score on parts of the training set.

        Each seed takes the next checkpoint of an arm.
        """
        if self.selection is None:
            return []
        return [
            self._trial(arm, target, rate, seed, SELECTION, arm.checkpoints[number % len(arm.checkpoints)])
            for number, seed in enumerate(self.selection.seeds)
            for target in self.targets
            for arm in self.arms
            for rate in self.learning_rates
        ]

    def final_trials(self, rates: Mapping[tuple[str, str], float] = MappingProxyType({})) -> list[Trial]:
        """The trials that are reported.

        They are ordered by seed, with the arms next to each other, so that an unfinished study can already
        be compared.

        Args:
            rates: (arm, target) -> its chosen learning rate. Pairs without one have no trials yet. Ignored
                if the study has a single learning rate.
        """
        if self.selection is None:
            pairs = [(arm.name, target.name) for arm in self.arms for target in self.targets]
            rates = dict.fromkeys(pairs, self.learning_rates[0])
        return [
            self._trial(arm, target, rates[arm.name, target.name], seed, FINAL, arm.checkpoints[number])
            for number in range(max(len(arm.checkpoints) for arm in self.arms))
            for seed in self.seeds
            for target in self.targets
            for arm in self.arms
            if number < len(arm.checkpoints) and (arm.name, target.name) in rates
        ]

    def possible_trials(self) -> list[Trial]:
        """All trials, for every possible outcome of the selection."""
        pairs = [(arm.name, target.name) for arm in self.arms for target in self.targets]
        finals = [self.final_trials(dict.fromkeys(pairs, rate)) for rate in self.learning_rates]
        return self.selection_trials() + [trial for trials in finals for trial in trials]

    def count_trials(self) -> int:
        """Number of trials of the study. It does not depend on what the selection chooses."""
        checkpoints = sum(len(arm.checkpoints) for arm in self.arms)
        chosen_by = len(self.selection.seeds) * len(self.learning_rates) if self.selection else 0
        return len(self.targets) * (len(self.arms) * chosen_by + checkpoints * len(self.seeds))

    def description(self) -> dict[str, Any]:
        """The study as results.json holds it."""
        known = asdict(self)
        return {"kind": known.pop("downstream").key, **known}

    def _trial(
        self, arm: Arm, target: Target, rate: float, seed: int, stage: str, checkpoint: Checkpoint
    ) -> Trial:
        opts = self.opts + target.opts + arm.opts
        evaluations = tuple(opt for evaluation in self.evaluations.values() for opt in evaluation)
        if stage == SELECTION and self.selection is not None:
            opts += self.selection.opts
            source = replace(target, config=self.copies.get(target.name, target.config))
            opts += self.downstream.held_out(source, opts)
            evaluations = ()
        return Trial(
            arm=arm.name,
            target=target.name,
            learning_rate=rate,
            seed=seed,
            stage=stage,
            config=target.config,
            config_sha256=target.config_sha256,
            weights=checkpoint.weights,
            weights_sha256=checkpoint.weights_sha256,
            opts=opts,
            evaluations=evaluations,
            checkpoint=checkpoint.name,
        )
