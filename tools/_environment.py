"""What every tool imports first: it says in one line what this Python lacks, and keeps others' remarks quiet.

No tool itself. Standard library only, since it must run where nothing is installed.
"""

import sys
import warnings
from importlib.util import find_spec

# Remarks that packages make on each other as they are imported; a user can do nothing about them.
for message, category in (
    (r"`torch\.jit\.\w+` is (deprecated|not supported)", FutureWarning),
    (r"`torch\.jit\.\w+` is (deprecated|not supported)", DeprecationWarning),
    (r"pkg_resources is deprecated", UserWarning),
    (r"Deprecated call to .pkg_resources", DeprecationWarning),
    (r"The image decoding and encoding capabilities of TorchVision", DeprecationWarning),
):
    warnings.filterwarnings("ignore", message, category)

missing = [name for name in ("torch", "detectron2", "rt_detectron") if find_spec(name) is None]
if missing:
    print(
        f"error: {sys.executable} has no {', no '.join(missing)}: in a clone run `make setup`, then "
        "`. .venv/bin/activate`; docs/install.md tells how to install into an environment of your own",
        file=sys.stderr,
    )
    sys.exit(2)
