"""Reading a study's YAML strictly: whatever is wrong is named by file and key, in one line."""

import math
import re
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any

import yaml

from rt_detectron.utils.errors import InputError, one_line

_SAFE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")  # names of arms and detectors become folders


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


def read_yaml(file: str | Path) -> Any:
    """The content of a YAML file in which no key is given twice."""
    try:
        return yaml.load(Path(file).read_text(encoding="utf-8"), _UniqueKeyLoader)
    except FileNotFoundError:
        raise InputError(f"no study file {file}: studies shipped are in configs/study/") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file} cannot be read: {error}") from None
    except yaml.YAMLError as error:
        raise InputError(f"{file} is not valid YAML: {one_line(error)}") from None


def mapping(value: Any, where: str, required: set[str] = frozenset(), optional: set[str] = frozenset()):
    """``value``, if it is a mapping with all of the required keys and none but these."""
    known = ", ".join(sorted(required | optional))
    if not isinstance(value, dict):
        raise InputError(f"{where}: give the keys {', '.join(sorted(required)) or known}, got {value!r}")
    unknown = [str(key) for key in value if key not in required | optional]
    if unknown:
        raise InputError(f"{where}: unknown key {', '.join(unknown)}; known are {known}")
    missing = sorted(required - value.keys())
    if missing:
        raise InputError(f"{where}: the key {', '.join(missing)} is missing")
    return value


def named(value: Any, where: str) -> list[tuple[str, Any, str]]:
    """Check ``{name: entry}``, at least one; gives (name, entry, where the entry stands)."""
    if not isinstance(value, dict) or not value:
        raise InputError(f"{where}: give at least one, as NAME: ..., got {value!r}")
    for name in value:
        if not isinstance(name, str) or not _SAFE_NAME.fullmatch(name):
            raise InputError(
                f"{where}: the name {name!r} becomes a folder: use letters, digits, '.', '_' and '-' only, "
                "a letter or digit first (quote a number)"
            )
    return [(name, entry, f"{where}.{name}") for name, entry in value.items()]


def text(value: Any, where: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise InputError(f"{where}: write a few words, got {value!r}")
    return value


def file(value: Any, where: str) -> str:
    """A path that must exist, unless it has a scheme, which its path handler resolves later."""
    if not isinstance(value, str) or not value:
        raise InputError(f"{where}: give a path, got {value!r}")
    if "://" not in value and not local(value).is_file():
        raise InputError(f"{where}: no file {value} (paths are relative to the current directory)")
    return value


def local(path: str) -> Path:
    return Path(path.split("?")[0])  # Detectron2 takes options behind a '?', e.g. ?matching_heuristics=True


def opts(value: Any, where: str, refused: dict[str, str]) -> tuple[str, ...]:
    """``[KEY, VALUE, ...]`` as Detectron2's command line takes it; ``refused`` says why, by key."""
    value = [] if value is None else value
    if not isinstance(value, list) or len(value) % 2 or not all(isinstance(key, str) for key in value[::2]):
        raise InputError(f"{where}: give pairs [KEY, VALUE, ...], got {value!r}")
    for key in value[::2]:
        if key in refused:
            raise InputError(f"{where}: {key} is set by {refused[key]}")
    return tuple(map(str, value))


def numbers(value: Any, where: str, convert: Callable[[Any, str], Any]) -> tuple:
    """A list of at least one number, none of them twice."""
    if not isinstance(value, list) or not value:
        raise InputError(f"{where}: give a list with at least one number, got {value!r}")
    converted = tuple(convert(number, where) for number in value)
    repeated = sorted({number for number in converted if converted.count(number) > 1})
    if repeated:
        raise InputError(f"{where}: {', '.join(map(str, repeated))} is given twice")
    return converted


def number(value: Any, where: str, zero: bool = False) -> float:
    """A finite number above 0, or from 0 on."""
    try:  # PyYAML reads 2e-2 as a string
        converted = math.nan if isinstance(value, bool) or value is None else float(value)
    except (TypeError, ValueError):
        converted = math.nan
    if not math.isfinite(converted) or converted < 0 or (converted == 0 and not zero):
        raise InputError(f"{where}: {value!r} is not {'0 or ' if zero else ''}a positive number")
    return converted


def whole(value: Any, where: str, least: int = 0) -> int:
    # Detectron2 takes a negative SEED as "a random one", which no second run could repeat.
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value < 2**31:
        raise InputError(f"{where}: {value!r} is not a whole number from {least} to 2147483647")
    return value
