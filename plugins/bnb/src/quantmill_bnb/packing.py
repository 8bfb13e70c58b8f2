"""The library's order of 4-bit codes for its fused CPU kernel, to and fro, in little memory.

Packed, each run of 32 bytes holds, for one pair of columns, the codes of 32 rows: 64 codes, the
first 32 in the low nibbles, the others in the high ones. Scales are bfloat16 there, by blocks of a
row before rows. The library itself packs a weight at its first forward over temporaries of some 18
times its bytes; here its function is given a few rows at a time.
"""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any, Final

import torch
from bitsandbytes import functional
from torch import Tensor

__all__ = ["PACK_ROWS", "can_pack", "pack", "unpack"]

PACK_ROWS: Final = 32
"""Rows that the library's CPU kernel takes at a time."""
_SLICE: Final = 1 << 18
"""Weights of a slice, about."""


def can_pack() -> bool:
    """Whether the library has the function that it packs with."""
    return hasattr(functional, "_convert_weight_packed_for_cpu")


def pack(data: Tensor, state: Any) -> tuple[Tensor, Any]:
    """``data`` (codes as they lie on the disk, in any dtype) packed, and the state for it; both
    are new, and what the library's own function would have made."""
    rows, columns = state.shape
    codes = data.view(torch.uint8).reshape(rows, columns // 2)
    scales = state.absmax
    if state.nested:
        scales = functional.dequantize_blockwise(scales, state.state2) + state.offset
    scales = scales.reshape(rows, -1)
    packed = torch.empty_like(codes)
    absmax = torch.empty((scales.shape[1], rows), dtype=torch.bfloat16)
    step = max(PACK_ROWS, _SLICE // columns // PACK_ROWS * PACK_ROWS)
    for first in range(0, rows, step):
        part = slice(first, first + step)
        some = SimpleNamespace(
            dtype=state.dtype,
            nested=False,
            shape=(codes[part].shape[0], columns),
            absmax=scales[part],
            blocksize=state.blocksize,
        )
        packed[part], some = functional._convert_weight_packed_for_cpu(codes[part], some)
        absmax[:, part] = some.absmax
    made = copy.copy(state)
    made.original_storage_type = data.dtype
    made.original_dtype, made.original_nested = state.dtype, state.nested
    made.original_qshape = data.view(torch.uint8).shape
    made.absmax, made.nested, made.dtype = absmax, False, torch.bfloat16
    made.state2 = None
    made.packing_format_for_cpu = True
    return packed, made


def unpack(packed: Tensor, state: Any) -> Tensor:
    """The disk order of codes: uint8 ``[ceil(n / 2)]``."""
    rows, columns = state.shape
    runs = packed.reshape(-1, PACK_ROWS)
    codes = torch.cat([runs & 0x0F, runs >> 4], dim=1)
    codes = codes.reshape(rows // PACK_ROWS, columns // 2, PACK_ROWS, 2).transpose(1, 2)
    pairs = codes.reshape(-1, 2)
    return (pairs[:, 0] << 4) | pairs[:, 1]
