# ruff: noqa: N803, N806  Triton's constants are written in capitals
"""From words of the layout to values: pieces of the kernels. Importing this imports Triton.

The assembly works on two words at a time: 16-bit values of neighbouring columns share a register,
which Triton's own operations do not use.
"""

from __future__ import annotations

import triton
import triton.language as tl

from quantmill_triton.assembly import (
    BF16_PAIR,
    FP16_PAIR,
    PAIR_OPERANDS,
    PREFETCH,
    PREFETCH_OPERANDS,
)

__all__ = [
    "bytes_of",
    "codes_of",
    "e8m0",
    "fetch",
    "floats",
    "integers",
    "join",
    "of_group",
    "paired_codes",
    "prefetch",
    "scales_of",
    "zeros_of",
]

_BF16_PAIR = tl.constexpr(BF16_PAIR)
_FP16_PAIR = tl.constexpr(FP16_PAIR)
_PAIR_OPERANDS = tl.constexpr(PAIR_OPERANDS)
# Bytes: 2**23 + code as float32, minus (2**23 + zero) ($2, $3), is an integer; two make a pair.
# $4 picks the byte of either word.
_BF16_BYTES = tl.constexpr(
    "{ .reg .b32 a, b; prmt.b32 a, $1, 0x4B000000, $4; prmt.b32 b, $1, 0x4B000000, $6;"
    " sub.f32 a, a, $2; sub.f32 b, b, $3; cvt.rn.bf16x2.f32 $0, b, a; }"
)
_FP16_BYTES = tl.constexpr(
    "{ .reg .b32 a, b; prmt.b32 a, $1, 0x4B000000, $4; prmt.b32 b, $1, 0x4B000000, $6;"
    " sub.f32 a, a, $2; sub.f32 b, b, $3; cvt.rn.f16x2.f32 $0, b, a; }"
)
_BYTE_OPERANDS = tl.constexpr("=r,r,f,f,r,r,r,r")
# Table of 16 entries by byte permutation, in steps of one result each: the compiler moves only such
# between layouts. A permutation looks up four codes in eight entries (_ENTRIES are their low three
# bits), and bit 3 of each code picks between two of them (_HALVES). $2 two paired words.
_ENTRIES = tl.constexpr("{ and.b32 $0, $2, 0x77777777; shr.b32 $1, $0, 16; }")
_HALVES = tl.constexpr(
    "{ .reg .b32 t; shr.b32 t, $2, 1; lop3.b32 $0, t, 0x44444444, 0x32103210, 0xEA;"
    " shr.b32 $1, $0, 16; }"
)
_CODE_OPERANDS = tl.constexpr("=&r,=r,r")
# $2, $3 and $4, $5 what to look up; $6, $8, $10, $12 the entries' low or high bytes.
_BYTES = tl.constexpr(
    "{ .reg .b32 a, b; prmt.b32 a, $6, $8, $2; prmt.b32 b, $10, $12, $2; prmt.b32 $0, a, b, $4;"
    " prmt.b32 a, $6, $8, $3; prmt.b32 b, $10, $12, $3; prmt.b32 $1, a, b, $5; }"
)
_BYTES_OPERANDS = tl.constexpr("=&r,=r,r,r,r,r,r,r,r,r,r,r,r,r")
# $1, $2 low bytes and $3, $4 high bytes of both words; $5 which two of four to join.
_JOIN_FIRST = tl.constexpr("prmt.b32 $0, $1, $3, $5;")
_JOIN_SECOND = tl.constexpr("prmt.b32 $0, $2, $4, $5;")
_JOIN_OPERANDS = tl.constexpr("=r,r,r,r,r,r,r")
_PREFETCH = tl.constexpr(PREFETCH)
_PREFETCH_OPERANDS = tl.constexpr(PREFETCH_OPERANDS)


@triton.jit
def codes_of(
    base, high, j: tl.constexpr, BITS: tl.constexpr, HIGH_BITS: tl.constexpr, WIDTH: tl.constexpr
):
    """Slice ``j`` of a chunk as int16 ``[BN, WIDTH]``; ``base``, ``high`` point at its words."""
    TILE: tl.constexpr = 64 * WIDTH
    words = tl.load(base + (j * BITS // 16) * TILE)
    codes = (words >> (j * BITS % 16)) & ((1 << BITS) - 1)
    if HIGH_BITS > 0:
        words = tl.load(high + (j * HIGH_BITS // 16) * TILE)
        codes |= ((words >> (j * HIGH_BITS % 16)) & ((1 << HIGH_BITS) - 1)) << BITS
    return codes


@triton.jit
def paired_codes(base, rs, j: tl.constexpr):
    """Slice ``j`` of paired words, by loading words twice: for where speed is no matter.

    ``base`` points at the first word of each row of the tile.
    """
    words = tl.load(base + ((rs & ~1) + (j >> 1))).to(tl.int32)
    return (words >> (8 * (j & 1) + 4 * (rs & 1))) & 15


@triton.jit
def e8m0(values):
    """float8_e8m0fnu bytes as float32: two to the power of ``value - 127``."""
    bits = tl.where(values == 0, 0x00400000, values.to(tl.int32) << 23)
    return tl.where(values == 255, 0x7FC00000, bits).to(tl.float32, bitcast=True)


@triton.jit
def scales_of(values, SCALES: tl.constexpr, PAIRS: tl.constexpr):
    """Scales as loaded, alone or with a zero, as float32.

    ``SCALES``: 0 float32, 1 bfloat16, 2 float16, 3 float8_e8m0fnu as uint8.
    """
    if PAIRS and SCALES == 0:
        return values.to(tl.int32).to(tl.float32, bitcast=True)
    elif PAIRS and SCALES == 1:
        return (values << 16).to(tl.float32, bitcast=True)
    elif PAIRS:
        return values.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    elif SCALES == 3:
        return e8m0(values)
    else:
        return values.to(tl.float32)


@triton.jit
def zeros_of(pairs, SCALES: tl.constexpr):
    """The zeros of pairs as loaded, as float32."""
    if SCALES == 0:
        return (pairs >> 32).to(tl.int32).to(tl.float32)
    else:
        return (pairs >> 16).to(tl.float32)


@triton.jit
def prefetch(pointers):
    """Start moving what ``pointers`` point at to the second-level cache; int32 zeros."""
    return tl.inline_asm_elementwise(
        _PREFETCH,
        _PREFETCH_OPERANDS,
        [pointers.to(tl.int64)],
        dtype=tl.int32,
        is_pure=True,
        pack=1,
    )


@triton.jit
def fetch(pointers):
    """As :func:`prefetch`, where no result says when."""
    tl.inline_asm_elementwise(
        _PREFETCH,
        _PREFETCH_OPERANDS,
        [pointers.to(tl.int64)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def of_group(
    pointers,
    chunk,
    flush: tl.constexpr,
    CHUNK: tl.constexpr,
    FLUSH: tl.constexpr,
    GROUP: tl.constexpr,
    groups,
    stride,
):
    """What belongs to the group of a partial sum, by ``pointers`` to that of the first group."""
    group = 0
    if GROUP > 0:
        group = tl.minimum((chunk * CHUNK + flush * FLUSH) // GROUP, groups - 1)
    return tl.load(pointers + group * stride)


@triton.jit
def floats(codes, zero, table, VALUES: tl.constexpr, OFFSET: tl.constexpr, MIDDLE: tl.constexpr):
    """Codes as float32: table entries, 8-bit floats, or integers minus the zero point ``[BN]``."""
    if VALUES == 1:
        return tl.load(table + codes.to(tl.int32))
    elif VALUES == 2:
        return codes.to(tl.int8).to(tl.float8e4nv, bitcast=True).to(tl.float32)
    elif VALUES == 3:
        return codes.to(tl.int8).to(tl.float8e5, bitcast=True).to(tl.float32)
    else:
        values = codes.to(tl.float32)
        if MIDDLE > 0:
            values -= MIDDLE
        if OFFSET == 1 or OFFSET == 2:
            values -= tl.expand_dims(zero, -1)
        return values


@triton.jit
def integers(
    words, zero, j: tl.constexpr, BITS: tl.constexpr, MIDDLE: tl.constexpr, dtype: tl.constexpr
):
    """Slice ``j`` minus the integer zero, in a 16-bit float and exact, two words at a time."""
    SHIFT: tl.constexpr = j * BITS % 16
    if BITS == 8:
        # Bytes 1 to 3 of the float come from 0x4B000000, byte 0 from the word.
        less = tl.expand_dims(zero + (8388608.0 + MIDDLE), -1)
        operands = [words, less, 0x7650 + SHIFT // 8, 0x7652 + SHIFT // 8]
        if dtype == tl.bfloat16:
            pair = tl.inline_asm_elementwise(
                _BF16_BYTES, _BYTE_OPERANDS, operands, dtype=tl.int16, is_pure=True, pack=2
            )
        else:
            pair = tl.inline_asm_elementwise(
                _FP16_BYTES, _BYTE_OPERANDS, operands, dtype=tl.int16, is_pure=True, pack=2
            )
    else:
        MASK: tl.constexpr = ((1 << BITS) - 1) * 0x10001
        if dtype == tl.bfloat16:
            less = tl.expand_dims((-(zero + (128.0 + MIDDLE))).to(tl.bfloat16), -1)
            pair = tl.inline_asm_elementwise(
                _BF16_PAIR,
                _PAIR_OPERANDS,
                [words, less, SHIFT, MASK],
                dtype=tl.int16,
                is_pure=True,
                pack=2,
            )
        else:
            less = tl.expand_dims((-(zero + (1024.0 + MIDDLE))).to(tl.float16), -1)
            pair = tl.inline_asm_elementwise(
                _FP16_PAIR,
                _PAIR_OPERANDS,
                [words, less, SHIFT, MASK],
                dtype=tl.int16,
                is_pure=True,
                pack=2,
            )
    return pair.to(dtype, bitcast=True)


@triton.jit
def bytes_of(words, b0, b1, b2, b3):
    """Low or high bytes (``b0`` to ``b3``) of the entries of four codes, int32 for each word."""
    entries = tl.inline_asm_elementwise(
        _ENTRIES, _CODE_OPERANDS, [words], dtype=tl.int32, is_pure=True, pack=2
    )
    halves = tl.inline_asm_elementwise(
        _HALVES, _CODE_OPERANDS, [words], dtype=tl.int32, is_pure=True, pack=2
    )
    return tl.inline_asm_elementwise(
        _BYTES,
        _BYTES_OPERANDS,
        [entries, halves, b0, b1, b2, b3],
        dtype=tl.int32,
        is_pure=True,
        pack=2,
    )


@triton.jit
def join(low, high, j: tl.constexpr, dtype: tl.constexpr):
    """Slice ``j`` of paired words from its entries' bytes."""
    pick = 0x5140 + (j % 2) * 0x2222
    if j < 2:
        pair = tl.inline_asm_elementwise(
            _JOIN_FIRST, _JOIN_OPERANDS, [low, high, pick], dtype=tl.int16, is_pure=True, pack=2
        )
    else:
        pair = tl.inline_asm_elementwise(
            _JOIN_SECOND, _JOIN_OPERANDS, [low, high, pick], dtype=tl.int16, is_pure=True, pack=2
        )
    return pair.to(dtype, bitcast=True)
