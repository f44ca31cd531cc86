"""Files that are whole or not there at all, made by one process, and their SHA-256."""

import hashlib
import json
import logging
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import AcquireReturnProxy, FileLock

from rt_detectron.utils.errors import InputError

logger = logging.getLogger(__name__)


@contextmanager
def replaced_atomically(path: str | os.PathLike) -> Iterator[str]:
    """Gives the path of a temporary file beside ``path``, which takes its place when the block succeeds.

    So ``path`` is at any time either the old file or the whole new one, also after a power cut, and nothing
    is left of a block that fails or is interrupted. An error of the disk names ``path``.
    """
    # The same process number exists on every host that shares a file system.
    temporary = f"{os.fspath(path)}.{os.getpid()}-{secrets.token_hex(8)}.tmp"
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if error.errno is not None and error.filename in (None, temporary):  # which nobody has heard of
            error.filename = os.fspath(path)
        raise
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


def write_json(path: str | os.PathLike, content: dict, indent: int | None = 2) -> None:
    """Write ``content``, without NaN in it, atomically."""
    with replaced_atomically(path) as temporary, open(temporary, "w") as file:
        json.dump(content, file, indent=indent, allow_nan=False)


def read_json(path: str | os.PathLike) -> dict[str, Any] | None:
    """The object in a file that we have written; None if it is not there or, with a warning, damaged."""
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
    except FileNotFoundError:
        return None
    except ValueError:
        content = None
    if not isinstance(content, dict):
        logger.warning("%s is damaged: it is made again", path)
        return None
    return content


def json_lines(path: str | os.PathLike) -> Iterator[dict[str, Any]]:
    """The objects in a file of one on each line, without what a killed process left of one.

    Raises:
        OSError: if the file cannot be read.
    """
    with open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                content = json.loads(line)
            except ValueError:
                continue
            if isinstance(content, dict):
                yield content


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write ``text`` in UTF-8 atomically."""
    with replaced_atomically(path) as temporary:
        Path(temporary).write_text(text, encoding="utf-8")


def cache_folder(kind: str) -> str:
    """The folder for files of this kind: in ``$RT_DETECTRON_CACHE``, else in ``~/.cache/rt_detectron``.

    ``$XDG_CACHE_HOME`` takes the place of ``~/.cache``. What is in it is trusted, so it is made for its owner
    alone, and one that others own or may write to is refused.

    Raises:
        InputError: for a folder that is refused, or cannot be made.
    """
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    root = os.environ.get("RT_DETECTRON_CACHE") or os.path.join(home, "rt_detectron")
    own = "set RT_DETECTRON_CACHE to a folder of your own"
    root = os.path.expanduser(root)
    if root.startswith("~"):
        raise InputError(f"there is no home folder for the cache {root}: set HOME, or {own}")
    root = os.path.realpath(root)
    folder = os.path.join(root, kind)
    try:
        os.makedirs(root, mode=0o700, exist_ok=True)
        status = os.stat(root)
        if status.st_uid != os.geteuid():
            raise InputError(f"the cache {root} belongs to another user: {own}")
        if status.st_mode & 0o022:
            raise InputError(f"others may write to the cache {root}: run `chmod go-w {root}`, or {own}")
        os.makedirs(folder, mode=0o700, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"cannot make the cache {folder} ({error.strerror}): set RT_DETECTRON_CACHE to a folder that can "
            "be written"
        ) from None
    return folder


def locked(path: str, way_out: str) -> AcquireReturnProxy:
    """A context in which no other process makes the file ``path``; its folder is made first.

    Raises:
        InputError: ending in ``way_out``, if the folder cannot be made or written.
    """
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        return FileLock(f"{path}.lock").acquire()
    except OSError as error:
        raise InputError(f"cannot write {path} ({error.strerror}): {way_out}") from None


def shipped(folder: str) -> Path:
    """The project's folder "configs" or "tools": in an installed package, else at the top of the clone."""
    package = Path(__file__).parents[1]
    return next(path for path in (package / folder, package.parent / folder) if path.is_dir())


def find_config(path: str) -> str:
    """``path`` if there is such a file, else the shipped config of that name, else ``path`` all the same.

    "robust_r50_eps3.yaml" and "configs/robust_r50_eps3.yaml" both name a shipped one, from any folder.
    """
    own = shipped("configs") / str(path).removeprefix("configs/")
    if os.path.isfile(path) or not own.is_file():
        return path
    logger.info("using the shipped config %s", own)
    return str(own)


def printable(name: str) -> str:
    """A file's name as text that can be written anywhere: bytes that are no UTF-8 become \\xNN."""
    return os.fsencode(name).decode(errors="backslashreplace")


def file_sha256(path: str | os.PathLike) -> str:
    """SHA-256 of a file's bytes, in hexadecimal; the file is read in pieces."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def text_sha256(text: str) -> str:
    """SHA-256 of a text in UTF-8, in hexadecimal."""
    return hashlib.sha256(text.encode()).hexdigest()
