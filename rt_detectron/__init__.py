"""Adversarially robust backbones for Detectron2.

Importing this registers the backbone builders and the ``robust://`` paths; nothing else happens.
"""

import warnings

from rt_detectron.utils.remarks import ignore_remarks

try:
    with warnings.catch_warnings():
        ignore_remarks()
        import detectron2.modeling  # noqa: F401
except ModuleNotFoundError as error:
    if error.name not in ("detectron2", "detectron2.modeling"):
        raise
    raise ModuleNotFoundError(
        "rt_detectron needs Detectron2, which is on no package index: docs/install.md tells how to get it, "
        "and `make setup` in a clone of rt_detectron does it",
        name="detectron2",
    ) from None

from detectron2.utils.file_io import PathManager

from rt_detectron.checkpoint import zoo
from rt_detectron.modeling import load_backbone, load_classifier  # also registers the backbone builders
from rt_detectron.utils.versions import VERSION

__all__ = ["load_backbone", "load_classifier", "zoo"]
__version__ = VERSION

PathManager.register_handler(zoo.RobustPathHandler(), allow_override=True)
