"""Which packages a tool needs. It uses the standard library alone. This is no tool."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
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


@contextmanager
def without(package: str) -> Iterator[None]:
    """Import what is inside as if ``package`` were missing, unless it is loaded already."""
    if package in sys.modules:
        yield
        return
    sys.modules[package] = None  # type: ignore[assignment]  # Python then finds no such module
    try:
        yield
    finally:
        del sys.modules[package]
