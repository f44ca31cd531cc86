"""Adversarially robust backbones for Detectron2.

Importing this registers the backbone builders and the ``robust://`` paths; nothing else happens.
"""

from detectron2.utils.file_io import PathManager

from rt_detectron import modeling  # noqa: F401  (registers the backbone builders)
from rt_detectron.checkpoint.zoo import RobustPathHandler

PathManager.register_handler(RobustPathHandler(), allow_override=True)

__version__ = "0.1.0"
