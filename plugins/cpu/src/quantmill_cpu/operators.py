"""The library's products as operators of PyTorch that run without the interpreter.

PyTorch exports C functions for operators made elsewhere (``torch/csrc/stable``); the library gets
their addresses, and needs nothing else of PyTorch. Versions that lack one of them get the operators
from Python, by those who call them.
"""

from __future__ import annotations

import contextlib
import ctypes
from functools import cache
from pathlib import Path
from typing import Final

import torch

from quantmill_cpu.native import library

__all__ = ["NATIVE", "OPERATORS", "TORCH_FUNCTIONS", "implement", "torch_library"]

TORCH_FUNCTIONS: Final = (
    "aoti_torch_library_init_impl",
    "aoti_torch_library_impl",
    "aoti_torch_delete_tensor_object",
    "aoti_torch_get_data_ptr",
    "aoti_torch_get_dim",
    "aoti_torch_get_sizes",
    "aoti_torch_get_strides",
    "aoti_torch_get_dtype",
    "aoti_torch_empty_strided",
    "torch_get_num_threads",
)
"""In the order of ``c/operator.c``."""


@cache
def torch_library() -> ctypes.CDLL:
    """The library, with PyTorch's threads: those spin for a while after each of its operations,
    and threads of our own would get half of the processors meanwhile."""
    found = library()
    with contextlib.suppress(OSError, AttributeError):
        found.qm_borrow_threads(ctypes.cast(_torch_cpu().GOMP_parallel, ctypes.c_void_p))
    return found


@cache
def _torch_cpu() -> ctypes.CDLL:
    return ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))


def implement(library: ctypes.CDLL, torch_cpu: ctypes.CDLL) -> bool:
    """Implement the operators natively, once; False where this PyTorch can't have them."""
    try:
        found = [getattr(torch_cpu, name) for name in TORCH_FUNCTIONS]
    except AttributeError:
        return False
    addresses = (ctypes.c_void_p * len(found))(
        *(ctypes.cast(function, ctypes.c_void_p) for function in found)
    )
    accepted: int = library.qm_operators(addresses)
    return accepted == 0


def _native() -> bool:
    try:
        return implement(torch_library(), _torch_cpu())
    except OSError:
        return False


# Not torch.library.custom_op: what that puts around a call takes longer than a small product.
OPERATORS: Final = torch.library.Library("quantmill_cpu", "DEF")
OPERATORS.define("product(Tensor x, Tensor weight, int rows, int columns) -> Tensor")
OPERATORS.define(
    "product_bias(Tensor x, Tensor weight, int rows, int columns, Tensor bias) -> Tensor"
)
OPERATORS.define("linear(Tensor x, Tensor weight) -> Tensor")
OPERATORS.define("linear_bias(Tensor x, Tensor weight, Tensor bias) -> Tensor")
NATIVE: Final = _native()
"""Whether they are implemented."""
