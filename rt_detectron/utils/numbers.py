"""Numbers that may be undefined: NaN in memory, as Detectron2 has them, and null in JSON."""

import math
from collections.abc import Mapping
from numbers import Integral, Real
from typing import Any


def is_number(value: Any) -> bool:
    """Whether ``value`` is a finite number. An undefined AP is NaN or None, depending on who wrote it."""
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def finite(value: Any) -> Any:
    """``value`` for JSON, which has null instead of NaN, such as the AP of a class without ground truth."""
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    if isinstance(value, Real) and not isinstance(value, Integral):  # numpy's too, which json does not know
        return float(value) if math.isfinite(value) else None
    return value
