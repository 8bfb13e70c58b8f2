"""ggml's block types as kernels of the registry; signatures in :mod:`quantmill.kernels`.

The bytes are those of the definitions in quantmill-gguf, which this package does not import.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor

from quantmill_cpu.buffers import SOURCES, address
from quantmill_cpu.ggml_types import TYPES
from quantmill_cpu.native import library

if TYPE_CHECKING:
    from quantmill.forms import Form

__all__ = ["codes", "dequantize", "quantize"]


def quantize(block: Tensor, *, type_name: str, importance: Tensor | None, out: Tensor) -> float:
    """Quantize rows to blocks of a type.

    Args:
        block: float32, bfloat16 or float16 ``[rows, columns]``, contiguous, columns a multiple of
            the type's block.
        type_name: ggml's name.
        importance: float32 ``[columns]``, not negative, or None.
        out: uint8 ``[rows, row bytes]``, written.

    Returns:
        The largest magnitude in ``block``. Where that is NaN or infinity, ``out`` is incomplete.

    Raises:
        ValueError: a tensor is of the wrong dtype, device, size or layout, or the type can't be
            made.
    """
    found = TYPES.get(type_name)
    if found is None or not found.made:
        raise ValueError(f"{type_name!r} is no type that can be made")
    if block.dtype not in SOURCES or block.ndim != 2 or block.shape[1] % found.values:
        raise ValueError(f"block must be a float matrix of whole blocks of {found.values}")
    rows, columns = block.shape
    weights = None
    if importance is not None:
        weights = address(importance, torch.float32, columns, "importance")
    largest = ctypes.c_float()
    status = library().qm_ggml_encode(
        found.number,
        address(block, block.dtype, rows * columns, "block"),
        SOURCES[block.dtype],
        rows,
        columns,
        weights,
        address(out, torch.uint8, rows * (columns // found.values) * found.size, "out"),
        ctypes.byref(largest),
        torch.get_num_threads(),
    )
    if status != 0:
        raise MemoryError(f"{type_name}: the library has no memory for {rows} rows")
    return largest.value


def codes(data: Tensor, *, type_name: str, out: Tensor) -> None:
    """Take the codes out of the blocks of a type on a grid.

    Args:
        data: uint8 ``[rows, row bytes]``.
        type_name: ggml's name.
        out: the memory of these codes in the packing of the type's form, written: ``lo4`` for 4
            bits, ``i8`` for 8, otherwise ``dense``.

    Raises:
        ValueError: a tensor is of the wrong dtype, device or size, or the type has no such codes.
    """
    found = TYPES.get(type_name)
    if found is None or not found.bits:
        raise ValueError(f"{type_name!r} has no codes on a grid")
    count = data.numel() // found.size
    dtype = torch.int8 if found.bits == 8 else torch.uint8
    data = data.contiguous()
    library().qm_ggml_codes(
        found.number,
        address(data, torch.uint8, count * found.size, "data"),
        count,
        address(out, dtype, count * found.values * found.bits // 8, "out"),
        torch.get_num_threads(),
    )


def dequantize(form: Form, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """The values of blocks as they lie in a file.

    Args:
        form: of kind ``ggml``: uint8 ``data``, the name of its type, and for a lattice its
            ``points``, int8 ``[points, coordinates]``.
        dtype: of the result.
        out: float32 of the form's shape, contiguous, written; then ``dtype`` is not looked at.

    Returns:
        ``out``, or a new tensor.

    Raises:
        ValueError: a tensor is of the wrong dtype, device, size or layout.
    """
    blocks: Any = form
    name: str = blocks.type_name
    found = TYPES.get(name)
    if found is None:
        raise ValueError(f"{name!r} is no type of blocks")
    points: Tensor | None = blocks.points if found.points else None
    if out is not None:
        _decode(blocks.data, points, name, out)
        return out
    if torch.compiler.is_compiling():
        result: Tensor = torch.ops.quantmill_cpu.ggml_dequantize(
            blocks.data, points, name, list(form.shape), dtype
        )
        return result
    return _dequantize(blocks.data, points, name, tuple(form.shape), dtype)


def _decode(data: Tensor, points: Tensor | None, type_name: str, out: Tensor) -> None:
    found = TYPES[type_name]
    count = data.numel() // found.size
    library().qm_ggml_decode(
        found.number,
        address(data, torch.uint8, count * found.size, "data"),
        count,
        None if points is None else address(points, torch.int8, found.points, "points"),
        address(out, torch.float32, count * found.values, "out"),
        torch.get_num_threads(),
    )


def _dequantize(
    data: Tensor,
    points: Tensor | None,
    type_name: str,
    shape: Sequence[int],
    dtype: torch.dtype,
) -> Tensor:
    out = torch.empty(*shape, dtype=torch.float32)
    _decode(data, points, type_name, out)
    return out.to(dtype)


_OPERATORS: Final = torch.library.Library("quantmill_cpu", "FRAGMENT")
_OPERATORS.define(
    "ggml_dequantize(Tensor data, Tensor? points, str type_name, int[] shape, ScalarType dtype)"
    " -> Tensor"
)
_OPERATORS.impl("ggml_dequantize", _dequantize, "CPU")


@torch.library.register_fake("quantmill_cpu::ggml_dequantize", lib=_OPERATORS)
def _fake(
    data: Tensor,
    points: Tensor | None,
    type_name: str,
    shape: Sequence[int],
    dtype: torch.dtype,
) -> Tensor:
    return data.new_empty(tuple(shape), dtype=dtype)
