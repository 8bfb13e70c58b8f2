"""Launches of a kernel: by Triton the first time, and from then on without its binder.

Triton looks at every argument of every call to find the compiled kernel, and ours have fifty: that
takes longer than the kernel of one token. Which one it is follows from the dtypes of tensors, the
alignment of their addresses and the values of integers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

__all__ = ["Launch", "on_its_device"]

_P = ParamSpec("_P")
_R = TypeVar("_R")

_ALIGNED = 16
"""Bytes: Triton compiles a kernel of its own for addresses that are no multiple."""

_KNOWN = 1024
"""Most launches that are remembered; more are made of a stream of prompts with odd strides only."""


class Launch:
    """A kernel with the same grid, constants and options each time, on one device."""

    __slots__ = ("_constants", "_grid", "_kernel", "_known", "_options")

    def __init__(
        self,
        kernel: Any,
        grid: tuple[int, int, int],
        constants: Mapping[str, Any],
        options: Mapping[str, Any],
    ) -> None:
        """``constants`` are all of the kernel's, in any order."""
        self._kernel, self._grid = kernel, grid
        self._constants, self._options = constants, options
        self._known: dict[Any, tuple[Callable[..., Any], tuple[Any, ...]]] = {}

    def __call__(
        self,
        tensors: tuple[Tensor, ...],
        numbers: tuple[int | float, ...],
        descriptors: tuple[Any, ...] = (),
    ) -> None:
        """Launch with the kernel's first arguments: ``descriptors`` of tensors, whose blocks and
        layouts are always the same and whose dtypes follow from others', ``tensors`` and numbers.
        """
        addresses = 0
        for tensor in tensors:
            addresses |= tensor.data_ptr()
        if addresses % _ALIGNED:
            self._by_triton(*descriptors, *tensors, *numbers)
            return
        key = (numbers, *[tensor.dtype for tensor in tensors])
        known = self._known.get(key)
        if known is not None:
            run, constants = known
            run(*descriptors, *tensors, *numbers, *constants)
            return
        compiled = self._by_triton(*descriptors, *tensors, *numbers)
        if compiled is not None:  # None where kernels are interpreted.
            if len(self._known) == _KNOWN:
                self._known.clear()
            given = len(descriptors) + len(tensors) + len(numbers)
            names = self._kernel.arg_names[given:]
            constants = tuple(self._constants[name] for name in names)
            self._known[key] = compiled[self._grid], constants

    def _by_triton(self, *arguments: Any) -> Any:
        return self._kernel[self._grid](*arguments, **self._constants, **self._options)


def on_its_device(operator: Callable[_P, _R]) -> Callable[_P, _R]:
    """An operator whose kernels run on the device of its first argument.

    Triton launches on the current device, which is another one where the layers of a model are
    spread over several.
    """

    @wraps(operator)
    def run(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        first: Any = args[0]
        if first.is_cuda and first.device.index != torch.cuda.current_device():
            with torch.cuda.device(first.device):
                return operator(*args, **kwargs)
        return operator(*args, **kwargs)

    return run
