"""Unpicklers that run no code: one for torch's files, one for ``.pkl`` files of numpy arrays."""

import math
import pickle
import re
import types
from collections import OrderedDict
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor


def refused_name(error: Exception) -> str | None:
    """The function or class that a pickle asked for and did not get, if ``error`` is about that."""
    refused = re.search(r"GLOBAL (\S+)", str(error)) if isinstance(error, pickle.UnpicklingError) else None
    return refused[1][:120] if refused else None


class _InertType(type):
    """Its classes ignore everything that a pickle does to them: calls, state, items."""

    def __call__(cls, *args, **kwargs):
        return cls

    def _ignore(cls, *args, **kwargs) -> None:
        pass

    __setstate__ = __setitem__ = append = extend = add = _ignore


class Placeholder(metaclass=_InertType):
    """Takes the place of every object of a pickle that is neither a tensor nor a plain container.

    Pickle demands a class in some places and an object in others, so the class is its own only instance.
    """

    def __new__(cls, *args, **kwargs):
        return cls


class _Dict(dict):
    """Replaces collections.OrderedDict, without the attributes that torch adds to a state dict."""

    def __setstate__(self, state) -> None:
        pass


class _Function:
    """A function that a pickle may call, but whose attributes it cannot set."""

    __slots__ = ("_function",)

    def __init__(self, function):
        self._function = function

    def __call__(self, *args):
        return self._function(*args)

    def __setstate__(self, state) -> None:
        pass


def _tensor(storage, offset, size, stride, *_) -> Tensor:
    return torch._utils._rebuild_tensor(storage, offset, size, stride)


def _parameter(tensor, *_) -> Tensor:
    return tensor


class _Namespace(dict):
    """Replaces argparse.Namespace: settings of the training may say what the tensors do not."""

    def __setstate__(self, state) -> None:
        self.update(state)


_ALLOWED = {
    ("argparse", "Namespace"): _Namespace,  # itself, since pickles ask for a type
    ("collections", "OrderedDict"): _Function(_Dict),
    ("torch", "Size"): _Function(tuple),
    ("torch._utils", "_rebuild_tensor"): _Function(_tensor),
    ("torch._utils", "_rebuild_tensor_v2"): _Function(_tensor),
    ("torch._utils", "_rebuild_parameter"): _Function(_parameter),
    ("torch._utils", "_rebuild_parameter_with_state"): _Function(_parameter),
}


class _TensorsOnlyUnpickler(pickle.Unpickler):
    """Builds tensors and plain containers. Nothing is imported: every other name is a placeholder.

    torch.load adds the storages itself, by a table of their names, before it asks ``find_class``.
    """

    def find_class(self, module: str, name: str):
        return _ALLOWED.get((module, name), Placeholder)


# What torch.load takes as its pickle module.
tensors_only = types.SimpleNamespace(
    __name__="tensors_only",
    Unpickler=_TensorsOnlyUnpickler,
    load=lambda file, **kwargs: _TensorsOnlyUnpickler(file, **kwargs).load(),
)


class _Array(np.ndarray):
    """An array that asks its unpickler for memory before it takes it."""

    _unpickler: "ArraysOnlyUnpickler"

    def __setstate__(self, state) -> None:
        _, shape, dtype, _, _ = state
        self._unpickler.spend(math.prod(shape) * dtype.itemsize)
        super().__setstate__(state)
        del self._unpickler


def _plain(value, done: dict[int, object]):
    """``value`` with numpy's own arrays, also in the containers that it consists of."""
    if isinstance(value, _Array):
        return value.view(np.ndarray)
    if not isinstance(value, dict | list | tuple) or id(value) in done:
        return done.get(id(value), value)
    done[id(value)] = value  # containers may hold themselves
    if isinstance(value, dict):
        value.update({key: _plain(item, done) for key, item in value.items()})
    elif isinstance(value, list):
        value[:] = [_plain(item, done) for item in value]
    else:
        done[id(value)] = tuple([_plain(item, done) for item in value])
    return done[id(value)]


# Asked of numpy, since their module depends on its version.
_SCALAR: Any = np.float32(0).__reduce__()[0]
_FROM_BUFFER: Any = np.zeros(1).__reduce_ex__(5)[0]


class ArraysOnlyUnpickler(pickle.Unpickler):
    """Builds numpy arrays and plain containers, and refuses a file that asks for anything else.

    Unlike a training checkpoint, a ``.pkl`` of weights has no reason to hold more. Nor to become larger:
    a few bytes may ask for an empty array of any size, or for the same data again and again.

    Args:
        file: opened in binary mode.
        memory: the arrays and byte strings together may have so many bytes.

    Raises:
        pickle.UnpicklingError: from ``load``, as torch.load does for a name that it refuses.
    """

    def __init__(self, file: BinaryIO, memory: int):
        super().__init__(file, encoding="latin1")  # latin1: for Python 2's files
        self._left = memory
        self._allowed = {
            ("collections", "OrderedDict"): _Function(OrderedDict),
            ("_codecs", "encode"): _Function(self._encode),
            ("numpy", "ndarray"): None,  # only ever the first argument of _reconstruct
            ("numpy", "dtype"): _Function(np.dtype),
        }
        for core in ("numpy.core", "numpy._core"):  # before and from numpy 2 on
            self._allowed |= {
                (f"{core}.multiarray", "_reconstruct"): _Function(self._array),
                (f"{core}.multiarray", "scalar"): _Function(self._scalar),
                (f"{core}.numeric", "_frombuffer"): _Function(_FROM_BUFFER),
            }

    def load(self):
        return _plain(super().load(), {})

    def find_class(self, module: str, name: str):
        try:
            return self._allowed[module, name]
        except KeyError:
            # In torch's words, for `refused_name`; without blanks and line ends, which a pickle may
            # smuggle in.
            raise pickle.UnpicklingError(f"GLOBAL {re.sub(r'[^!-~]', '?', f'{module}.{name}')}") from None

    def spend(self, num_bytes: int) -> None:
        self._left -= num_bytes
        if not 0 <= num_bytes <= num_bytes + self._left:
            raise pickle.UnpicklingError("it asks for far more memory than it has bytes")

    def _array(self, *_) -> _Array:
        array = np.ndarray.__new__(_Array, 0)  # empty, as numpy's own pickles begin it
        array._unpickler = self
        return array

    def _scalar(self, dtype: np.dtype, data: bytes) -> np.generic:
        return _SCALAR(dtype, data)

    def _encode(self, text: str, encoding: str) -> bytes:
        """Replaces _codecs.encode, by which pickle protocol 2 writes bytes."""
        if not isinstance(text, str) or encoding != "latin1":
            raise pickle.UnpicklingError("bytes in an unknown spelling")
        self.spend(len(text))
        return text.encode("latin1")
