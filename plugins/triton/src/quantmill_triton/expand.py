# ruff: noqa: N803, N806  Triton's constants are written in capitals
"""The Triton kernel that expands a weight. Importing this module imports Triton."""

from __future__ import annotations

import triton
import triton.language as tl

from quantmill_triton.decode import codes_of, floats, scales_of, zeros_of

__all__ = ["dequantize_kernel"]


@triton.jit
def dequantize_kernel(
    codes,
    high,
    scale,
    zero,
    table,
    order,
    out,
    row,
    lanes,
    columns,
    chunks,
    groups,
    scale_stride,
    BITS: tl.constexpr,
    HIGH_BITS: tl.constexpr,
    WIDTH: tl.constexpr,
    SLICES: tl.constexpr,
    GROUP: tl.constexpr,
    TALL: tl.constexpr,
    VALUES: tl.constexpr,
    OFFSET: tl.constexpr,
    MIDDLE: tl.constexpr,
    PAIRED: tl.constexpr,
    SCALES: tl.constexpr,
    GATHER: tl.constexpr,
    FACTOR: tl.constexpr,
):
    """The weight's rows from ``row`` on, 64 of one chunk to a program: the form's own arithmetic.

    ``out`` [rows, columns] begins with that row, a multiple of 64. With ``GATHER`` columns go back
    to their places before sorting. Launched without the fusion of products and sums, so results
    are the reference's to the bit.
    """
    CHUNK: tl.constexpr = WIDTH * SLICES
    TILE: tl.constexpr = 64 * WIDTH
    c = tl.program_id(0)
    r64 = tl.arange(0, 64)
    rn = row + tl.program_id(1) * 64 + r64
    rs = tl.arange(0, WIDTH)
    tile = ((row // 64 + tl.program_id(1)) * chunks + c).to(tl.int64)
    start = codes + tile * (TILE * SLICES * BITS // 16) + (r64 * WIDTH)[:, None]
    upper = high
    if HIGH_BITS > 0:
        upper = high + tile * (TILE * SLICES * HIGH_BITS // 16) + (r64 * WIDTH)[:, None]
        upper += rs[None, :]
    if TALL == 0:
        rows_at = rn * 0
    elif TALL == 1:
        rows_at = rn
    else:
        rows_at = tl.minimum(rn, lanes - 1) // TALL
    if PAIRED:
        # Words of even columns have two slices of both neighbours, those of odd ones the other two.
        words = tl.load(start + rs[None, :]).to(tl.int32)
        first, second = tl.split(tl.reshape(words, [64, WIDTH // 2, 2]))
        # Looked up in shared memory: a load from the table for each element takes three times as
        # long.
        entries = tl.load(table + tl.arange(0, 16))
    to = out + (rn - row).to(tl.int64)[:, None] * columns
    for j in tl.static_range(SLICES):
        group = 0
        if GROUP > 0:
            group = tl.minimum((c * CHUNK + j * WIDTH) // GROUP, groups - 1)
        now = tl.load(scale + group * scale_stride + rows_at)
        less = tl.zeros([64], dtype=tl.float32)
        if OFFSET == 1:
            less = zeros_of(now, SCALES)
        elif OFFSET > 1:
            less = tl.load(zero + group * scale_stride + rows_at).to(tl.float32)
        if PAIRED:
            both = (second if j >= 2 else first) >> (8 * (j & 1))
            found = tl.reshape(tl.join(both & 15, (both >> 4) & 15), [64 * WIDTH])
            weight = tl.reshape(tl.gather(entries, found, 0), [64, WIDTH])
        else:
            found = codes_of(start + rs[None, :], upper, j, BITS, HIGH_BITS, WIDTH)
            weight = floats(found, less, table, VALUES, OFFSET, MIDDLE)
        weight *= scales_of(now, SCALES, OFFSET == 1)[:, None]
        if FACTOR != 1:
            weight *= FACTOR
        if OFFSET == 3:
            weight += less[:, None]
        k = c * CHUNK + j * WIDTH + rs
        where = k
        if GATHER:
            where = tl.load(order + k, mask=k < columns, other=0)
        mask = (rn < lanes)[:, None] & (k < columns)[None, :]
        tl.store(to + where[None, :], weight.to(out.dtype.element_ty), mask=mask)
