"""Files that are whole or not there at all, and their SHA-256."""

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def replaced_atomically(path: str | os.PathLike) -> Iterator[str]:
    """Gives the path of a temporary file beside ``path``, which takes its place when the block succeeds.

    So ``path`` is at any time either the old file or the whole new one, also after a power cut, and nothing
    is left of a block that fails or is interrupted.
    """
    temporary = f"{os.fspath(path)}.{os.getpid()}.tmp"
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


def file_sha256(path: str | os.PathLike) -> str:
    """SHA-256 of a file's bytes, in hexadecimal; the file is read in pieces."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
