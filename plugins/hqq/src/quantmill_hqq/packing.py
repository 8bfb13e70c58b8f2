"""How HQQ lays codes into words: along the first axis, the first slice in the highest bits.

A matrix of codes ``[rows, columns]`` is cut into as many slices of rows as codes fit a word; word
``[i, j]`` holds code ``[i, j]`` of every slice. Words are uint8, with 3 bits int32 of ten codes
(and two bits unused), where the last slice is padded with zeros.

Source: the names and bytes of the checkpoints in ``tests/data``.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["NAMES", "WORDS", "fits", "pack", "unpack", "words_of"]

NAMES = {8: "8bit_u8", 4: "4bit_u8", 3: "3bit_32", 2: "2bit_u8", 1: "1bit_u8"}
"""Bits to the name of the packing in a file."""
_PER_WORD = {8: 1, 4: 2, 3: 10, 2: 4, 1: 8}
WORDS = {bits: torch.int32 if bits == 3 else torch.uint8 for bits in NAMES}
"""Bits to the dtype of a word."""


def fits(rows: int, bits: int) -> bool:
    """Whether ``rows`` rows of codes can be packed; only 3 bits are padded."""
    return bits == 3 or rows % _PER_WORD[bits] == 0


def words_of(rows: int, bits: int) -> int:
    """Rows of words for ``rows`` rows of codes."""
    return -(-rows // _PER_WORD[bits])


def pack(codes: Tensor, bits: int) -> Tensor:
    """Words ``[words_of(rows), columns]`` of uint8 codes ``[rows, columns]``."""
    rows, columns = codes.shape
    step, per_word = words_of(rows, bits), _PER_WORD[bits]
    words = torch.zeros(step, columns, dtype=WORDS[bits], device=codes.device)
    for index in range(per_word):
        part = codes[index * step : (index + 1) * step].to(words.dtype)
        words[: part.shape[0]] |= part << bits * (per_word - 1 - index)
    return words


def unpack(words: Tensor, bits: int, rows: int) -> Tensor:
    """uint8 codes ``[rows, columns]`` of words: the inverse."""
    step, per_word = words.shape[0], _PER_WORD[bits]
    codes = torch.empty(rows, words.shape[1], dtype=torch.uint8, device=words.device)
    mask = (1 << bits) - 1
    for index in range(per_word):
        part = codes[index * step : (index + 1) * step]
        part.copy_((words[: part.shape[0]] >> bits * (per_word - 1 - index)) & mask)
    return codes
