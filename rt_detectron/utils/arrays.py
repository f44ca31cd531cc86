"""Files of named arrays (.npz)."""

import os
from collections.abc import Mapping

import numpy as np

from rt_detectron.utils.errors import InputError
from rt_detectron.utils.files import printable, replaced_atomically


def write_arrays(path: str | os.PathLike, arrays: Mapping[str, np.ndarray], compressed: bool = False) -> None:
    """Write ``arrays`` atomically."""
    save = np.savez_compressed if compressed else np.savez
    with replaced_atomically(path) as temporary, open(temporary, "wb") as file:
        save(file, allow_pickle=False, **arrays)


def read_arrays(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """All arrays of a file.

    Raises:
        OSError: the file cannot be opened.
        InputError: it is damaged. The caller adds the way out.
    """
    with open(path, "rb") as file:
        try:
            with np.load(file, allow_pickle=False) as arrays:
                return {name: arrays[name] for name in arrays.files}
        except Exception as error:  # damaged files fail in every way there is
            raise InputError(f"{printable(os.fspath(path))} is damaged ({type(error).__name__})") from None
