"""A stand-in for an accelerator that finds out where the host would wait for it.

Its tensors say that they are on the device "meta", but have numbers, in ordinary memory. So whole steps run
on it, also through code that chooses by values, as Detectron2's does. What would make the host wait for a GPU
is noted with the line that asked for it: what torch.cuda.set_sync_debug_mode tells of on a real one. What
would fail on a GPU, an operation on tensors of two devices, fails.
"""

import contextlib
import sys
from pathlib import Path
from unittest import mock

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = torch.device("meta")
PACKAGE = Path(__file__).parents[2] / "rt_detectron"
BACKWARD = " (a backward pass)"
# They give a number to Python, or a tensor whose size depends on values.
READING = {
    "_local_scalar_dense", "_unique2", "bincount", "equal", "is_nonzero", "masked_select", "nms", "nonzero",
    "unique_consecutive", "unique_dim",
}  # fmt: skip
COPYING = {"_to_copy", "copy_"}
INDEXING = {"_index_put_impl_", "index", "index_put", "index_put_"}


class _Tensor(torch.Tensor):
    """A tensor on the stand-in."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, numbers: torch.Tensor):
        return torch.Tensor._make_wrapper_subclass(
            cls, numbers.shape, numbers.stride(), numbers.storage_offset(), dtype=numbers.dtype, device=DEVICE
        )

    def __init__(self, numbers: torch.Tensor):
        self.numbers = numbers

    def __repr__(self):
        return f"on the accelerator: {self.numbers!r}"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return Accelerator.current(func, types, args, kwargs)

    # What return_and_correct_aliasing asks of a wrapper.
    def __tensor_flatten__(self):
        return ["numbers"], None

    @staticmethod
    def __tensor_unflatten__(inner, *_):
        return _Tensor(inner["numbers"])


class Accelerator(TorchDispatchMode):
    """Within ``with Accelerator() as accelerator:`` there is one.

    Attributes:
        waits: for each time that the host would wait, "operation, FILE:LINE", the line being the innermost
            one outside torch; "(a backward pass)" behind it, if that line only began one.
    """

    current: "Accelerator"

    def __init__(self):
        super().__init__()
        self.waits: list[str] = []
        self._stack = contextlib.ExitStack()

    def __enter__(self):
        Accelerator.current = self
        generator = torch.Generator
        for name, stand_in in {
            "autocast": lambda *_, **__: contextlib.nullcontext(),  # there is none for "meta"
            "Generator": lambda device="cpu": generator(),
        }.items():
            self._stack.enter_context(mock.patch.object(torch, name, stand_in))
        return super().__enter__()

    def __exit__(self, *error):
        self._stack.close()
        return super().__exit__(*error)

    @property
    def own_waits(self) -> list[str]:
        """Those that this package asks for, and not Detectron2 or torchvision."""
        return [wait for wait in self.waits if str(PACKAGE) in wait and not wait.endswith(BACKWARD)]

    def put(self, module: nn.Module) -> nn.Module:
        """``module``, in place, on the stand-in. Module.to would leave it without numbers."""
        moved: dict[int, torch.Tensor] = {}
        for part in module.modules():
            for tensors in (part._parameters, part._buffers):
                for name, tensor in tensors.items():
                    if tensor is None:
                        continue
                    if id(tensor) not in moved:
                        new = _Tensor(tensor.detach())
                        is_parameter = isinstance(tensor, nn.Parameter)
                        moved[id(tensor)] = nn.Parameter(new, tensor.requires_grad) if is_parameter else new
                    tensors[name] = moved[id(tensor)]
        return module

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func._schema.name.split("::")[1]
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        ours = [tensor for tensor in tensors if isinstance(tensor, _Tensor)]
        target = kwargs.get("device")
        is_ours = bool(ours) if target is None else torch.device(target).type == DEVICE.type
        if name == "copy_":
            is_ours = isinstance(args[0], _Tensor)
        if name in COPYING:
            non_blocking = kwargs.get("non_blocking", len(args) > 2 and args[2])
            source = args[0] if name == "_to_copy" else args[1]
            if isinstance(source, _Tensor) != is_ours and not non_blocking:
                self._note(f"{name} to the {'accelerator' if is_ours else 'host'}")
        elif ours and name in READING:
            self._note(name)
        elif ours and name in INDEXING:
            indices = [index for index in args[1] if index is not None]
            masks = [index for index in indices if index.dtype in (torch.bool, torch.uint8)]
            is_fill = name != "index" and args[2].numel() == 1 and not isinstance(args[2], _Tensor)
            if masks and not is_fill:
                self._note(f"{name} by a mask")
            if any(not isinstance(index, _Tensor) for index in indices):
                self._note(f"{name} by indices of the host")
        elif ours and any(tensor.dim() and not isinstance(tensor, _Tensor) for tensor in tensors):
            raise RuntimeError(f"{func}: tensors of two devices")
        result = func(*tree_map(_numbers, args), **tree_map(_numbers, {**kwargs, **_on_host(kwargs)}))
        if not is_ours:
            return result
        result = tree_map(lambda x: _Tensor(x) if isinstance(x, torch.Tensor) else x, result)
        return return_and_correct_aliasing(func, args, kwargs, result)

    def _note(self, what: str) -> None:
        frame, where = sys._getframe(1), ""
        torch_files = (str(Path(torch.__file__).parent), __file__)
        while frame.f_back is not None and frame.f_code.co_filename.startswith(torch_files):
            if frame.f_code.co_name == "_engine_run_backward":
                where = BACKWARD
            frame = frame.f_back
        self.waits.append(f"{what}, {frame.f_code.co_filename}:{frame.f_lineno}{where}")


def _numbers(x):
    return x.numbers if isinstance(x, _Tensor) else x


def _on_host(kwargs: dict) -> dict:
    return {"device": torch.device("cpu")} if kwargs.get("device") is not None else {}
