"""The quantizers as kernels of the registry; signatures in :mod:`quantmill.kernels`."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from quantmill.forms import nearest_on_grid, table_values
from quantmill.rounding import BYTES
from quantmill_cpu.buffers import SOURCES, address
from quantmill_cpu.native import library

__all__ = [
    "absmax",
    "extremes",
    "quantize_codebook",
    "quantize_rows_int8",
    "round_bytes",
    "round_codes",
]

_KINDS = {
    torch.int8: 0,
    torch.float8_e4m3fn: 1,
    torch.float8_e5m2: 2,
    torch.float4_e2m1fn_x2: 3,
}
"""Numbers of what weights are rounded to."""


def _source(block: Tensor) -> int:
    if block.dtype not in SOURCES:
        raise ValueError(f"block must be float32, bfloat16 or float16, not {block.dtype}")
    return address(block, block.dtype, block.numel(), "block")


def _entries(table: str | Tensor) -> Tensor:
    """The checked entries of a table; the library reads them without looking."""
    entries = table_values(table) if isinstance(table, str) else table
    if entries.numel() not in (16, 256):
        raise ValueError(f"table must have 16 or 256 entries, not {entries.numel()}")
    address(entries, torch.float32, entries.numel(), "table")
    entries = entries.reshape(-1)
    if entries.numel() == 256 and not bool((entries[1:] >= entries[:-1]).all()):
        raise ValueError("a table of 256 entries must ascend")
    return entries


def _bounds(entries: Tensor) -> tuple[Tensor, Tensor]:
    order = torch.argsort(entries, stable=True)
    ordered = entries[order]
    return (ordered[1:] + ordered[:-1]) / 2, order.to(torch.uint8)


def _tables(table: str | Tensor) -> tuple[Tensor, ...]:
    """For 16 entries their midpoints and their order, for 256 the nearest of each grid step."""
    entries = _entries(table)
    return _bounds(entries) if entries.numel() == 16 else (nearest_on_grid(entries),)


@cache
def _named_tables(name: str) -> tuple[Tensor, ...]:
    return _tables(name)


def quantize_codebook(
    block: Tensor, *, table: str | Tensor, block_size: int, out_codes: Tensor, out_scale: Tensor
) -> int:
    """Quantize a flat float tensor over blocks to a table of 16 or 256 entries.

    Args:
        block: float32, bfloat16 or float16 (256 entries: float32) ``[n]``, contiguous.
        table: a registered table's name, or its float32 entries.
        block_size: elements per scale, even.
        out_codes: uint8, ``[ceil(n / 2)]`` for 16 entries, ``[n]`` for 256.
        out_scale: float32 ``[ceil(n / block_size)]``.

    Returns:
        The index of the first NaN or infinity, or -1.

    Raises:
        ValueError: a tensor is of the wrong dtype, device, size or layout.
    """
    count = block.numel()
    if block_size < 2 or block_size % 2:
        raise ValueError(f"block_size must be even, not {block_size}")
    source = _source(block)
    scale = address(out_scale, torch.float32, -(-count // block_size), "out_scale")
    threads = torch.get_num_threads()
    tables = _named_tables(table) if isinstance(table, str) else _tables(table)
    bad: int
    if len(tables) == 2:
        bounds, order = tables
        bad = library().qm_quantize_codebook4(
            source,
            SOURCES[block.dtype],
            count,
            block_size,
            bounds.data_ptr(),
            order.data_ptr(),
            address(out_codes, torch.uint8, (count + 1) // 2, "out_codes"),
            scale,
            threads,
        )
        return bad
    if block.dtype != torch.float32:
        raise ValueError("8 bits need a float32 block")
    codes = address(out_codes, torch.uint8, count, "out_codes")
    bad = library().qm_quantize_codebook8(
        source, count, block_size, tables[0].data_ptr(), codes, scale, threads
    )
    return bad


def quantize_rows_int8(block: Tensor, *, out_codes: Tensor, out_scale: Tensor) -> int:
    """Row-wise int8 of float ``[rows, in]`` into int8 codes and float32 absmax ``[rows]``.

    Weights are rounded to float16 first, as LLM.int8 does (arXiv 2208.07339).

    Returns:
        The flat index of the first weight that is not finite in float16, or -1.

    Raises:
        ValueError: a tensor is of the wrong dtype, device, size or layout.
    """
    if block.ndim != 2:
        raise ValueError(f"block must be [rows, in], not {list(block.shape)}")
    rows, columns = block.shape
    bad: int = library().qm_quantize_rows_int8(
        _source(block),
        SOURCES[block.dtype],
        rows,
        columns,
        address(out_codes, torch.int8, rows * columns, "out_codes"),
        address(out_scale, torch.float32, rows, "out_scale"),
        torch.get_num_threads(),
    )
    return bad


def _matrix(block: Tensor, group: int) -> tuple[int, int, int]:
    """Rows, columns and groups of a row of a matrix."""
    if block.ndim != 2 or group < 1:
        raise ValueError(f"block must be [rows, in], group above 0: {list(block.shape)}, {group}")
    rows, columns = block.shape
    return rows, columns, -(-columns // group)


def absmax(block: Tensor, *, group: int) -> Tensor:
    """Largest magnitudes of groups of columns of float ``[rows, in]``, float32 ``[rows, groups]``.

    Raises:
        ValueError: ``block`` is of the wrong dtype, device, shape or layout.
    """
    rows, columns, groups = _matrix(block, group)
    found = torch.empty(rows, groups, dtype=torch.float32)
    library().qm_absmax(
        _source(block),
        SOURCES[block.dtype],
        rows,
        columns,
        group,
        found.data_ptr(),
        torch.get_num_threads(),
    )
    return found


def extremes(block: Tensor, *, group: int) -> tuple[Tensor, Tensor]:
    """Least and largest values of groups of columns of float ``[rows, in]``, each float32
    ``[rows, groups]``.

    Raises:
        ValueError: ``block`` is of the wrong dtype, device, shape or layout.
    """
    rows, columns, groups = _matrix(block, group)
    low, high = torch.empty(2, rows, groups, dtype=torch.float32)
    library().qm_extremes(
        _source(block),
        SOURCES[block.dtype],
        rows,
        columns,
        group,
        low.data_ptr(),
        high.data_ptr(),
        torch.get_num_threads(),
    )
    return low, high


def round_codes(
    block: Tensor,
    *,
    by: Tensor,
    minus: Tensor | None,
    plus: Tensor | None,
    out: Tensor,
    group: int,
    multiply: bool,
    bits: int,
    middle: float,
    edge: float,
    limits: tuple[int, int],
) -> None:
    """Round finite float ``[rows, in]`` to packed codes, as the core's ``CodeRounding`` says.

    ``by``, ``minus`` and ``plus`` are float32 ``[rows, groups]``, ``out`` a uint8 stream.

    Raises:
        ValueError: a tensor is of the wrong dtype, device, size or layout, or ``limits`` are no
            codes of ``bits`` bits.
    """
    rows, columns, groups = _matrix(block, group)
    if not 1 <= bits <= 8 or not 0 <= limits[0] <= limits[1] < 2**bits:
        raise ValueError(f"codes from {limits[0]} to {limits[1]} are not of {bits} bits")
    more = [
        None if item is None else address(item, torch.float32, rows * groups, name)
        for name, item in (("minus", minus), ("plus", plus))
    ]
    library().qm_round_codes(
        _source(block),
        SOURCES[block.dtype],
        rows,
        columns,
        group,
        address(by, torch.float32, rows * groups, "by"),
        *more,
        not multiply,
        bits,
        middle,
        edge,
        *limits,
        address(out, torch.uint8, -(-rows * columns * bits // 8), "out"),
        torch.get_num_threads(),
    )


def round_bytes(
    block: Tensor, *, by: Tensor, out: Tensor, group: int, multiply: bool, top: float
) -> None:
    """Round finite float ``[rows, in]`` over, or times, ``by`` float32 ``[rows, groups]`` into
    int8, 8-bit floats or pairs of 4-bit ones, ``out``.

    Raises:
        ValueError: a tensor is of the wrong dtype, device, size or layout, or ``top`` is more than
            the largest number of ``out``.
    """
    rows, columns, groups = _matrix(block, group)
    if out.dtype not in _KINDS or not 0 < top <= BYTES[out.dtype]:
        raise ValueError(f"{out.dtype} within {top} is not supported")
    count = -(-rows * columns // (2 if out.dtype == torch.float4_e2m1fn_x2 else 1))
    library().qm_round(
        _source(block),
        SOURCES[block.dtype],
        rows,
        columns,
        group,
        address(by, torch.float32, rows * groups, "by"),
        not multiply,
        _KINDS[out.dtype],
        top,
        address(out, out.dtype, count, "out"),
        torch.get_num_threads(),
    )
