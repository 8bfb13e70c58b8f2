"""The library's product as an operator of PyTorch that runs without the interpreter.

PyTorch exports C functions for operators made elsewhere (``torch/csrc/stable``); the library gets
their addresses, and needs nothing else of PyTorch. Versions that lack one of them get the operator
from Python.
"""

from __future__ import annotations

import ctypes
from typing import Final

__all__ = ["TORCH_FUNCTIONS", "implement"]

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


def implement(library: ctypes.CDLL, torch_cpu: ctypes.CDLL) -> bool:
    """Implement ``product`` and ``product_bias``, once; False where this PyTorch can't have it."""
    try:
        found = [getattr(torch_cpu, name) for name in TORCH_FUNCTIONS]
    except AttributeError:
        return False
    addresses = (ctypes.c_void_p * len(found))(
        *(ctypes.cast(function, ctypes.c_void_p) for function in found)
    )
    accepted: int = library.qm_operators(addresses)
    return accepted == 0
