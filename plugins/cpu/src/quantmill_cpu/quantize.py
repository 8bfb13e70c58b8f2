"""The quantizers as kernels of the registry; signatures in :mod:`quantmill.kernels`."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from quantmill.forms import nearest_on_grid, table_values
from quantmill_cpu.native import library

__all__ = ["quantize_codebook", "quantize_rows_int8"]

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def _check(tensor: Tensor, dtype: torch.dtype, count: int, what: str) -> int:
    if tensor.device.type != "cpu" or not tensor.is_contiguous():
        raise ValueError(f"{what} must be contiguous and on the CPU")
    if tensor.dtype != dtype or tensor.numel() < count:
        raise ValueError(f"{what} must be {dtype} with at least {count} elements")
    return tensor.data_ptr()


def _bounds(table: Tensor) -> tuple[Tensor, Tensor]:
    order = torch.argsort(table, stable=True)
    ordered = table[order]
    return ((ordered[1:] + ordered[:-1]) / 2).contiguous(), order.to(torch.uint8).contiguous()


@cache
def _named_nearest(name: str) -> Tensor:
    return nearest_on_grid(table_values(name))


@cache
def _named_bounds(name: str) -> tuple[Tensor, Tensor]:
    return _bounds(table_values(name).to(torch.float32))


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
    if block.dtype not in _DTYPES:
        raise ValueError(f"block must be float32, bfloat16 or float16, not {block.dtype}")
    source = _check(block, block.dtype, count, "block")
    scale = _check(out_scale, torch.float32, -(-count // block_size), "out_scale")
    threads = torch.get_num_threads()
    small = isinstance(table, Tensor) and table.numel() == 16
    if small or (isinstance(table, str) and table_values(table).numel() == 16):
        bounds, order = _named_bounds(table) if isinstance(table, str) else _bounds(table)
        codes = _check(out_codes, torch.uint8, (count + 1) // 2, "out_codes")
        bad: int = library().qm_quantize_codebook4(
            source,
            _DTYPES[block.dtype],
            count,
            block_size,
            bounds.data_ptr(),
            order.data_ptr(),
            codes,
            scale,
            threads,
        )
        return bad
    if block.dtype != torch.float32:
        raise ValueError("8 bits need a float32 block")
    nearest = _named_nearest(table) if isinstance(table, str) else nearest_on_grid(table)
    codes = _check(out_codes, torch.uint8, count, "out_codes")
    return library().qm_quantize_codebook8(
        source, count, block_size, nearest.data_ptr(), codes, scale, threads
    )


def quantize_rows_int8(block: Tensor, *, out_codes: Tensor, out_scale: Tensor) -> int:
    """Row-wise int8 of float ``[rows, in]`` into int8 codes and float32 absmax ``[rows]``.

    Weights are rounded to float16 first, as LLM.int8 does (arXiv 2208.07339).

    Returns:
        The flat index of the first weight that is not finite in float16, or -1.

    Raises:
        ValueError: a tensor is of the wrong dtype, device, size or layout.
    """
    rows, columns = block.shape
    if block.dtype not in _DTYPES:
        raise ValueError(f"block must be float32, bfloat16 or float16, not {block.dtype}")
    bad: int = library().qm_quantize_rows_int8(
        _check(block, block.dtype, rows * columns, "block"),
        _DTYPES[block.dtype],
        rows,
        columns,
        _check(out_codes, torch.int8, rows * columns, "out_codes"),
        _check(out_scale, torch.float32, rows, "out_scale"),
        torch.get_num_threads(),
    )
    return bad
