"""Evaluation of a detector on clean, attacked and corrupted images.

Importing this registers the evaluations. Their order is that of robustness.json and of the printed table.
"""

import importlib
import pkgutil

from rt_detectron.evaluation.robustness.evaluate import evaluate_robustness, keys_help, robustness_table
from rt_detectron.evaluation.robustness.evaluation import robustness_evaluations
from rt_detectron.evaluation.robustness.session import robustness_config

__all__ = [
    "evaluate_robustness",
    "keys_help",
    "robustness_config",
    "robustness_evaluations",
    "robustness_table",
]

# These in this order, then evaluations in new files.
for _name in ("clean", "attack", "corruption", *(module.name for module in pkgutil.iter_modules(__path__))):
    importlib.import_module(f"{__name__}.{_name}")
