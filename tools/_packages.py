"""One line if packages are missing. It uses the standard library alone. This is no tool."""

import sys
from importlib.util import find_spec


def require(*packages: str) -> None:
    """End the process with exit status 2 and one line if this Python lacks one of the packages."""
    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        print(
            f"error: {sys.executable} has no {', no '.join(missing)}: in a clone run `make setup`, then "
            "`. .venv/bin/activate`; docs/install.md tells how to install into an environment of your own",
            file=sys.stderr,
        )
        sys.exit(2)
