"""Rows of codes as 32-bit words.

Each row is a stream of codes, the first in the lowest bits, in little-endian words; a code may
lie in two words, and the unused bits of a row's last word are zero. That is the packing of
compressed-tensors' format ``pack-quantized`` since version 0.15 for all widths; those that divide
32 looked the same before.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantmill.forms import Codes

__all__ = ["pack_rows", "row_words", "unpack_rows", "widths"]


def row_words(columns: int, bits: int) -> int:
    """Words of a row."""
    return -(-columns * bits // 32)


def widths(columns: int, words: int) -> list[int]:
    """The bits per code with which ``columns`` codes fill ``words`` words."""
    return [bits for bits in range(1, 9) if row_words(columns, bits) == words]


def pack_rows(codes: Codes) -> Tensor:
    """int32 ``[rows, words]`` of dense codes ``[rows, columns]``; without a copy where rows end
    with a word."""
    rows, columns = codes.shape
    words = row_words(columns, codes.bits)
    if codes.data.is_meta:
        return torch.empty(rows, words, dtype=torch.int32, device="meta")
    if columns * codes.bits % 32 == 0:
        dense = codes.repacked("dense").data.contiguous()
        return dense.view(torch.int32).reshape(rows, words)
    padded = _padded(columns, codes.bits)
    wide = torch.zeros(rows, padded, dtype=torch.uint8, device=codes.data.device)
    wide[:, :columns] = codes.unpack()
    dense = Codes.pack(wide, codes.bits, "dense").data
    full = dense.view(torch.int32).reshape(rows, padded * codes.bits // 32)
    return full[:, :words].contiguous()


def unpack_rows(words: Tensor, bits: int, columns: int) -> Codes:
    """The dense codes ``[rows, columns]`` of int32 ``[rows, words]``."""
    rows = words.shape[0]
    if columns * bits % 32 == 0:
        data = words.contiguous().view(torch.uint8).reshape(-1)
        return Codes(data, bits, (rows, columns), "dense")
    padded = _padded(columns, bits)
    full = words.new_zeros(rows, padded * bits // 32)
    full[:, : words.shape[1]] = words
    wide = Codes(full.view(torch.uint8).reshape(-1), bits, (rows, padded), "dense").unpack()
    return Codes.pack(wide[:, :columns].contiguous(), bits, "dense")


def _padded(columns: int, bits: int) -> int:
    """Columns until a row ends with a word, whatever the width: every 32 codes."""
    return -(-columns // 32) * 32
