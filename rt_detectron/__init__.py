"""Adversarially robust backbones for Detectron2.

Importing this registers the backbone builders and the ``robust://`` paths; nothing else happens.
"""

from detectron2.utils.file_io import PathManager

from rt_detectron.checkpoint import zoo
from rt_detectron.modeling import load_backbone, load_classifier  # also registers the backbone builders
from rt_detectron.utils.versions import VERSION

__all__ = ["load_backbone", "load_classifier", "zoo"]
__version__ = VERSION

PathManager.register_handler(zoo.RobustPathHandler(), allow_override=True)
