"""Read a study's YAML file. Any mistake in it is reported in one line that names the file and the key."""

import glob
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NoReturn, cast

import yaml
from omegaconf import MISSING, OmegaConf, SCMode
from omegaconf.errors import ConfigKeyError, MissingMandatoryValue, OmegaConfBaseException

from rt_detectron.study.grid import (
    FINAL,
    SELECTION,
    Arm,
    Checkpoint,
    DownstreamTask,
    Resources,
    Selection,
    Study,
    Target,
    Trial,
)
from rt_detectron.study.tasks import DOWNSTREAM_TASKS
from rt_detectron.utils.errors import InputError, one_line
from rt_detectron.utils.files import file_sha256, find_config

_SAFE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")  # names of arms and targets become folders
SEED = "{seed}"  # in an arm's weights
SELECTION_SEEDS = 3  # of the study's seeds choose learning rates, if it does not say otherwise


@dataclass
class ArmEntry:
    """One of ``arms``."""

    weights: Any = MISSING  # a path, a path with {seed} in it, or a list of paths
    opts: list[Any] | None = None
    eps: float | None = None
    source_accuracy: float | None = None
    baseline: str | None = None


@dataclass
class TargetEntry:
    """One of ``detectors`` or ``transfers``."""

    config: str = MISSING
    opts: list[Any] | None = None


@dataclass
class SelectionEntry:
    """``selection``."""

    seeds: list[int] | None = None
    opts: list[Any] | None = None


@dataclass
class StudyFile:
    """The keys of a study file. docs/compare.md explains them."""

    name: str = MISSING
    baseline: str = MISSING
    arms: dict[str, ArmEntry] = MISSING
    detectors: dict[str, TargetEntry] | None = None
    transfers: dict[str, TargetEntry] | None = None
    learning_rates: list[float] = MISSING
    seeds: list[int] = MISSING
    opts: list[Any] | None = None
    evaluations: dict[str, list[Any]] | None = None
    selection: SelectionEntry = field(default_factory=SelectionEntry)
    resources: Resources = field(default_factory=Resources)
    retries: int = 0
    margin: float | None = None
    keep_checkpoints: bool = False


def load_study(file: str | Path) -> Study:
    """Read and check a study file. Paths in it are relative to the current directory.

    Raises:
        InputError: naming the file and the key that is wrong.
    """
    content = _read_yaml(file)
    try:
        return _study(_validated(content))
    except InputError as error:
        raise InputError(f"{file}: {error}") from None


def trials_only(study: Study, text: str) -> Callable[[Trial], bool]:
    """Whether a trial is one of those that ``arm=NAME,target=NAME,...`` names; all are if it is empty.

    Raises:
        InputError: for an unknown key or name.
    """
    known = {
        "arm": [arm.name for arm in study.arms],
        "target": [target.name for target in study.targets],
        "stage": [SELECTION, FINAL],
    }
    wanted: dict[str, list[str]] = {}
    for entry in filter(None, text.split(",")):
        key, _, name = entry.partition("=")
        if key not in known:
            raise InputError(f"--only {text}: unknown key {key!r}; known are {', '.join(known)}")
        if name not in known[key]:
            raise InputError(f"--only {text}: unknown {key} {name!r}; known are {', '.join(known[key])}")
        wanted.setdefault(key, []).append(name)
    return lambda trial: all(getattr(trial, key) in names for key, names in wanted.items())


def described_study(content: Mapping[str, Any]) -> Study:
    """The study of a description, see :meth:`Study.description`. None of its files has to be there.

    Raises:
        InputError: it is no description.
    """
    try:
        known = {key.name: content[key.name] for key in fields(Study) if key.name in content}
        selection = content["selection"]
        return Study(
            **{
                **known,
                "downstream": DOWNSTREAM_TASKS[content["kind"]],
                "arms": tuple(_described_arm(arm) for arm in content["arms"]),
                "targets": tuple(Target(**_tuples(target)) for target in content["targets"]),
                "learning_rates": tuple(content["learning_rates"]),
                "seeds": tuple(content["seeds"]),
                "opts": tuple(content["opts"]),
                "evaluations": _tuples(content["evaluations"]),
                "selection": selection and Selection(**_tuples(selection)),
                "resources": Resources(**content["resources"]),
            }
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"it describes no study ({type(error).__name__}: {one_line(error)})") from None


def _described_arm(content: Mapping[str, Any]) -> Arm:
    known = dict(content)
    checkpoints = known.pop("checkpoints", None)
    if checkpoints is None:  # written before an arm could have several
        checkpoints = [
            {"name": "", "weights": known["weights"], "weights_sha256": known.pop("weights_sha256")}
        ]
    return Arm(**{**_tuples(known), "checkpoints": tuple(Checkpoint(**one) for one in checkpoints)})


def _tuples(content: Mapping[str, Any]) -> dict[str, Any]:
    """The entries, with tuples for JSON's lists."""
    return {key: tuple(value) if isinstance(value, list) else value for key, value in content.items()}


def _read_yaml(file: str | Path) -> Any:
    try:
        text = Path(find_config(str(file))).read_text(encoding="utf-8")
        for key in _repeated_keys(yaml.compose(text)):
            raise InputError(f"{file}: {key}: this key is given twice")
        # Not OmegaConf.load: it reads 1e-4 as a number, and so would change the opts of existing trials.
        return yaml.safe_load(text)
    except FileNotFoundError:
        raise InputError(f"no study file {file}: the shipped studies are in configs/study/") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {file}: {error}") from None
    except yaml.YAMLError as error:
        raise InputError(f"{file} is not valid YAML: {one_line(error)}") from None


def _repeated_keys(node: yaml.Node | None, parent: str = "") -> Iterator[str]:
    """Full names of keys that a mapping has twice. PyYAML silently keeps the last of them."""
    if isinstance(node, yaml.MappingNode):
        seen = set()
        for key, value in node.value:
            name = f"{parent}{key.value}"
            if name in seen:
                yield name
            seen.add(name)
            yield from _repeated_keys(value, f"{name}.")


def _validated(content: Any) -> StudyFile:
    """The content with the keys and types of :class:`StudyFile`."""
    if not isinstance(content, dict):
        raise InputError(f"give some of the keys {_keys_of(StudyFile)}, got {content!r}")
    config, key = OmegaConf.structured(StudyFile), None
    try:
        for key, value in content.items():  # one by one, since not every error of OmegaConf names its key
            config = OmegaConf.merge(config, {key: value})
        mode = SCMode.INSTANTIATE
        return cast(
            StudyFile, OmegaConf.to_container(config, throw_on_missing=True, structured_config_mode=mode)
        )
    except ConfigKeyError as error:
        reason = f"unknown key; known are {_keys_of(error.object_type or StudyFile)}"
        raise InputError(f"{error.full_key}: {reason}") from None
    except MissingMandatoryValue as error:
        raise InputError(f"{error.full_key}: this key is missing") from None
    except OmegaConfBaseException as error:
        raise InputError(f"{error.full_key or key}: {str(error.msg).splitlines()[0]}") from None


def _keys_of(entry: type) -> str:
    return ", ".join(key.name for key in fields(entry))


def _study(file: StudyFile) -> Study:
    given = [key for key in DOWNSTREAM_TASKS if getattr(file, key) is not None]
    if len(given) != 1:
        keys = ", ".join(DOWNSTREAM_TASKS)
        raise InputError(f"give one of the keys {keys}, got {' and '.join(given) or 'none'}")
    task = DOWNSTREAM_TASKS[given[0]]
    if not file.name.strip():
        _refuse("name", "give the study a name")
    if file.evaluations is not None and not task.has_evaluations:
        _refuse("evaluations", "only studies of detectors have them")
    rates, seeds = _distinct("learning_rates", file.learning_rates), _seeds("seeds", file.seeds)
    for rate in rates:
        _check_number("learning_rates", rate)
    selection = _selection(file.selection, task, seeds)
    study = Study(
        name=file.name,
        downstream=task,
        baseline=file.baseline,
        arms=tuple(_arm(*named, task) for named in _named("arms", file.arms)),
        targets=tuple(_target(*named, task) for named in _named(task.key, getattr(file, task.key))),
        learning_rates=rates,
        seeds=seeds,
        opts=_opts("opts", file.opts, task.set_by_the_study),
        evaluations=_evaluations(file.evaluations, task),
        selection=selection if len(rates) > 1 else None,
        resources=file.resources,
        retries=file.retries,
        margin=file.margin,
        keep_checkpoints=file.keep_checkpoints,
    )
    if file.margin is not None:
        _check_number("margin", file.margin)
    _check_whole("retries", file.retries)
    _check_resources(file.resources)
    _check_baselines(study)
    _check_same_seeds(file.arms)
    return study


def _arm(key: str, name: str, entry: ArmEntry, task: DownstreamTask) -> Arm:
    checkpoints = tuple(_checkpoints(f"{key}.weights", entry.weights))
    for number in ("eps", "source_accuracy"):
        if (value := getattr(entry, number)) is not None:
            _check_number(f"{key}.{number}", value, zero=True)
    return Arm(
        name,
        entry.weights if isinstance(entry.weights, str) else ", ".join(map(str, entry.weights)),
        checkpoints,
        _opts(f"{key}.opts", entry.opts, task.set_by_the_study),
        entry.eps,
        entry.source_accuracy,
        entry.baseline,
    )


def _checkpoints(key: str, weights: Any) -> Iterator[Checkpoint]:
    """One or several trainings of a recipe: those of a path, of a path with {seed} in it, or of a list."""
    if isinstance(weights, str) and SEED in weights:
        found = _seeds_on_disk(weights)
        if not found:
            _refuse(key, f"no file {weights.replace(SEED, '1')}, nor of another seed")
        named = [(str(seed), weights.replace(SEED, str(seed))) for seed in found]
    elif isinstance(weights, str):
        named = [("", weights)]
    elif isinstance(weights, list) and weights and all(isinstance(path, str) for path in weights):
        _distinct(key, weights)
        named = [(str(number), path) for number, path in enumerate(weights, 1)]
    else:
        _refuse(key, f"give a path, a path with {SEED} in it, or a list of paths, got {weights!r}")
    for name, path in named:
        file = _existing(key, path)
        yield Checkpoint(name if len(named) > 1 else "", path, file_sha256(file) if file else None)


def _seeds_on_disk(weights: str) -> list[int]:
    """The numbers that stand for {seed} in the files that there are, ascending."""
    pattern = re.compile(
        r"(\d+)".join(map(re.escape, weights.split(SEED, 1))).replace(re.escape(SEED), r"\1")
    )
    files = map(str, glob.iglob("*".join(map(glob.escape, weights.split(SEED)))))
    return sorted({int(match[1]) for match in map(pattern.fullmatch, files) if match})


def _check_same_seeds(arms: Mapping[str, ArmEntry]) -> None:
    """An arm with fewer checkpoints than others has a training that is not finished, or a file lost."""
    weights = {name: entry.weights for name, entry in arms.items()}
    found = {
        name: ", ".join(map(str, _seeds_on_disk(path)))
        for name, path in weights.items()
        if isinstance(path, str) and SEED in path
    }
    for name, seeds in found.items():
        other = next(iter(found))
        if seeds != found[other]:
            _refuse(
                f"arms.{name}.weights",
                f"there are files of {SEED} {seeds}, but {found[other]} of arms.{other}; finish the missing "
                "trainings, or give lists of paths",
            )


def _target(key: str, name: str, entry: TargetEntry, task: DownstreamTask) -> Target:
    path = find_config(entry.config)
    _existing(f"{key}.config", path)
    try:
        digest = task.digest(path)
    except Exception as error:  # whatever the file's content leads to
        _refuse(f"{key}.config", f"{entry.config} is no config file: {one_line(error)}")
    return Target(name, path, digest, _opts(f"{key}.opts", entry.opts, task.set_by_the_study))


def _evaluations(entries: Mapping[str, list] | None, task: DownstreamTask) -> dict[str, tuple[str, ...]]:
    result: dict[str, tuple[str, ...]] = {}
    refused = dict(task.set_by_the_study)
    for key, name, entry in _named("evaluations", entries) if entries is not None else ():
        result[name] = _opts(key, entry, refused)
        refused |= dict.fromkeys(result[name][::2], key)  # all run in one process: one value for each key
    return result


def _selection(entry: SelectionEntry, task: DownstreamTask, seeds: tuple[int, ...]) -> Selection:
    return Selection(
        seeds[:SELECTION_SEEDS] if entry.seeds is None else _seeds("selection.seeds", entry.seeds),
        _opts("selection.opts", entry.opts, {**task.set_by_the_study, **task.set_by_the_selection}),
    )


def _check_resources(resources: Resources) -> None:
    _check_whole("resources.cpus", resources.cpus, least=1)
    _check_number("resources.gpus", resources.gpus, zero=True)
    if resources.gpus > 1 and not resources.gpus.is_integer():
        _refuse("resources.gpus", f"{resources.gpus} is neither a whole number of GPUs nor a fraction of one")


def _check_baselines(study: Study) -> None:
    names = [arm.name for arm in study.arms]
    given = {f"arms.{arm.name}.baseline": arm.baseline for arm in study.arms if arm.baseline is not None}
    given = {"baseline": study.baseline, **given}
    for key, baseline in given.items():
        if baseline not in names:
            _refuse(key, f"{baseline!r} is not an arm; arms are {', '.join(names)}")
    for key, baseline in given.items():
        if (other := study.baseline_of(baseline)) != baseline:
            way_out = f"give arms.{baseline}.baseline: {baseline}"
            _refuse(key, f"{baseline} itself is compared with {other}: {way_out}")


def _named(key: str, entries: Mapping[str, Any]) -> Iterator[tuple[str, str, Any]]:
    """(full key, name, entry) of at least one entry. Each name must be able to name a folder."""
    if not entries:
        _refuse(key, "give at least one, as NAME: ...")
    for name, entry in entries.items():
        if not _SAFE_NAME.fullmatch(name):
            rule = "use only letters, digits, '.', '_' and '-', and start with a letter or digit"
            _refuse(key, f"the name {name!r} becomes a folder: {rule}")
        yield f"{key}.{name}", name, entry


def _existing(key: str, path: str) -> Path | None:
    """The file at ``path``, which must exist. None for a path with a scheme, such as ``robust://``."""
    if not path:
        _refuse(key, "give a path")
    if "://" in path:
        return None
    file = Path(path.split("?")[0])  # Detectron2 takes options after a '?'
    if not file.is_file():
        _refuse(key, f"no file {path} (paths are relative to the current directory)")
    return file


def _opts(key: str, value: list[Any] | None, refused: Mapping[str, str]) -> tuple[str, ...]:
    """``[KEY, VALUE, ...]`` as the tools' command lines take it. ``refused``: key -> what sets it instead."""
    value = value or []
    if len(value) % 2 or not all(isinstance(name, str) for name in value[::2]):
        _refuse(key, f"give pairs [KEY, VALUE, ...], got {value!r}")
    for name in value[::2]:
        if name in refused:
            _refuse(key, f"{name} is set by {refused[name]}")
    return tuple(map(str, value))


def _seeds(key: str, values: list[int]) -> tuple[int, ...]:
    for value in values:
        # Detectron2 takes a negative SEED as "a random one", which no second run could repeat.
        _check_whole(key, value)
    return _distinct(key, values)


def _distinct(key: str, values: list) -> tuple:
    if not values:
        _refuse(key, "give at least one number")
    for value in values:
        if values.count(value) > 1:
            _refuse(key, f"{value} is given twice")
    return tuple(values)


def _check_number(key: str, value: float, zero: bool = False) -> None:
    if not math.isfinite(value) or value < 0 or (value == 0 and not zero):
        _refuse(key, f"{value!r} is not {'0 or ' if zero else ''}a positive number")


def _check_whole(key: str, value: int, least: int = 0) -> None:
    if not least <= value < 2**31:
        _refuse(key, f"{value!r} is not a whole number from {least} to 2147483647")


def _refuse(key: str, reason: str) -> NoReturn:
    raise InputError(f"{key}: {reason}")
