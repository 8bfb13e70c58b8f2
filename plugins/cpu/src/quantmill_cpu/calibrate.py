"""What calibration computes, as kernels of the registry; signatures in :mod:`quantmill.kernels`."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from quantmill_cpu.buffers import address
from quantmill_cpu.native import library, matmul_level, matmul_levels, unavailable

__all__ = ["compensate", "descend", "dot_levels", "moments", "no_dots", "product"]

_DOTS = ("avx512bf16", "amx")


def no_dots() -> str | None:
    """Why kernels of bfloat16 dot products can't be used on this machine, or None."""
    reason = unavailable()
    if reason is None and matmul_level() not in _DOTS:
        reason = "the processor has no dot products of bfloat16, or they are not to be used"
    return reason


def dot_levels() -> list[str]:
    """The instruction sets of this machine that have dot products of bfloat16."""
    return [name for name in _DOTS if unavailable() is None and name in matmul_levels()]


def moments(x: Tensor, *, out: Tensor) -> None:
    """Add ``x.T @ x`` of bfloat16 ``x [tokens, columns]`` to float32 ``out [columns, columns]``, on
    and above its diagonal; what is below it has no meaning.

    Raises:
        ValueError: a tensor is of the wrong dtype, device, size or layout.
        MemoryError: there is none for a copy of a thousand tokens.
    """
    if x.ndim != 2:
        raise ValueError(f"x must be [tokens, columns], not {list(x.shape)}")
    tokens, columns = x.shape
    failed = library().qm_moments(
        address(x, torch.bfloat16, tokens * columns, "x"),
        tokens,
        columns,
        address(out, torch.float32, columns * columns, "out"),
        torch.get_num_threads(),
    )
    if failed == -1:
        raise MemoryError(f"no memory for {columns} columns")
    if failed:
        raise ValueError(no_dots())


def product(a: Tensor, b: Tensor) -> Tensor:
    """``a.T @ b``, float32 ``[m, n]``, of float32 ``a [k, m]`` with any strides and contiguous
    ``b [k, n]``. Each sum has one order, whatever the number of threads.

    Raises:
        ValueError: a tensor is of the wrong dtype, device, size or layout.
        MemoryError: there is none for copies of a part of both.
    """
    if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[0]:
        raise ValueError(f"a must be [k, m] and b [k, n], not {list(a.shape)}, {list(b.shape)}")
    (depth, rows), columns = a.shape, b.shape[1]
    if a.device.type != "cpu" or a.layout != torch.strided or a.dtype != torch.float32:
        raise ValueError(f"a must be strided float32 on the CPU, not {a.dtype} on {a.device}")
    out = torch.empty(rows, columns)
    failed = library().qm_product(
        depth,
        rows,
        columns,
        a.data_ptr(),
        *a.stride(),
        address(b, torch.float32, depth * columns, "b"),
        out.data_ptr(),
        torch.get_num_threads(),
    )
    if failed:
        raise MemoryError(f"no memory for {rows} rows")
    return out


def compensate(
    panel: Tensor,
    local: Tensor,
    groups: Sequence[int],
    spans: Sequence[int],
    scales: Tensor,
    zeros: Tensor,
    codes: Tensor,
    *,
    top: int,
    symmetric: bool,
    exponent: float,
) -> None:
    """Round a panel of at most 128 columns; see :mod:`quantmill.kernels`.

    Raises:
        ValueError: a tensor is of the wrong dtype, device, size or layout, or the panel too wide.
    """
    _within(spans, range(len(spans), 0, -1))
    shape, pointers = _panel(panel, local, groups, spans, scales, zeros)
    written = address(codes, torch.uint8, panel.numel(), "codes")
    _done(
        shape,
        library().qm_compensate(
            *shape, top, symmetric, exponent, *pointers, written, torch.get_num_threads()
        ),
    )


def descend(
    panel: Tensor,
    local: Tensor,
    groups: Sequence[int],
    spans: Sequence[int],
    scales: Tensor,
    zeros: Tensor,
    steps: Tensor,
    *,
    top: int,
) -> None:
    """Choose the codes of a panel of at most 128 columns again; see :mod:`quantmill.kernels`.

    Raises:
        ValueError: a tensor is of the wrong dtype, device, size or layout, or the panel too wide.
    """
    _within(spans, range(1, len(spans) + 1))
    shape, pointers = _panel(panel, local, groups, spans, scales, zeros)
    changed = address(steps, torch.float32, panel.numel(), "steps")
    _done(shape, library().qm_descend(*shape, top, *pointers, changed, torch.get_num_threads()))


def _within(spans: Sequence[int], most: Sequence[int]) -> None:
    """Groups end within the panel; the library takes that as given."""
    for column, (span, end) in enumerate(zip(spans, most, strict=True)):
        if not 0 <= span <= end:
            raise ValueError(f"spans[{column}] must be 0 to {end}")


def _panel(
    panel: Tensor,
    local: Tensor,
    groups: Sequence[int],
    spans: Sequence[int],
    scales: Tensor,
    zeros: Tensor,
) -> tuple[tuple[int, int], tuple[Any, ...]]:
    """Columns and rows, and what both operations read; the library reads groups and spans without
    looking."""
    if panel.ndim != 2 or scales.ndim != 2 or scales.shape[1] != panel.shape[1]:
        raise ValueError("panel must be [columns, rows], scales and zeros [groups, rows]")
    count, rows = panel.shape
    if len(groups) != count or len(spans) != count:
        raise ValueError(f"groups and spans must have {count} numbers, one per column")
    if count and not 0 <= min(groups) <= max(groups) < scales.shape[0]:
        raise ValueError(f"groups must be 0 to {scales.shape[0] - 1}")
    return (count, rows), (
        _numbers(groups),
        _numbers(spans),
        address(scales, torch.float32, scales.numel(), "scales"),
        address(zeros, torch.float32, scales.numel(), "zeros"),
        address(local, torch.float32, count * count, "local"),
        address(panel, torch.float32, count * rows, "panel"),
    )


def _done(shape: tuple[int, int], failed: int) -> None:
    if failed:
        raise ValueError(f"a panel has at most 128 columns, not {shape[0]}")


def _numbers(values: Sequence[int]) -> ctypes.Array[ctypes.c_int32]:
    return (ctypes.c_int32 * len(values))(*values)
