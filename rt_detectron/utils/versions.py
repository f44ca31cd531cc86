"""What a result was made with."""

import platform
from importlib import metadata

VERSION = "0.1.0"  # of rt_detectron
PACKAGES = ("torch", "torchvision", "numpy", "pycocotools")


def versions() -> dict[str, str]:
    """Python's, ours, Detectron2's and those of the packages that numbers depend on."""
    import detectron2

    return {
        "python": platform.python_version(),
        "rt_detectron": VERSION,
        "detectron2": detectron2.__version__,
        **{name: metadata.version(name) for name in PACKAGES},
    }
