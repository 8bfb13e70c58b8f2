# ruff: noqa: N803  Triton's constants are written in capitals
"""Activations to 8-bit floats: the Triton kernels. Importing this module imports Triton.

One pass over memory where a row fits a program: PyTorch's operations would read and write float32
copies several times, which takes longer than the product that follows.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["blocks_kernel", "rows_kernel"]


@triton.jit
def _rounded(values, scale, TOP: tl.constexpr):
    """``values / scale`` as E4M3: divided exactly as the definition does, then saturated."""
    quotient = tl.div_rn(values, scale)
    return tl.minimum(tl.maximum(quotient, -TOP), TOP).to(tl.float8e4nv)


@triton.jit(do_not_specialize=["stride"])
def rows_kernel(
    x, codes, scale, columns, stride, bound,
    LEAST: tl.constexpr, TOP: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """A row of ``x`` a program: its scale is that of its largest magnitude.

    ``x`` [rows, columns] with row stride ``stride``; ``codes`` E4M3 [rows, columns]; ``scale``
    float32 [rows]. ``WHOLE`` says that ``BLOCK`` columns hold the row.
    """
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    if WHOLE:
        values = tl.load(x + row * stride + at, mask=at < columns, other=0.0).to(tl.float32)
        most = tl.max(tl.abs(values), axis=0)
        step = tl.div_rn(tl.minimum(tl.maximum(most, LEAST), bound), TOP)
        tl.store(codes + row * columns + at, _rounded(values, step, TOP), mask=at < columns)
    else:
        largest = tl.zeros([BLOCK], dtype=tl.float32)
        for start in range(0, columns, BLOCK):
            inside = start + at < columns
            values = tl.load(x + row * stride + start + at, mask=inside, other=0.0).to(tl.float32)
            largest = tl.maximum(largest, tl.abs(values))
        most = tl.max(largest, axis=0)
        step = tl.div_rn(tl.minimum(tl.maximum(most, LEAST), bound), TOP)
        for start in range(0, columns, BLOCK):
            inside = start + at < columns
            values = tl.load(x + row * stride + start + at, mask=inside, other=0.0).to(tl.float32)
            tl.store(codes + row * columns + start + at, _rounded(values, step, TOP), mask=inside)
    tl.store(scale + row, step)


@triton.jit(do_not_specialize=["stride", "rows", "padded"])
def blocks_kernel(
    x, codes, scale, rows, columns, padded, stride,
    LEAST: tl.constexpr, TOP: tl.constexpr, SIZE: tl.constexpr, COUNT: tl.constexpr,
):  # fmt: skip
    """``COUNT`` blocks of ``SIZE`` columns of a row a program, each with a scale of its own.

    Rows from ``rows`` on are padding and become zeros. ``scale`` float32 [blocks, padded]: the
    rows are neighbours, as scaled products ask.
    """
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1) * COUNT + tl.arange(0, COUNT)
    at = block[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    inside = at < columns
    values = tl.load(x + row * stride + at, mask=inside & (row < rows), other=0.0).to(tl.float32)
    most = tl.max(tl.abs(values), axis=1)
    step = tl.div_rn(tl.maximum(most, LEAST), TOP)
    tl.store(codes + row * columns + at, _rounded(values, step[:, None], TOP), mask=inside)
    tl.store(scale + block * padded + row, step, mask=block * SIZE < columns)
