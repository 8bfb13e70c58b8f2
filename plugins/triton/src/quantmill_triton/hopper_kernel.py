# ruff: noqa: N803, N806  Triton's constants are written in capitals
"""The matmul kernel for Hopper GPUs, in Triton's Gluon. Importing this module imports Triton.

For 4 bits with a zero beside each scale, where the time goes into waiting: for the product before
its operand may be overwritten, for all warps before a place of the pipeline is filled again. So a
warp of its own moves tiles from memory (the bulk copy engine, which says by a barrier in shared
memory that they have come), and four or eight warps unpack codes while tensor cores multiply those
before. On an H200 that takes 0.9 of the other kernel's time with few rows of activations, 0.7 with
64.

The arithmetic is that of :mod:`quantmill_triton.kernels`: integers in 16-bit floats, the sum of a
group scaled in float32.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)

from quantmill_triton.assembly import (
    BF16_PAIR,
    FP16_PAIR,
    PAIR_OPERANDS,
    PREFETCH,
    PREFETCH_OPERANDS,
)

__all__ = ["PAIRS", "TILES", "streamed_kernel"]

TILES = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=3)
"""Tiles of codes and of activations in shared memory, as tensor cores want them."""
PAIRS = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=2)
"""Scales and zeros in shared memory."""

_BF16_PAIR = gl.constexpr(BF16_PAIR)
_FP16_PAIR = gl.constexpr(FP16_PAIR)
_PAIR_OPERANDS = gl.constexpr(PAIR_OPERANDS)
_PREFETCH = gl.constexpr(PREFETCH)
_PREFETCH_OPERANDS = gl.constexpr(PREFETCH_OPERANDS)

# Names that Gluon has changed since Triton 3.6.
_barrier = gl.thread_barrier if hasattr(gl, "thread_barrier") else gl.barrier
_RENAMED = gl.constexpr(hasattr(gl.shared_memory_descriptor, "reinterpret"))


@gluon.jit
def _seen_as(memory, shape: gl.constexpr, layout: gl.constexpr):
    """Shared memory with another shape: the bytes stay where they are."""
    if _RENAMED:
        return memory.reinterpret(memory.dtype, shape, layout)
    else:
        return memory._reinterpret(memory.dtype, shape, layout)


@gluon.jit
def _weights(words, less, j: gl.constexpr, dtype: gl.constexpr):
    """Slice ``j`` minus the zero, exact."""
    ASSEMBLY: gl.constexpr = _BF16_PAIR if dtype == gl.bfloat16 else _FP16_PAIR
    pair = gl.inline_asm_elementwise(
        ASSEMBLY,
        _PAIR_OPERANDS,
        [words, less, j * 4, 0xF000F],
        dtype=gl.int16,
        is_pure=True,
        pack=2,
    )
    return pair.to(dtype, bitcast=True)


@gluon.jit
def _less(pairs, layout: gl.constexpr, dtype: gl.constexpr):
    """``-(2**n + zero)`` by row, where ``2**n`` is what codes have on top of them: its mantissa is
    the zero."""
    SIGN: gl.constexpr = 0xC300 if dtype == gl.bfloat16 else 0xE400
    bits = ((pairs >> 16) | SIGN).to(gl.int16)
    less = gl.convert_layout(bits.to(dtype, bitcast=True), gl.SliceLayout(1, layout))
    return gl.expand_dims(less, 1)


@gluon.jit
def _scales(pairs, HALF: gl.constexpr):
    if HALF:
        return gl.expand_dims(pairs.to(gl.int16).to(gl.float16, bitcast=True).to(gl.float32), 1)
    else:
        return gl.expand_dims((pairs << 16).to(gl.float32, bitcast=True), 1)


@gluon.jit
def _wait_for_kernel_before():
    gl.inline_asm_elementwise(
        "griddepcontrol.wait; // dummy $0", "=r", [], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def _start_kernel_after():
    gl.inline_asm_elementwise(
        "griddepcontrol.launch_dependents; // dummy $0",
        "=r",
        [],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def _fetch_early(codes, length, EARLY: gl.constexpr, WARPS: gl.constexpr):
    """Start moving ``EARLY`` bytes of codes to the second-level cache."""
    LINES: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    pointers = codes + gl.minimum(gl.arange(0, EARLY // 128, LINES) * 64, length - 1)
    gl.inline_asm_elementwise(
        _PREFETCH,
        _PREFETCH_OPERANDS,
        [pointers.to(gl.int64)],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def _move(
    x, codes, pairs, x_at, codes_at, pairs_at, full, empty, tile, row, first, count,
    BLOCKS: gl.constexpr, BM: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The warp that moves: each place is filled when it is empty."""
    place = 0
    phase = 1  # All are empty at first.
    for c in range(count):
        mbarrier.wait(empty.index(place), phase)
        arrived = full.index(place)
        mbarrier.expect(arrived, BLOCKS * (64 * 64 * 2 + 2 * 64 * 4) + BM * 256 * 2)
        chunk = first + c
        tma.async_copy_global_to_shared(
            codes, [tile * BLOCKS, chunk * 64, 0], arrived, codes_at.index(place)
        )
        tma.async_copy_global_to_shared(
            pairs, [chunk * 2, tile * (64 * BLOCKS)], arrived, pairs_at.index(place)
        )
        tma.async_copy_global_to_shared(x, [chunk * 4, row, 0], arrived, x_at.index(place))
        place += 1
        if place == STAGES:
            place = 0
            phase ^= 1


@gluon.jit
def _multiply(
    x_at, codes_at, pairs_at, full, empty, count,
    BLOCKS: gl.constexpr, BM: gl.constexpr, STAGES: gl.constexpr, HALF: gl.constexpr,
    WARPS: gl.constexpr, dtype: gl.constexpr,
):  # fmt: skip
    """The warps that multiply: sums ``[64 * BLOCKS, BM]`` over all chunks.

    A chunk has two groups of two slices. While the tensor cores multiply one group's, the next
    one's codes are unpacked.
    """
    MMA: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[WARPS, 1], instr_shape=[16, BM, 16]
    )
    LEFT: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=MMA, k_width=2)
    BY_ROW: gl.constexpr = gl.SliceLayout(1, MMA)
    nothing = gl.zeros([64 * BLOCKS, BM], gl.float32, MMA)
    total = nothing
    second = warpgroup_mma_init(nothing)
    second_scale = gl.expand_dims(gl.zeros([64 * BLOCKS], gl.float32, BY_ROW), 1)
    place = 0
    phase = 0
    for c in range(count):
        mbarrier.wait(full.index(place), phase)
        pairs_0 = pairs_at.index(place * 2).load(BY_ROW)
        pairs_1 = pairs_at.index(place * 2 + 1).load(BY_ROW)
        words = codes_at.index(place).load(LEFT)
        less = _less(pairs_0, LEFT, dtype)
        weights_0 = _weights(words, less, 0, dtype)
        weights_1 = _weights(words, less, 1, dtype)
        sums = warpgroup_mma_wait(0, deps=[second])
        total += sums * second_scale
        first = warpgroup_mma(
            weights_0,
            x_at.index(place * 4).permute((1, 0)),
            nothing,
            use_acc=False,
            is_async=True,
        )
        first = warpgroup_mma(
            weights_1, x_at.index(place * 4 + 1).permute((1, 0)), first, is_async=True
        )
        # Nobody needs the place of the chunk before any more.
        before = gl.where(place == 0, STAGES - 1, place - 1)
        _barrier()
        mbarrier.arrive(empty.index(before), count=1, pred=c > 0)
        second_scale = _scales(pairs_1, HALF)
        less = _less(pairs_1, LEFT, dtype)
        weights_0 = _weights(words, less, 2, dtype)
        weights_1 = _weights(words, less, 3, dtype)
        sums = warpgroup_mma_wait(0, deps=[first])
        total += sums * _scales(pairs_0, HALF)
        second = warpgroup_mma(
            weights_0,
            x_at.index(place * 4 + 2).permute((1, 0)),
            nothing,
            use_acc=False,
            is_async=True,
        )
        second = warpgroup_mma(
            weights_1, x_at.index(place * 4 + 3).permute((1, 0)), second, is_async=True
        )
        place += 1
        if place == STAGES:
            place = 0
            phase ^= 1
    sums = warpgroup_mma_wait(0, deps=[second])
    # A tuple is what leaves the warps' part of the program.
    return (total + sums * second_scale,)


@gluon.jit
def _finish(out, bias, total, where, mask, rn, lanes, BIAS: gl.constexpr, FACTOR: gl.constexpr):
    """Scale by the form's factor, add the bias, round and store."""
    if FACTOR != 1:
        total *= FACTOR
    if BIAS:
        total += gl.expand_dims(gl.load(bias + rn, mask=rn < lanes, other=0.0).to(gl.float32), 1)
    gl.store(out + where, total.to(out.dtype.element_ty), mask=mask)


@gluon.jit(do_not_specialize=["rows", "chunks", "part"])
def streamed_kernel(
    x,
    codes,
    pairs,
    first_codes,
    bias,
    out,
    work,
    locks,
    rows,
    lanes,
    chunks,
    part,
    BLOCKS: gl.constexpr,
    BM: gl.constexpr,
    STAGES: gl.constexpr,
    HALF: gl.constexpr,
    WARPS: gl.constexpr,
    BIAS: gl.constexpr,
    FACTOR: gl.constexpr,
    SPLIT: gl.constexpr,
    EARLY: gl.constexpr,
):
    """``out[m, n] = sum_k x[m, k] * weight[n, k] + bias[n]`` for ``64 * BLOCKS`` rows of the weight
    ``BM`` rows of ``x`` and one part of ``k``; 4-bit codes, groups of 128.

    Program ``(n * tiles + m, s)`` sums the chunks ``s * part`` to ``(s + 1) * part`` for the
    ``n``-th tile of the weight and the ``m``-th of ``x``, by as many ``WARPS``. Sums of several
    parts meet as in :func:`quantmill_triton.kernels.matmul_kernel`, in ``work`` and by ``locks``.

    ``x``, ``codes`` and ``pairs`` are descriptors: bfloat16 or float16 ``[columns / 64, rows, 64]``
    in tiles of four slices, int16 ``[blocks of 64 rows, chunks * 64, 64]`` in tiles of ``BLOCKS``
    times a chunk, and int32 ``[groups, lanes]`` in tiles of two groups; see
    :mod:`quantmill_triton.layout`. What lies beyond them counts as zeros. ``HALF``: scales are
    float16, not bfloat16. ``EARLY`` is that of the other kernel.
    """
    MMA: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[WARPS, 1], instr_shape=[16, BM, 16]
    )
    FLAT: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    LINE: gl.constexpr = gl.SwizzledSharedLayout(vec=1, per_phase=1, max_phase=1, order=[0])
    dtype: gl.constexpr = x.dtype
    # Neighbours share a weight's tile, which the second-level cache then has.
    tiles = (rows + (BM - 1)) // BM
    tile = gl.program_id(0) // tiles
    row = (gl.program_id(0) % tiles) * BM
    first = gl.program_id(1) * part
    count = gl.minimum(part, chunks - first)
    codes_at = gl.allocate_shared_memory(gl.int16, [STAGES, BLOCKS, 64, 64], codes.layout)
    x_at = gl.allocate_shared_memory(dtype, [STAGES, 4, BM, 64], x.layout)
    pairs_at = gl.allocate_shared_memory(gl.int32, [STAGES, 2, 64 * BLOCKS], pairs.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for s in gl.static_range(STAGES):
        mbarrier.init(full.index(s), count=1)
        mbarrier.init(empty.index(s), count=1)
    if EARLY >= 0:
        _start_kernel_after()
        if EARLY > 0:
            for b in gl.static_range(BLOCKS):
                start = ((tile * BLOCKS + b) * chunks + first) * 4096
                _fetch_early(first_codes + start, count * 4096, EARLY, WARPS)
        _wait_for_kernel_before()
    results = gl.warp_specialize(
        [
            (
                _multiply,
                (
                    _seen_as(x_at, [STAGES * 4, BM, 64], FLAT),
                    _seen_as(codes_at, [STAGES, 64 * BLOCKS, 64], FLAT),
                    _seen_as(pairs_at, [STAGES * 2, 64 * BLOCKS], LINE),
                    full, empty, count, BLOCKS, BM, STAGES, HALF, WARPS, dtype,
                ),
            ),
            (
                _move,
                (
                    x, codes, pairs, x_at, codes_at, pairs_at, full, empty, tile, row, first,
                    count, BLOCKS, BM, STAGES,
                ),
            ),
        ],
        [1],
        [24],
    )  # fmt: skip
    total = results[0]
    rm = row + gl.arange(0, BM, gl.SliceLayout(0, MMA))
    rn = tile * (64 * BLOCKS) + gl.arange(0, 64 * BLOCKS, gl.SliceLayout(1, MMA))
    where = gl.expand_dims(rm, 0) * lanes + gl.expand_dims(rn, 1)
    mask = gl.expand_dims(rm < rows, 0) & gl.expand_dims(rn < lanes, 1)
    if SPLIT:
        gl.store(work + gl.program_id(1) * rows * lanes + where, total, mask=mask)
        # All threads' sums are out before the one that counts says so.
        _barrier()
        lock = locks + gl.program_id(0)
        if gl.atomic_add(lock, 1, sem="acq_rel") == gl.num_programs(1) - 1:
            gl.atomic_xchg(lock, 0, sem="relaxed")
            _barrier()
            whole = gl.zeros([64 * BLOCKS, BM], gl.float32, MMA)
            for other in range(gl.num_programs(1)):
                pointers = work + other * rows * lanes + where
                whole += gl.load(pointers, mask=mask, other=0.0, cache_modifier=".cg")
            _finish(out, bias, whole, where, mask, rn, lanes, BIAS, FACTOR)
    else:
        _finish(out, bias, total, where, mask, rn, lanes, BIAS, FACTOR)
