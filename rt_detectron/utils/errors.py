"""The one error that is the user's to fix, and how a tool shows it."""

import difflib
import errno
import importlib
import logging
import os
import select
import sys
from collections.abc import Iterable
from contextlib import contextmanager
from types import ModuleType

# Of a disk that is full, broken or cannot be written: errors of writing to an open file name no file.
_OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.ENOLCK)


class InputError(ValueError):
    """Something the user gave is wrong. The message is one line and names the way out."""


def one_line(error: Exception) -> str:
    """The text of another library's error, as part of a one-line message; its type if it has none."""
    return " ".join(str(error).split()) or type(error).__name__


def did_you_mean(name: object, known: Iterable[str]) -> str:
    """``; did you mean a or b?`` with the known names nearest to a wrong one, to go behind it; else ""."""
    near = difflib.get_close_matches(str(name), list(known), n=3)
    return f"; did you mean {' or '.join(near)}?" if near else ""


def optional_import(module: str, packages: str, purpose: str) -> ModuleType:
    """A module of a package that only some users need.

    Args:
        module: its name, such as "sklearn.linear_model".
        packages: what pip installs it by, such as "scikit-learn>=1.3"; several have blanks between them.
        purpose: what needs it, such as "timm networks"; begins the message.

    Raises:
        InputError: if it is missing or does not import, with the command that installs it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        # Not by our extras: no package index has rt_detectron, and anybody could publish under that name.
        reason = "" if (error.name or "").split(".")[0] == module.split(".")[0] else f" ({one_line(error)})"
        quoted = " ".join(f'"{package}"' for package in packages.split())
        raise InputError(
            f"{purpose}: {packages.split()[0]} is missing{reason}; run: pip install {quoted}"
        ) from None


@contextmanager
def building(what: str, keys: str):
    """Within this, errors of libraries that are told what to build become one line.

    A configuration may hold anything, and each library refuses values that it cannot take in its own way,
    often deep within. Theirs is the cause of ours, so that a traceback shows both.

    Args:
        what: is built, such as "the detector".
        keys: of the configuration that describe it, such as "MODEL".

    Raises:
        InputError: in place of another error.
    """
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # each library refuses in its own way
        reason = f"{type(error).__name__}: {one_line(error)[:200]}"
        raise InputError(f"cannot build {what} ({reason}): check {keys} in the configuration") from error


@contextmanager
def one_line_errors():
    """Wrap a tool's main(): an :class:`InputError` ends the process with its message and exit status 2.

    So does one from a data loader's worker or a launched process, which arrives as the text of its
    traceback, and an error of the file system that names a file or is of the disk. Ctrl-C ends it with status
    130, and a reader that closes the pipe, such as ``head``, with 141 and without a word. Everything else
    keeps its traceback, since it is ours to fix.
    """
    try:
        with no_traceback_of_input_errors():
            try:
                yield
            except SystemExit:
                sys.stdout.flush()  # else a closed pipe shows only when Python ends
                raise
            sys.stdout.flush()
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        raise SystemExit(130) from None
    except BrokenPipeError:
        if not _output_is_closed():
            raise
        raise SystemExit(141) from None
    except Exception as error:
        message = _message(error)
        if message is None:
            raise
        print(f"error: {message}", file=sys.stderr)
        raise SystemExit(2) from None


@contextmanager
def no_traceback_of_input_errors():
    """Within this, Detectron2's trainer logs no traceback of what is shown as one line."""
    trainer = logging.getLogger("detectron2.engine.train_loop")
    trainer.addFilter(_is_no_input_error)
    try:
        yield
    finally:
        trainer.removeFilter(_is_no_input_error)


def _output_is_closed() -> bool:
    """Whether nobody reads the standard output any more. What is left of it then goes nowhere."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), select.POLLOUT)
    if not any(event & select.POLLERR for _, event in poll.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return True


def _message(error: Exception) -> str | None:
    """The user's line of ``error``; None if it is neither an :class:`InputError`, perhaps of another process,
    nor an error of the file system that names a file or is of the disk."""
    if isinstance(error, OSError) and error.strerror:
        if isinstance(error.filename, str):
            return f"{error.filename}: {error.strerror}"
        if error.errno in _OF_THE_DISK:
            return f"a file cannot be read, written or locked: {error.strerror}"
    lines = str(error).strip().splitlines() or [""]
    before, raised, message = lines[-1].partition(f"{InputError.__module__}.{InputError.__name__}: ")
    if raised and not before:
        return message
    return " ".join(lines) if isinstance(error, InputError) else None


def _is_no_input_error(record: logging.LogRecord) -> bool:
    # Detectron2 raises a FloatingPointError where a training diverges.
    return not (record.exc_info and isinstance(record.exc_info[1], InputError | FloatingPointError))
