# ruff: noqa: N803, N806  Triton's constants are written in capitals
"""The Triton kernel that multiplies. Importing this module imports Triton.

The weight is the left operand, its rows the matrix instruction's rows, so that a small batch pads
a small dimension, and so that its codes go from shared memory to the operand's registers as they
are and are unpacked there. A word of a tile holds one code of each slice in the same bits, so
unpacking a slice is a shift, a mask and an exponent (Kim et al., arXiv 2211.10017: an integer put
into the mantissa of a float of fixed exponent), on two words at a time.

Integers stay integers until a group is summed: 16-bit floats hold them exactly, and the sum is
scaled in float32. Any zero point and minimum, and batches too large for two accumulators, take the
other way: each weight is scaled in float32, in the form's order, and rounded once (``PRESCALE``).
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from quantmill_triton.decode import (
    bytes_of,
    codes_of,
    fetch,
    floats,
    integers,
    join,
    of_group,
    paired_codes,
    prefetch,
    scales_of,
    zeros_of,
)

__all__ = ["matmul_kernel"]


@triton.jit
def _activations(x, order, rm, k, stride, rows, columns, GATHER: tl.constexpr, EVEN: tl.constexpr):
    """Columns ``k`` ``[..., WIDTH]`` of the activations, transposed: ``[..., WIDTH, BM]``."""
    inside = tl.expand_dims(k < columns, -1)
    where = k
    if GATHER:
        where = tl.load(order + k) if EVEN else tl.load(order + k, mask=k < columns, other=0)
    pointers = x + (tl.expand_dims(where, -1) + rm * stride)
    mask = (tl.expand_dims(k, -1) >= 0) & (rm < rows)
    if not EVEN:
        mask = mask & inside
    return tl.load(pointers, mask=mask, other=0.0)


@triton.jit
def _fetch_early(codes, tile, length, block_words, lanes, BN: tl.constexpr, BYTES: tl.constexpr):
    """Start moving the first ``BYTES`` of the codes of a tile to the second-level cache.

    ``codes`` begin with the part that the program sums; of each 64 rows that are ``length`` words
    of 16 bits, and ``block_words`` lie from there to those of the next 64 rows.
    """
    BLOCKS: tl.constexpr = BN // 64 if BN > 64 else 1
    SHARERS: tl.constexpr = 64 // BN if BN < 64 else 1
    LINES: tl.constexpr = BYTES // 128 // BLOCKS
    line = (tile % SHARERS * LINES + tl.arange(0, LINES)) * 64
    for b in tl.static_range(BLOCKS):
        block = tl.minimum(tile * BN // 64 + b, (lanes - 1) // 64)
        fetch(codes + block * block_words + tl.minimum(line, length - 1))


@triton.jit
def _finish(out, bias, total, where, mask, rn, lanes, BIAS: tl.constexpr):
    """Add the bias, round and store."""
    if BIAS:
        total += tl.load(bias + rn, mask=rn < lanes, other=0.0).to(tl.float32)[:, None]
    tl.store(out + where, total.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _sum_parts(pointers, stride, mask, BM: tl.constexpr, BN: tl.constexpr):
    """Sums of all parts, past the first-level cache, which other processors' stores don't reach."""
    UNROLL: tl.constexpr = 4 if BM * BN <= 2048 else 1
    total = tl.zeros([BN, BM], dtype=tl.float32)
    for s in tl.range(0, tl.num_programs(1), loop_unroll_factor=UNROLL):
        total += tl.load(pointers + s * stride, mask=mask, other=0.0, cache_modifier=".cg")
    return total


@triton.jit
def _place_of(ends, count, tile, BM: tl.constexpr, MATRICES: tl.constexpr):
    """The matrix of a tile of rows, its first row, and the row after the matrix' last one: 0 for a
    tile beyond them all. Each matrix' rows begin a tile."""
    index = tl.arange(0, MATRICES)
    inside = index < count
    end = tl.load(ends + index, mask=inside, other=0)
    start = tl.load(ends + index - 1, mask=inside & (index > 0), other=0)
    tiles = tl.where(inside, (end - start + (BM - 1)) // BM, 0)
    after = tl.cumsum(tiles, axis=0)
    matrix = tl.sum(tl.where(inside & (after <= tile), 1, 0), axis=0)
    own = index == matrix
    first = tl.sum(tl.where(own, start + (tile - (after - tiles)) * BM, 0), axis=0)
    last = tl.sum(tl.where(own, end, 0), axis=0)
    return tl.minimum(matrix, count - 1).to(tl.int64), first.to(tl.int32), last.to(tl.int32)


@triton.jit(do_not_specialize=["rows", "chunks", "part", "groups", "matrices"])
def matmul_kernel(
    x,
    codes,
    high,
    scale,
    zero,
    table,
    lut,
    order,
    bias,
    out,
    work,
    locks,
    ends,
    rows,
    lanes,
    columns,
    stride,
    chunks,
    part,
    groups,
    scale_stride,
    matrices,
    code_step,
    high_step,
    scale_step,
    zero_step,
    BITS: tl.constexpr,
    HIGH_BITS: tl.constexpr,
    WIDTH: tl.constexpr,
    SLICES: tl.constexpr,
    GROUP: tl.constexpr,
    TALL: tl.constexpr,
    FLUSH: tl.constexpr,
    VALUES: tl.constexpr,
    OFFSET: tl.constexpr,
    MIDDLE: tl.constexpr,
    PAIRED: tl.constexpr,
    SCALES: tl.constexpr,
    GATHER: tl.constexpr,
    EVEN: tl.constexpr,
    BIAS: tl.constexpr,
    PRESCALE: tl.constexpr,
    FAST: tl.constexpr,
    WIDE: tl.constexpr,
    SPLIT: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    TEAMS: tl.constexpr,
    MATRICES: tl.constexpr,
    FACTOR: tl.constexpr,
    EARLY: tl.constexpr,
):
    """``out[m, n] = sum_k x[m, k] * weight[n, k] + bias[n]`` for one tile and one part of ``k``.

    Program ``(n, s, m)`` sums the chunks ``s * part`` to ``(s + 1) * part`` for ``BN`` rows of the
    weight and ``BM`` rows of ``x``. With more than one part the sums go to ``work`` float32
    ``[parts, rows, lanes]``, and the last program to arrive at the tile's lock adds them, always in
    the same order, and sets the lock back to 0. A program's chunks are again divided among
    ``TEAMS``, each of one warp, whose sums meet at the end: for few rows of ``x`` that takes less
    time than locks. Tensors then have one more dimension in front.

    ``x`` [rows, columns] with row stride ``stride``; ``out`` [rows, lanes] where ``lanes`` is the
    number of the weight's rows; the weight's tensors as in :mod:`quantmill_triton.layout`.
    ``WIDE`` multiplies in float32: Triton's interpreter has no product of bfloat16.

    With ``MATRICES`` (a power of two, at least their number ``matrices``) the rows of ``x`` are
    sorted by the matrix that each is for; ``ends`` int64 [matrices] is the row after each one's
    last. The tensors are those of all matrices, with so many elements from one to the next. The
    tables are the first one's.

    With ``EARLY`` of 0 or more the kernel is launched while the one before it still runs. Its end
    is waited for before anything is read; what is fetched until then, ``EARLY`` bytes of codes,
    only moves to a cache that all processors share.
    """
    CHUNK: tl.constexpr = WIDTH * SLICES
    TILE: tl.constexpr = 64 * WIDTH
    WORDS: tl.constexpr = TILE * SLICES * BITS // 16
    HIGH_WORDS: tl.constexpr = TILE * SLICES * HIGH_BITS // 16
    FLUSHES: tl.constexpr = CHUNK // FLUSH
    STEPS: tl.constexpr = FLUSH // WIDTH
    PAIRS: tl.constexpr = OFFSET == 1
    dtype: tl.constexpr = x.dtype.element_ty
    tile = tl.program_id(0)
    first = tl.program_id(1) * part
    last = tl.minimum(first + part, chunks)
    if EARLY >= 0:
        gdc_launch_dependents()
        if EARLY > 0:
            length = (last - first) * WORDS
            _fetch_early(codes + first * WORDS, tile, length, chunks * WORDS, lanes, BN, EARLY)
        gdc_wait()
    rn = tile * BN + tl.arange(0, BN)
    row = tl.program_id(2) * BM
    limit = rows
    if MATRICES > 0:
        matrix, row, limit = _place_of(ends, matrices, tl.program_id(2), BM, MATRICES)
        if limit == 0:
            last = first  # No rows, nothing to read.
        codes += matrix * code_step
        high += matrix * high_step
        scale += matrix * scale_step
        zero += matrix * zero_step
        bias += matrix * lanes
        order += matrix * columns
    rm = row + tl.arange(0, BM)
    rs = tl.arange(0, WIDTH)
    # A tile of more than 64 rows may reach past the padding: it then reads the last 64 again.
    block = tl.minimum(rn // 64, (lanes - 1) // 64)
    start = tl.expand_dims(codes + (block * (chunks * WORDS) + (rn % 64) * WIDTH), -1)
    upper = start
    if HIGH_BITS > 0:
        upper = tl.expand_dims(high + (block * (chunks * HIGH_WORDS) + (rn % 64) * WIDTH), -1)
    # Scales of rows that are padding: of blocks there are no more than the rows need.
    if TALL == 0:
        rows_at = rn * 0
    elif TALL == 1:
        rows_at = block * 64 + rn % 64
    else:
        rows_at = tl.minimum(rn, lanes - 1) // TALL
    if PAIRED and FAST:
        # Tensors of one element, not scalars: the compiler moves loads, not splats, to operands.
        first_entry = lut + tl.zeros([1, 1], dtype=tl.int32)
        if dtype == tl.float16:
            first_entry += 8
            table += 1
        l0 = tl.load(first_entry)
        l1 = tl.load(first_entry + 1)
        l2 = tl.load(first_entry + 2)
        l3 = tl.load(first_entry + 3)
        h0 = tl.load(first_entry + 4)
        h1 = tl.load(first_entry + 5)
        h2 = tl.load(first_entry + 6)
        h3 = tl.load(first_entry + 7)
    row_scale = scale + rows_at
    scale = row_scale
    zero += rows_at
    count = last - first
    team = 0
    if TEAMS > 1:
        count = (count + (TEAMS - 1)) // TEAMS
        team = (tl.arange(0, TEAMS) * count)[:, None]
        scale = scale[None, :] + tl.zeros([TEAMS, 1], dtype=tl.int32)
        zero = zero[None, :]
        start = start[None, :, :]
        upper = upper[None, :, :]
        total = tl.zeros([TEAMS, BN, BM], dtype=tl.float32)
        no_sums = tl.zeros([TEAMS, BN, BM], dtype=tl.float32)
        nothing = tl.zeros([TEAMS, BN], dtype=tl.float32)
    else:
        total = tl.zeros([BN, BM], dtype=tl.float32)
        no_sums = tl.zeros([BN, BM], dtype=tl.float32)
        nothing = tl.zeros([BN], dtype=tl.float32)
    # The compiler copies codes and activations to shared memory some tiles ahead, and with them
    # pairs of a scale and a zero, which are wide enough. Scales that only sums meet are fetched
    # into the second-level cache eight tiles ahead and loaded one ahead. No more can be carried
    # by the loop, nor anything that weights meet: the compiler would pipeline nothing.
    CARRY: tl.constexpr = (not PRESCALE and not PAIRS) and (GROUP > 0 and FLUSHES <= 2)
    if CARRY:
        next_0 = of_group(scale, first + team, 0, CHUNK, FLUSH, GROUP, groups, scale_stride)
        next_1 = next_0
        if FLUSHES == 2:
            next_1 = of_group(scale, first + team, 1, CHUNK, FLUSH, GROUP, groups, scale_stride)
    for i in range(count):
        c = first + team + i
        k = c * CHUNK + rs
        if TEAMS > 1:
            if not EVEN:
                # A team that is done reads on in its last chunk and multiplies by zero.
                k = tl.where(c < last, k, columns)
                c = tl.minimum(c, last - 1)
            words = start + tl.expand_dims(c * WORDS, -1)
            high_words = upper + tl.expand_dims(c * HIGH_WORDS, -1)
        else:
            words = start + c * WORDS
            high_words = upper + c * HIGH_WORDS
        if PAIRED and FAST:
            pairs = tl.load(words + rs)
            low = bytes_of(pairs, l0, l1, l2, l3)
            top = bytes_of(pairs, h0, h1, h2, h3)
        if CARRY:
            scale_0 = next_0
            scale_1 = next_1
            if FAST:
                scale += prefetch(
                    scale + tl.minimum((c + 8) * CHUNK // GROUP, groups - 1) * scale_stride
                )
            next_0 = of_group(scale, c + 1, 0, CHUNK, FLUSH, GROUP, groups, scale_stride)
            if FLUSHES == 2:
                next_1 = of_group(scale, c + 1, 1, CHUNK, FLUSH, GROUP, groups, scale_stride)
        for f in tl.static_range(FLUSHES):
            if CARRY:
                now = scale_1 if f == 1 else scale_0
            else:
                now = of_group(scale, c, f, CHUNK, FLUSH, GROUP, groups, scale_stride)
            less = nothing
            if PAIRS:
                less = zeros_of(now, SCALES)
            elif OFFSET > 1:
                less = of_group(zero, c, f, CHUNK, FLUSH, GROUP, groups, scale_stride)
                less = less.to(tl.float32)
            sums = no_sums
            for s in tl.static_range(STEPS):
                if PAIRED and FAST:
                    weight = join(low, top, f * STEPS + s, dtype)
                elif FAST:
                    bits = tl.load(words + (((f * STEPS + s) * BITS // 16) * TILE + rs))
                    weight = integers(bits, less, f * STEPS + s, BITS, MIDDLE, dtype)
                else:
                    if PAIRED:
                        found = paired_codes(words, rs, f * STEPS + s)
                    else:
                        found = codes_of(
                            words + rs, high_words + rs, f * STEPS + s, BITS, HIGH_BITS, WIDTH
                        )
                    weight = floats(found, less, table, VALUES, OFFSET, MIDDLE)
                if PRESCALE:
                    weight = weight.to(tl.float32)
                    weight *= tl.expand_dims(scales_of(now, SCALES, PAIRS), -1)
                    if FACTOR != 1:
                        weight *= FACTOR
                    if OFFSET == 3:
                        weight += tl.expand_dims(less, -1)
                weight = weight.to(dtype)
                values = _activations(
                    x, order, rm, k + (f * STEPS + s) * WIDTH, stride, limit, columns, GATHER, EVEN
                )
                if WIDE:
                    weight = weight.to(tl.float32)
                    values = values.to(tl.float32)
                if PRESCALE or GROUP == 0:
                    total = tl.dot(weight, values, total)
                else:
                    sums = tl.dot(weight, values, sums)
            if GROUP > 0 and not PRESCALE:
                total += sums * tl.expand_dims(scales_of(now, SCALES, PAIRS), -1)
    if TEAMS > 1:
        total = tl.sum(total, axis=0)
    if not PRESCALE:
        factor = tl.full([BN], FACTOR, dtype=tl.float32)
        if GROUP == 0:
            factor *= scales_of(tl.load(row_scale), SCALES, PAIRS)
        if PAIRED and FAST:
            factor *= tl.load(table)
        total *= factor[:, None]
    where = rm[None, :] * lanes + rn[:, None]
    mask = (rm < limit)[None, :] & (rn < lanes)[:, None]
    if SPLIT:
        tl.store(work + tl.program_id(1) * rows * lanes + where, total, mask=mask)
        # All threads' sums are out before the one that counts says so.
        tl.debug_barrier()
        lock = locks + tl.program_id(2) * tl.num_programs(0) + tile
        if tl.atomic_add(lock, 1, sem="acq_rel") == tl.num_programs(1) - 1:
            # Nobody else comes for it, and a stronger order would wait for the stores to come.
            tl.atomic_xchg(lock, 0, sem="relaxed")
            tl.debug_barrier()
            total = _sum_parts(work + where, rows * lanes, mask, BM, BN)
            _finish(out, bias, total, where, mask, rn, lanes, BIAS)
    else:
        _finish(out, bias, total, where, mask, rn, lanes, BIAS)
