"""Tensors as addresses: the library gets no other."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

__all__ = ["SOURCES", "address"]

SOURCES: Final = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""Numbers of the dtypes that quantizers read."""


def address(tensor: Tensor, dtype: torch.dtype, count: int, what: str) -> int:
    """The address of a tensor that the library may touch ``count`` elements of, and no other."""
    if tensor.device.type != "cpu" or tensor.layout != torch.strided or not tensor.is_contiguous():
        raise ValueError(f"{what} must be contiguous and on the CPU")
    if tensor.dtype != dtype or tensor.numel() != count:
        raise ValueError(
            f"{what} must be {dtype} with {count} elements,"
            f" not {tensor.dtype} with {tensor.numel()}"
        )
    return tensor.data_ptr()
