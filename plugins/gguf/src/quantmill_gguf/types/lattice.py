"""IQ1, IQ2 and IQ3: codes that name points of a lattice, eight or four values at a time.

Blocks have 256 values. Points have positive coordinates and signs beside them (IQ2, IQ3), or a
small shift (IQ1). The core has no such form: these decode from their bytes.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from quantmill_gguf.types.base import BlockType, half, planes
from quantmill_gguf.types.grids import grid

__all__ = [
    "IQ1_M",
    "IQ1_S",
    "IQ2_S",
    "IQ2_XS",
    "IQ2_XXS",
    "IQ3_S",
    "IQ3_XXS",
    "LATTICES",
]

LATTICES: Final = {
    "IQ1_M": "iq1",
    "IQ1_S": "iq1",
    "IQ2_S": "iq2_s",
    "IQ2_XS": "iq2_xs",
    "IQ2_XXS": "iq2_xxs",
    "IQ3_S": "iq3_s",
    "IQ3_XXS": "iq3_xxs",
}
"""Name of each type's lattice in :mod:`quantmill_gguf.types.grids`."""


def _words(data: Tensor, width: int) -> Tensor:
    """Little-endian numbers of ``width`` bytes, int64 ``[blocks, bytes / width]``."""
    parts = data.reshape(data.shape[0], -1, width).to(torch.int64)
    total = parts[..., 0]
    for index in range(1, width):
        total = total | (parts[..., index] << (8 * index))
    return total


def _fields(words: Tensor, shifts: tuple[int, ...], mask: int) -> Tensor:
    """``words >> shift & mask`` for each shift, int64 ``[blocks, words * shifts]``."""
    parts = [(words >> shift) & mask for shift in shifts]
    return torch.stack(parts, dim=-1).reshape(words.shape[0], -1)


def _seven(signs: Tensor) -> Tensor:
    """Eight sign bits of seven: the last makes the number of ones even."""
    parity = signs
    for shift in (4, 2, 1):
        parity = parity ^ (parity >> shift)
    return signs | ((parity & 1) << 7)


def _signs(bits: Tensor) -> Tensor:
    """-1 or 1, float32 ``[blocks, n, 8]`` of eight bits each ``[blocks, n]``."""
    spread = (bits.to(torch.int64).unsqueeze(-1) >> torch.arange(8, device=bits.device)) & 1
    return 1.0 - 2.0 * spread.to(torch.float32)


def _points(name: str, index: Tensor) -> Tensor:
    """float32 ``[blocks, 256]`` of int64 ``[blocks, n]``."""
    table = grid(name).to(index.device)
    return table[index].reshape(index.shape[0], -1)


def _signed(scale: Tensor, points: Tensor, signs: Tensor) -> Tensor:
    """``scale * points * signs``; ``scale`` is ``[blocks, groups]``."""
    count = points.shape[0]
    values = scale.unsqueeze(-1) * points.reshape(count, scale.shape[1], -1)
    return values.reshape(count, -1) * signs.reshape(count, -1)


def _scale(blocks: Tensor, steps: Tensor, share: float) -> Tensor:
    return half(blocks, 0).to(torch.float32) * (steps.to(torch.float32) + 0.5) * share


class IQ2_XXS(BlockType):  # noqa: N801 ggml's name
    """float16 scale; for each 32 values four points of 8 and a word: 4 x 7 signs, 4-bit scale."""

    name = "IQ2_XXS"

    def _decode(self, blocks: Tensor) -> Tensor:
        parts = blocks[:, 2:].reshape(blocks.shape[0], 8, 2, 4)
        index = parts[:, :, 0].reshape(blocks.shape[0], -1).to(torch.int64)
        words = _words(parts[:, :, 1], 4)
        signs = _signs(_seven(_fields(words, (0, 7, 14, 21), 127)))
        return _signed(_scale(blocks, words >> 28, 0.25), _points("iq2_xxs", index), signs)


class IQ2_XS(BlockType):  # noqa: N801
    """float16 scale, 32 words of a 9-bit point and 7 signs, 16 scales of 4 bits."""

    name = "IQ2_XS"

    def _decode(self, blocks: Tensor) -> Tensor:
        words = _words(blocks[:, 2:66], 2)
        scale = _scale(blocks, planes(blocks[:, 66:], 4, 1), 0.25)
        return _signed(scale, _points("iq2_xs", words & 511), _signs(_seven(words >> 9)))


class IQ2_S(BlockType):  # noqa: N801
    """float16 scale, 32 low bytes of points, 32 of signs, 8 of two high bits each, 16 scales."""

    name = "IQ2_S"

    def _decode(self, blocks: Tensor) -> Tensor:
        high = planes(blocks[:, 66:74], 2, 1).to(torch.int64)
        index = blocks[:, 2:34].to(torch.int64) | (high << 8)
        scale = _scale(blocks, planes(blocks[:, 74:], 4, 1), 0.25)
        return _signed(scale, _points("iq2_s", index), _signs(blocks[:, 34:66]))


class IQ3_XXS(BlockType):  # noqa: N801
    """float16 scale, 64 points of 4, for each 32 values a word: 4 x 7 signs, 4-bit scale."""

    name = "IQ3_XXS"

    def _decode(self, blocks: Tensor) -> Tensor:
        words = _words(blocks[:, 66:], 4)
        signs = _signs(_seven(_fields(words, (0, 7, 14, 21), 127)))
        points = _points("iq3_xxs", blocks[:, 2:66].to(torch.int64))
        return _signed(_scale(blocks, words >> 28, 0.5), points, signs)


class IQ3_S(BlockType):  # noqa: N801
    """float16 scale, 64 low bytes of points, their 64 ninth bits, 32 bytes of signs, 8 scales."""

    name = "IQ3_S"

    def _decode(self, blocks: Tensor) -> Tensor:
        ninth = planes(blocks[:, 66:74], 1, 1).to(torch.int64)
        index = blocks[:, 2:66].to(torch.int64) | (ninth << 8)
        steps = 2 * planes(blocks[:, 106:], 4, 1) + 1
        scale = half(blocks, 0).to(torch.float32) * steps.to(torch.float32)
        return _signed(scale, _points("iq3_s", index), _signs(blocks[:, 74:106]))


def _shifted(scale: Tensor, points: Tensor, negative: Tensor) -> Tensor:
    """``scale * (points +- 1/8)``; scale and sign are per group, ``[blocks, groups]`` each."""
    count = points.shape[0]
    shift = 0.125 - 0.25 * negative.to(torch.float32)
    moved = points.reshape(count, shift.shape[1], -1) + shift.unsqueeze(-1)
    values = moved.reshape(count, scale.shape[1], -1) * scale.unsqueeze(-1)
    return values.reshape(count, -1)


class IQ1_S(BlockType):  # noqa: N801
    """float16 scale, 32 low bytes of points, 8 words: 4 x 3 high bits, 3-bit scale, sign."""

    name = "IQ1_S"

    def _decode(self, blocks: Tensor) -> Tensor:
        words = _words(blocks[:, 34:], 2)
        high = _fields(words, (0, 3, 6, 9), 7)
        index = blocks[:, 2:34].to(torch.int64) | (high << 8)
        steps = (2 * ((words >> 12) & 7) + 1).to(torch.float32)
        scale = half(blocks, 0).to(torch.float32) * steps
        return _shifted(scale, _points("iq1", index), words >> 15)


class IQ1_M(BlockType):  # noqa: N801
    """32 low bytes of points, 32 nibbles of three high bits and a sign, 4 words of 4 x 3-bit
    scales whose top nibbles together are the float16 scale."""

    name = "IQ1_M"

    def _decode(self, blocks: Tensor) -> Tensor:
        nibbles = planes(blocks[:, 32:48], 4, 1).to(torch.int64)
        index = blocks[:, :32].to(torch.int64) | ((nibbles & 7) << 8)
        words = _words(blocks[:, 48:], 2)
        tops = words >> 12
        whole = tops[:, 0] | (tops[:, 1] << 4) | (tops[:, 2] << 8) | (tops[:, 3] << 12)
        pair = torch.stack([whole & 255, whole >> 8], dim=1).to(torch.uint8)
        steps = (2 * _fields(words, (0, 3, 6, 9), 7) + 1).to(torch.float32)
        scale = half(pair, 0).to(torch.float32) * steps
        return _shifted(scale, _points("iq1", index), nibbles >> 3)
