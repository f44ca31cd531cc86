"""A study: arms (backbones) x detectors x learning rates x seeds, read from a YAML file."""

import hashlib
import math
import re
from collections.abc import Hashable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from rt_detectron.errors import InputError, one_line
from rt_detectron.files import file_sha256

_SAFE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")  # names of arms and detectors become folders
_BASE_CONFIG = re.compile(r"""^_BASE_:\s*["']?([^"'#\n]+?)["']?\s*(?:#.*)?$""", re.MULTILINE)
_SET_BY_THE_GRID = ("OUTPUT_DIR", "MODEL.WEIGHTS", "SOLVER.BASE_LR", "SEED")
_STUDY_KEYS = {"name", "baseline", "arms", "detectors", "learning_rates", "seeds"}


@dataclass(frozen=True)
class Arm:
    """What is compared: a backbone's weights, and config keys that go with them."""

    name: str
    weights: str
    opts: tuple[str, ...]


@dataclass(frozen=True)
class Detector:
    """A Detectron2 config file, and config keys that go with it."""

    name: str
    config: str
    opts: tuple[str, ...]


@dataclass(frozen=True)
class Trial:
    """One training run. Its fields decide its result: they are what trial.json records."""

    arm: str
    detector: str
    learning_rate: float
    seed: int
    config: str
    config_sha256: str  # of the file and of every _BASE_ file under it
    weights: str
    weights_sha256: str | None  # None for weights behind a scheme, such as detectron2://
    opts: tuple[str, ...]

    @property
    def name(self) -> str:
        """``arm/detector/lr0.02/seed1``: unique in the study, and the trial's folder under trials/."""
        return f"{self.arm}/{self.detector}/lr{self.learning_rate!r}/seed{self.seed}"

    def specification(self) -> dict[str, Any]:
        """The trial as JSON gives it back."""
        return {**asdict(self), "opts": list(self.opts)}

    def command(self, python: str, train_net: str, output_dir: str) -> list[str]:
        """The process that runs this trial, resuming what ``output_dir`` already holds."""
        return [
            *(python, train_net, "--config-file", self.config, "--resume", *self.opts),
            *("OUTPUT_DIR", output_dir, "MODEL.WEIGHTS", self.weights),
            *("SOLVER.BASE_LR", repr(self.learning_rate), "SEED", str(self.seed)),
        ]


@dataclass(frozen=True)
class Study:
    """The whole grid. ``baseline`` is the name of the arm that the others are compared with."""

    name: str
    baseline: str
    arms: tuple[Arm, ...]
    detectors: tuple[Detector, ...]
    learning_rates: tuple[float, ...]
    seeds: tuple[int, ...]
    opts: tuple[str, ...]

    def trials(self) -> list[Trial]:
        """All trials, seed by seed and the arms next to each other: an unfinished study compares early."""
        weights_sha256 = {arm.name: _weights_sha256(arm.weights) for arm in self.arms}
        config_sha256 = {detector.name: _config_sha256(detector.config) for detector in self.detectors}
        return [
            Trial(
                arm=arm.name,
                detector=detector.name,
                learning_rate=learning_rate,
                seed=seed,
                config=detector.config,
                config_sha256=config_sha256[detector.name],
                weights=arm.weights,
                weights_sha256=weights_sha256[arm.name],
                opts=self.opts + detector.opts + arm.opts,
            )
            for seed in self.seeds
            for detector in self.detectors
            for learning_rate in self.learning_rates
            for arm in self.arms
        ]


def load_study(file: str | Path) -> Study:
    """Read and check a study file; paths in it are relative to the current directory.

    Raises:
        InputError: naming the file and the key that is wrong.
    """
    study = _mapping(_read_yaml(file), f"{file}", required=_STUDY_KEYS, optional={"opts"})
    if not isinstance(study["name"], str) or not study["name"].strip():
        raise InputError(f"{file}: name: write a few words, got {study['name']!r}")
    arms = tuple(
        Arm(name, _file(arm["weights"], f"{where}.weights"), _opts(arm.get("opts"), f"{where}.opts"))
        for name, arm, where in _named(study["arms"], f"{file}: arms", required={"weights"})
    )
    detectors = tuple(
        Detector(name, _file(entry["config"], f"{where}.config"), _opts(entry.get("opts"), f"{where}.opts"))
        for name, entry, where in _named(study["detectors"], f"{file}: detectors", required={"config"})
    )
    names = [arm.name for arm in arms]
    if study["baseline"] not in names:
        raise InputError(
            f"{file}: baseline: {study['baseline']!r} is not an arm; arms are {', '.join(names)}"
        )
    return Study(
        name=study["name"],
        baseline=study["baseline"],
        arms=arms,
        detectors=detectors,
        learning_rates=_numbers(study["learning_rates"], f"{file}: learning_rates", _learning_rate),
        seeds=_numbers(study["seeds"], f"{file}: seeds", _seed),
        opts=_opts(study.get("opts"), f"{file}: opts"),
    )


class _UniqueKeyLoader(yaml.SafeLoader):
    """PyYAML keeps the last of two equal keys silently; here an arm would vanish from the study."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} is given twice", node.start_mark
                )
        return super().construct_mapping(node, deep)


def _read_yaml(file: str | Path) -> Any:
    try:
        return yaml.load(Path(file).read_text(encoding="utf-8"), _UniqueKeyLoader)
    except FileNotFoundError:
        raise InputError(f"no study file {file}: studies shipped are in configs/study/") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file} cannot be read: {error}") from None
    except yaml.YAMLError as error:
        raise InputError(f"{file} is not valid YAML: {one_line(error)}") from None


def _mapping(value: Any, where: str, required: set[str], optional: set[str]) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise InputError(f"{where}: give the keys {', '.join(sorted(required))}, got {value!r}")
    unknown = [str(key) for key in value if key not in required | optional]
    if unknown:
        known = ", ".join(sorted(required | optional))
        raise InputError(f"{where}: unknown key {', '.join(unknown)}; known are {known}")
    missing = sorted(required - value.keys())
    if missing:
        raise InputError(f"{where}: the key {', '.join(missing)} is missing")
    return value


def _named(value: Any, where: str, required: set[str]) -> list[tuple[str, dict[str, Any], str]]:
    """Check ``{name: {key: value}}``; gives (name, entry, where the entry stands)."""
    if not isinstance(value, dict) or not value:
        raise InputError(f"{where}: give at least one, as NAME: {{{', '.join(sorted(required))}: ...}}")
    for name in value:
        if not isinstance(name, str) or not _SAFE_NAME.fullmatch(name):
            raise InputError(
                f"{where}: the name {name!r} becomes a folder: use letters, digits, '.', '_' and '-' only, "
                "a letter or digit first (quote a number)"
            )
    return [
        (name, _mapping(entry, f"{where}.{name}", required, {"opts"}), f"{where}.{name}")
        for name, entry in value.items()
    ]


def _file(value: Any, where: str) -> str:
    """A path that must exist, unless it has a scheme, which its path handler resolves later."""
    if not isinstance(value, str) or not value:
        raise InputError(f"{where}: give a path, got {value!r}")
    if "://" not in value and not _local(value).is_file():
        raise InputError(f"{where}: no file {value} (paths are relative to the current directory)")
    return value


def _local(path: str) -> Path:
    return Path(path.split("?")[0])  # Detectron2 takes options behind a '?', e.g. ?matching_heuristics=True


def _opts(value: Any, where: str) -> tuple[str, ...]:
    """``[KEY, VALUE, ...]`` as Detectron2's command line takes it."""
    value = [] if value is None else value
    if not isinstance(value, list) or len(value) % 2 or not all(isinstance(key, str) for key in value[::2]):
        raise InputError(f"{where}: give pairs [KEY, VALUE, ...], got {value!r}")
    for key in value[::2]:
        if key in _SET_BY_THE_GRID:
            raise InputError(f"{where}: {key} is set by the grid (weights, learning_rates, seeds, --output)")
    return tuple(map(str, value))


def _numbers(value: Any, where: str, convert) -> tuple:
    if not isinstance(value, list) or not value:
        raise InputError(f"{where}: give a list with at least one number, got {value!r}")
    numbers = tuple(convert(number, where) for number in value)
    repeated = sorted({number for number in numbers if numbers.count(number) > 1})
    if repeated:
        raise InputError(f"{where}: {', '.join(map(str, repeated))} is given twice")
    return numbers


def _learning_rate(value: Any, where: str) -> float:
    try:  # PyYAML reads 2e-2 as a string
        number = float(value) if isinstance(value, (int, float, str)) and not isinstance(value, bool) else 0.0
    except ValueError:
        number = 0.0
    if not (number > 0 and math.isfinite(number)):
        raise InputError(f"{where}: {value!r} is not a positive number")
    return number


def _seed(value: Any, where: str) -> int:
    # Detectron2 takes a negative SEED as "a random one", which no second run could repeat.
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**31:
        raise InputError(f"{where}: {value!r} is not a whole number from 0 to 2147483647")
    return value


def _weights_sha256(weights: str) -> str | None:
    return None if "://" in weights else file_sha256(_local(weights))


def _config_sha256(config: str) -> str:
    """SHA-256 over the config file and, one after another, the ``_BASE_`` files it inherits from."""
    digests, file = [], Path(config)
    while file.is_file() and len(digests) < 20:  # a circle of _BASE_ is train_net's to report
        digests.append(file_sha256(file))
        base = _BASE_CONFIG.search(file.read_text(encoding="utf-8", errors="replace"))
        if base is None:
            break
        file = file.parent / Path(base[1]).expanduser()
    return hashlib.sha256("".join(digests).encode()).hexdigest()
