"""Adversarially robust backbones for Detectron2.

Importing this registers the backbone builders and the ``robust://`` paths; nothing else happens. Without
Detectron2 only the rooms that read files can be used, such as ``rt_detectron.study``.
"""

import warnings

from rt_detectron.utils.remarks import ignore_remarks
from rt_detectron.utils.versions import VERSION

__all__ = ["load_backbone", "load_classifier", "zoo"]
__version__ = VERSION

try:
    with warnings.catch_warnings():
        ignore_remarks()
        import detectron2.modeling  # noqa: F401
except ModuleNotFoundError as error:
    if error.name not in ("detectron2", "detectron2.modeling", "torch"):
        raise

    def __getattr__(name: str) -> None:
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        raise ModuleNotFoundError(
            "rt_detectron needs Detectron2, which is on no package index: docs/install.md tells how to get "
            "it, and `make setup` in a clone of rt_detectron does it",
            name="detectron2",
        )

else:
    from detectron2.utils.file_io import PathManager

    from rt_detectron.checkpoint import zoo
    from rt_detectron.modeling import load_backbone, load_classifier  # also registers the backbone builders

    PathManager.register_handler(zoo.RobustPathHandler(), allow_override=True)
