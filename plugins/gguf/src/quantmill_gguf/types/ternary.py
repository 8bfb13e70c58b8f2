"""Types of about two bits: TQ1_0, TQ2_0 and Q2_0."""

from __future__ import annotations

import torch
from torch import Tensor

from quantmill_gguf.types.affine import AffineType, Scales, finite, inverse_of, round_away
from quantmill_gguf.types.base import BlockType, half, halves, join_planes, planes

__all__ = ["Q2_0", "TQ1_0", "TQ2_0"]


def _digits(values: Tensor, top: int = 1) -> tuple[Tensor, Tensor]:
    """Codes from 0 on of float32 ``[blocks, n]`` and their float16 scale ``[blocks, 1]``."""
    scale = values.abs().amax(dim=1, keepdim=True)
    codes = round_away(finite(values * inverse_of(scale))).clamp(-1, top) + 1
    return codes.to(torch.uint8), scale.to(torch.float16)


class TQ2_0(AffineType):  # noqa: N801 ggml's name
    """64 bytes of codes, float16 scale."""

    name = "TQ2_0"
    makes = True
    bits, zero = 2, 1

    def codes(self, blocks: Tensor) -> Tensor:
        return planes(blocks[:, :64], 2, 32)

    def scales(self, blocks: Tensor) -> Scales:
        return Scales(half(blocks, 64))

    def put(self, codes: Tensor, scales: Scales) -> Tensor:
        return torch.cat([join_planes(codes, 2, 32), halves(scales.scale)], dim=1)

    def _quantize(self, values: Tensor, importance: Tensor | None) -> Tensor:
        codes, scale = _digits(values)
        return self.put(codes, Scales(scale))


class Q2_0(AffineType):  # noqa: N801
    """float16 scale, 16 bytes of four codes each in order."""

    name = "Q2_0"
    bits, zero = 2, 1
    makes = True

    def codes(self, blocks: Tensor) -> Tensor:
        return planes(blocks[:, 2:], 2, 1)

    def scales(self, blocks: Tensor) -> Scales:
        return Scales(half(blocks, 0))

    def put(self, codes: Tensor, scales: Scales) -> Tensor:
        return torch.cat([halves(scales.scale), join_planes(codes, 2, 1)], dim=1)

    def _quantize(self, values: Tensor, importance: Tensor | None) -> Tensor:
        codes, scale = _digits(values, 2)
        return self.put(codes, Scales(scale))


_RUNS = ((0, 32, 5), (32, 48, 5), (48, 52, 4))
"""First and last byte of the runs of a TQ1_0 block, and the digits of each of their bytes."""


class TQ1_0(BlockType):  # noqa: N801
    """48 bytes of five base-3 digits, 4 of four, float16 scale.

    A byte holds its digits as a fraction of 256, the first one in front: multiplied by three,
    what runs over is the next digit. More than one byte means the same digits, so the core's
    forms, which keep digits, could not give the bytes back.
    """

    name = "TQ1_0"
    makes = True

    def _decode(self, blocks: Tensor) -> Tensor:
        found = []
        for start, stop, count in _RUNS:
            part = blocks[:, start:stop].to(torch.int32)
            for power in range(count):
                found.append((((part * 3**power) & 255) * 3) >> 8)
        codes = torch.cat(found, dim=1).to(torch.float32) - 1.0
        return codes * half(blocks, 52).to(torch.float32)

    def _quantize(self, values: Tensor, importance: Tensor | None) -> Tensor:
        codes, scale = _digits(values)
        parts, position = [], 0
        for start, stop, count in _RUNS:
            width = stop - start
            run = codes[:, position : position + count * width].reshape(-1, count, width)
            position += count * width
            number = torch.zeros_like(run[:, 0], dtype=torch.int32)
            for index in range(5):
                number = number * 3
                if index < count:
                    number = number + run[:, index]
            parts.append(((number * 256 + 242) // 243).to(torch.uint8))
        return torch.cat([*parts, halves(scale)], dim=1)
