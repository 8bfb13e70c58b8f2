"""Activations to 8-bit floats, as :mod:`quantmill.kernels` says of the operation ``activations``.

An operator of PyTorch with a fake implementation, so that compilers see one node.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor
from torch.library import register_fake

from quantmill_triton.available import interpreted
from quantmill_triton.launches import Launch, on_its_device
from quantmill_triton.ops import LIBRARY

__all__ = ["activations"]

_TOP = 448.0
_LEAST = 1e-12
_ROW = 8192
"""Columns that a program holds at once."""
_PIECE = 2048
"""Columns of a program where blocks of them have scales of their own."""

LIBRARY.define("activations(Tensor x, int size, float bound, int rows) -> (Tensor, Tensor)")


def activations(
    x: Tensor, *, size: int | None = None, bound: float | None = None, rows: int | None = None
) -> tuple[Tensor, Tensor]:
    """E4M3 codes and float32 scales of ``x`` ``[tokens, in]``.

    Raises:
        ValueError: ``x`` is no matrix, or ``size`` no power of two.
    """
    if x.ndim != 2:
        raise ValueError(f"x must be a matrix, not {list(x.shape)}")
    if size is not None and size & (size - 1):
        raise ValueError(f"blocks of {size} columns are no power of two")
    limit = math.inf if bound is None else float(bound)
    found: tuple[Tensor, Tensor] = torch.ops.quantmill_triton.activations(
        x, size or 0, limit, x.shape[0] if rows is None else rows
    )
    return found


def _empty(x: Tensor, size: int, rows: int) -> tuple[Tensor, Tensor]:
    columns = x.shape[1]
    codes = x.new_empty((rows, columns), dtype=torch.float8_e4m3fn)
    if not size:
        return codes, x.new_empty((rows, 1), dtype=torch.float32)
    return codes, x.new_empty((-(-columns // size), rows), dtype=torch.float32).t()


def _activations(x: Tensor, size: int, bound: float, rows: int) -> tuple[Tensor, Tensor]:
    if x.stride(1) != 1:
        x = x.contiguous()
    tokens, columns = x.shape
    codes, scale = _empty(x, size, rows)
    if not codes.numel():
        return codes, scale
    tensors = (x, codes, scale)
    if size:
        launch = _blocks(rows, columns, size, x.device)
        launch(tensors, (tokens, columns, rows, x.stride(0)))
        return codes, scale
    if rows > tokens:
        codes[tokens:], scale[tokens:] = 0, 1
    if tokens:
        _rows(tokens, columns, x.device)(tensors, (columns, x.stride(0), min(bound, 3e38)))
    return codes, scale


@lru_cache(maxsize=4096)
def _rows(tokens: int, columns: int, _: torch.device) -> Launch:
    from quantmill_triton.activation_kernels import rows_kernel

    block = min(_ROW, 1 << max(7, (columns - 1).bit_length()))
    constants = {"LEAST": _LEAST, "TOP": _TOP, "BLOCK": block, "WHOLE": columns <= block}
    options = {"num_warps": 8 if block >= 4096 else 4}
    return Launch(rows_kernel, (tokens, 1, 1), constants, options)


@lru_cache(maxsize=4096)
def _blocks(rows: int, columns: int, size: int, _: torch.device) -> Launch:
    from quantmill_triton.activation_kernels import blocks_kernel

    count = max(1, min(_PIECE, 1 << (columns - 1).bit_length()) // size)
    constants = {"LEAST": _LEAST, "TOP": _TOP, "SIZE": size, "COUNT": count}
    grid = (rows, -(-columns // (count * size)), 1)
    return Launch(blocks_kernel, grid, constants, {"num_warps": 4})


for _key in ("CUDA", "CPU") if interpreted() else ("CUDA",):
    LIBRARY.impl("activations", on_its_device(_activations), _key)


@register_fake("quantmill_triton::activations", lib=LIBRARY)
def _(x: Tensor, size: int, bound: float, rows: int) -> tuple[Tensor, Tensor]:
    return _empty(x, size, rows)
