"""The one error that is the user's to fix, and how a tool shows it."""

import sys
from contextlib import contextmanager


class InputError(ValueError):
    """Something the user gave is wrong. The message is one line and names the way out."""


@contextmanager
def one_line_errors():
    """Wrap a tool's main(): an :class:`InputError` ends the process with its message and exit status 2.

    Everything else keeps its traceback, since it is ours to fix.
    """
    try:
        yield
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
