"""Every tool imports this first: one line if a package is missing, and no warnings of other packages.

This is no tool. It uses the standard library alone until it knows that the packages are there.
"""

import sys
from importlib.util import find_spec

missing = [name for name in ("torch", "detectron2", "rt_detectron") if find_spec(name) is None]
if missing:
    print(
        f"error: {sys.executable} has no {', no '.join(missing)}: in a clone run `make setup`, then "
        "`. .venv/bin/activate`; docs/install.md tells how to install into an environment of your own",
        file=sys.stderr,
    )
    sys.exit(2)

from rt_detectron.utils.remarks import ignore_remarks  # noqa: E402

ignore_remarks()
