"""Codes to and from the layout's 16-bit words, in plain PyTorch, a few rows at a time.

A word holds codes of one row that lie ``width`` columns apart, so that a tile of words becomes a
tile of neighbouring columns by one shift and one mask, without a shuffle. With 4 bits and a width
of 32, word ``i`` of a chunk holds the columns ``i``, ``i + 32``, ``i + 64`` and ``i + 96``::

    bit  15..12   11..8    7..4     3..0
         i + 96   i + 64   i + 32   i

Paired words (16-entry tables) hold neighbours instead, as a byte permutation of 32 bits wants
them: for even ``i`` the words ``i`` and ``i + 1`` are ::

    word i       i+1 of slice 1, i of slice 1, i+1 of slice 0, i of slice 0
    word i + 1   i+1 of slice 3, i of slice 3, i+1 of slice 2, i of slice 2
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantmill_triton.facts import ROWS, Facts

__all__ = ["pack", "unpack", "words_shape"]

_ROWS_AT_ONCE = 16 * ROWS
"""Rows converted at a time: the temporaries are several times wider than the codes."""


def words_shape(facts: Facts, bits: int) -> tuple[int, int, int, int, int]:
    """Shape of a plane of ``bits`` bits: tiles of rows, chunks, words of a chunk, rows, width."""
    rows, _ = facts.padded
    return rows // ROWS, facts.chunks, facts.slices * bits // 16, ROWS, facts.width


def pack(codes: Tensor, facts: Facts, bits: int, low: int) -> Tensor:
    """Bits ``low`` to ``low + bits - 1`` of ``codes`` (uint8 ``[rows, columns]``) as int16 words.

    Padding is codes of zero: the activations that meet them are zero too.
    """
    shape = words_shape(facts, bits)
    out = torch.empty(shape, dtype=torch.int16, device=codes.device)
    _, columns = facts.padded
    for start in range(0, facts.rows, _ROWS_AT_ONCE):
        part = codes[start : start + _ROWS_AT_ONCE]
        padding = (0, columns - facts.columns, 0, -part.shape[0] % ROWS)
        part = torch.nn.functional.pad(part, padding)
        part = (part >> low) & ((1 << bits) - 1)
        part = part.reshape(-1, ROWS, facts.chunks, facts.slices, facts.width)
        if facts.paired:
            part = _pair(part)
        words = _join(part, bits).permute(0, 2, 3, 1, 4)
        out[start // ROWS : start // ROWS + words.shape[0]] = words
    return out


def unpack(words: Tensor, facts: Facts, bits: int) -> Tensor:
    """The codes of a plane: uint8 ``[rows, columns]``, without the padding."""
    out = torch.empty((facts.rows, facts.columns), dtype=torch.uint8, device=words.device)
    step = _ROWS_AT_ONCE // ROWS
    for start in range(0, words.shape[0], step):
        part = _split(words[start : start + step].permute(0, 3, 1, 2, 4), bits)
        if facts.paired:
            part = _unpair(part)
        part = part.reshape(part.shape[0] * ROWS, -1)[:, : facts.columns]
        rows = out[start * ROWS : start * ROWS + part.shape[0]]
        rows.copy_(part[: rows.shape[0]])
    return out


def _join(codes: Tensor, bits: int) -> Tensor:
    """``[..., slices, width]`` codes as ``[..., words, width]``."""
    per = 16 // bits
    codes = codes.reshape(*codes.shape[:-2], -1, per, codes.shape[-1])
    word = torch.zeros_like(codes[..., 0, :], dtype=torch.int32)
    for index in range(per):
        word |= codes[..., index, :].to(torch.int32) << (bits * index)
    # Two's complement by hand: a cast out of range is no promise.
    return torch.where(word > 0x7FFF, word - 0x10000, word).to(torch.int16)


def _split(words: Tensor, bits: int) -> Tensor:
    """``[..., words, width]`` as ``[..., slices, width]`` codes, uint8."""
    wide = words.to(torch.int32)
    mask = (1 << bits) - 1
    parts = [((wide >> shift) & mask).to(torch.uint8) for shift in range(0, 16, bits)]
    return torch.stack(parts, dim=-2).flatten(-3, -2)


def _pair(codes: Tensor) -> Tensor:
    """Reorder ``[..., 4, width]`` so that :func:`_join` makes paired words."""
    head, width = codes.shape[:-2], codes.shape[-1]
    # [half, slice of the half, word, column of the pair] to [slice, column, word, half]
    codes = codes.reshape(*head, 2, 2, width // 2, 2)
    return codes.movedim(-4, -1).transpose(-3, -2).reshape(*head, 4, width)


def _unpair(codes: Tensor) -> Tensor:
    """The inverse of :func:`_pair`."""
    head, width = codes.shape[:-2], codes.shape[-1]
    codes = codes.reshape(*head, 2, 2, width // 2, 2)
    return codes.transpose(-3, -2).movedim(-1, -4).reshape(*head, 4, width)
