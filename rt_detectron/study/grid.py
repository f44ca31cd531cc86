"""A study: arms (backbones) x targets x learning rates x seeds, read from a YAML file."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from rt_detectron.study import schema
from rt_detectron.study.kinds import KINDS, Kind, read_digest
from rt_detectron.utils.errors import InputError
from rt_detectron.utils.files import file_sha256

SELECTION, FINAL = "selection", "final"  # a trial's stage


@dataclass(frozen=True)
class Arm:
    """What is compared: a backbone's weights, and config keys that go with them.

    Attributes:
        eps: the threat model's radius that the weights were trained with, if given; a figure's axis.
        source_accuracy: what the weights' classifier has on its own data set, in percent, if given; as eps.
        baseline: the arm to compare with, where it is not the study's.
    """

    name: str
    weights: str
    weights_sha256: str | None  # None for weights behind a scheme, such as detectron2://
    opts: tuple[str, ...]
    eps: float | None = None
    source_accuracy: float | None = None
    baseline: str | None = None


@dataclass(frozen=True)
class Target:
    """What a backbone is transferred to: a config file, and config keys that go with it."""

    name: str
    config: str
    config_sha256: str  # of all that it says, see Kind.digest
    opts: tuple[str, ...]


@dataclass(frozen=True)
class Selection:
    """How the learning rate of each arm and target is chosen: by these seeds, with these config keys."""

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
    target: str
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
        """``arm/target/lr0.02/seed1``: unique in the study, and the trial's folder under trials/."""
        prefix = "" if self.stage == FINAL else f"{self.stage}-"
        return f"{self.arm}/{self.target}/lr{self.learning_rate!r}/{prefix}seed{self.seed}"

    def specification(self) -> dict[str, Any]:
        """The trial as JSON gives it back."""
        return {**asdict(self), "opts": list(self.opts), "evaluations": list(self.evaluations)}


@dataclass(frozen=True)
class Study:
    """The whole grid.

    Attributes:
        kind: a key of :data:`rt_detectron.study.kinds.KINDS`.
        baseline: name of the arm that the others are compared with; see :meth:`baseline_of`.
        learning_rates: the same for every arm; where there are several, the selection chooses one for each
            arm and target.
        evaluations: name -> config keys of tools/evaluate_robustness.py, for the final trials.
        selection: None with a single learning rate.
        retries: how often a crashed trial is started again.
    """

    name: str
    kind: str
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

    def baseline_of(self, arm: str) -> str:
        """The arm that the arm of this name is compared with; a baseline's is itself."""
        return next(entry.baseline for entry in self.arms if entry.name == arm) or self.baseline

    def selection_trials(self) -> list[Trial]:
        """Those that choose the learning rate, trained and scored within the training set; may be none."""
        if self.selection is None:
            return []
        return [
            self._trial(arm, target, rate, seed, SELECTION)
            for seed in self.selection.seeds
            for target in self.targets
            for arm in self.arms
            for rate in self.learning_rates
        ]

    def final_trials(self, rates: Mapping[tuple[str, str], float] = MappingProxyType({})) -> list[Trial]:
        """Those that are reported, for each (arm, target) that has its learning rate chosen in ``rates``.

        Seed by seed and the arms next to each other: an unfinished study compares early. With a single
        learning rate nothing needs choosing.
        """
        if self.selection is None:
            pairs = [(arm.name, target.name) for arm in self.arms for target in self.targets]
            rates = dict.fromkeys(pairs, self.learning_rates[0])
        return [
            self._trial(arm, target, rates[arm.name, target.name], seed, FINAL)
            for seed in self.seeds
            for target in self.targets
            for arm in self.arms
            if (arm.name, target.name) in rates
        ]

    def possible_trials(self) -> list[Trial]:
        """Every trial that any outcome of the selection can lead to."""
        pairs = [(arm.name, target.name) for arm in self.arms for target in self.targets]
        finals = [self.final_trials(dict.fromkeys(pairs, rate)) for rate in self.learning_rates]
        return self.selection_trials() + [trial for trials in finals for trial in trials]

    def count_trials(self) -> int:
        """How many trials the study takes, whatever the selection chooses."""
        return len(self.selection_trials()) + len(self.arms) * len(self.targets) * len(self.seeds)

    def _trial(self, arm: Arm, target: Target, rate: float, seed: int, stage: str) -> Trial:
        opts = self.opts + target.opts + arm.opts
        evaluations = tuple(opt for evaluation in self.evaluations.values() for opt in evaluation)
        if stage == SELECTION:
            opts += self.selection.opts
            opts += KINDS[self.kind].held_out(target, opts)
            evaluations = ()
        return Trial(
            arm=arm.name,
            target=target.name,
            learning_rate=rate,
            seed=seed,
            stage=stage,
            config=target.config,
            config_sha256=target.config_sha256,
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
        required={"name", "baseline", "arms", "learning_rates", "seeds"},
        optional={*KINDS, "opts", "evaluations", "selection", "resources", "retries"},
    )
    kind = _kind(study, f"{file}")
    rates = schema.numbers(study["learning_rates"], f"{file}: learning_rates", schema.number)
    seeds = schema.numbers(study["seeds"], f"{file}: seeds", schema.whole)
    arms = schema.named(study["arms"], f"{file}: arms")
    targets = schema.named(study[kind.key], f"{file}: {kind.key}")
    result = Study(
        name=schema.text(study["name"], f"{file}: name"),
        kind=kind.key,
        baseline=study["baseline"],
        arms=tuple(_arm(kind, *entry) for entry in arms),
        targets=tuple(_target(kind, *entry) for entry in targets),
        learning_rates=rates,
        seeds=seeds,
        opts=schema.opts(study.get("opts"), f"{file}: opts", kind.set_by_the_grid),
        evaluations=_evaluations(kind, study.get("evaluations"), f"{file}: evaluations"),
        selection=_selection(kind, study.get("selection", {}), f"{file}: selection", seeds, len(rates) > 1),
        resources=_resources(study.get("resources", {}), f"{file}: resources"),
        retries=schema.whole(study.get("retries", 0), f"{file}: retries"),
    )
    _check_baselines(result, str(file))
    return result


def _kind(study: Mapping[str, Any], where: str) -> Kind:
    given = [key for key in KINDS if key in study]
    if len(given) != 1:
        raise InputError(
            f"{where}: give one of the keys {', '.join(KINDS)}, got {' and '.join(given) or 'none'}"
        )
    return KINDS[given[0]]


def _arm(kind: Kind, name: str, entry: Any, where: str) -> Arm:
    numbers = {"eps", "source_accuracy"}
    entry = schema.mapping(entry, where, required={"weights"}, optional={*numbers, "baseline", "opts"})
    weights = schema.file(entry["weights"], f"{where}.weights")
    return Arm(
        name,
        weights,
        None if "://" in weights else file_sha256(schema.local(weights)),
        schema.opts(entry.get("opts"), f"{where}.opts", kind.set_by_the_grid),
        **{key: schema.number(entry[key], f"{where}.{key}", zero=True) for key in numbers & entry.keys()},
        baseline=entry.get("baseline"),
    )


def _target(kind: Kind, name: str, entry: Any, where: str) -> Target:
    entry = schema.mapping(entry, where, required={"config"}, optional={"opts"})
    config = schema.file(entry["config"], f"{where}.config")
    digest = read_digest(kind, config, f"{where}.config")
    return Target(name, config, digest, schema.opts(entry.get("opts"), f"{where}.opts", kind.set_by_the_grid))


def _evaluations(kind: Kind, value: Any, where: str) -> dict[str, tuple[str, ...]]:
    if value is None:
        return {}
    if not kind.evaluates:
        raise InputError(f"{where}: only studies of detectors have them")
    result, used = {}, {}
    for name, entry, place in schema.named(value, where):
        # All run in one process, so a key can have one value only.
        result[name] = schema.opts(entry, place, {**kind.set_by_the_grid, **used})
        used |= dict.fromkeys(result[name][::2], place)
    return result


def _selection(kind: Kind, value: Any, where: str, seeds: tuple[int, ...], wanted: bool) -> Selection | None:
    entry = schema.mapping(value, where, optional={"seeds", "opts"})
    refused = {**kind.set_by_the_grid, **kind.set_by_the_selection}
    selection = Selection(
        schema.numbers(entry.get("seeds", [seeds[0]]), f"{where}.seeds", schema.whole),
        schema.opts(entry.get("opts"), f"{where}.opts", refused),
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
