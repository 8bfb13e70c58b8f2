"""K-quants: super-blocks of 256 values, groups of 16 or 32 with small integers as scales."""

from __future__ import annotations

import torch
from torch import Tensor

from quantmill_gguf.types.affine import AffineType, Scales
from quantmill_gguf.types.base import BlockType, half, halves, join_planes, planes
from quantmill_gguf.types.kfit import fit_q3, fit_q6, fit_ranged
from quantmill_gguf.types.search import in_order, square_root

__all__ = ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q8_K"]


class Q2_K(AffineType):  # noqa: N801 ggml's name
    """16 bytes of 4-bit scales and minima, 64 bytes of codes, float16 scale and minimum."""

    name = "Q2_K"
    makes = weighs = True
    bits, groups, step_bits = 2, 16, 4

    def codes(self, blocks: Tensor) -> Tensor:
        return planes(blocks[:, 16:80], 2, 32)

    def scales(self, blocks: Tensor) -> Scales:
        pairs = blocks[:, :16]
        return Scales(half(blocks, 80), pairs & 15, half(blocks, 82), pairs >> 4)

    def put(self, codes: Tensor, scales: Scales) -> Tensor:
        assert scales.steps is not None and scales.minimum is not None
        assert scales.minimum_steps is not None
        pairs = scales.steps | (scales.minimum_steps << 4)
        tail = [halves(scales.scale), halves(scales.minimum)]
        return torch.cat([pairs, join_planes(codes, 2, 32), *tail], dim=1)

    def _quantize(self, values: Tensor, importance: Tensor | None) -> Tensor:
        codes, scales = fit_ranged(
            values,
            importance,
            bits=2,
            groups=16,
            levels=15,
            plain_weights=torch.abs,
            search=(-0.5, 0.1, 15, True),
            energy=1.0,
        )
        return self.put(codes, scales)


class Q3_K(AffineType):  # noqa: N801
    """32 bytes of third bits, 64 of low bits, 12 of 6-bit scales, float16 scale.

    Scales are stored plus 32: the low halves of all sixteen in eight bytes (the first eight in
    the low nibbles), then two more bits of each in four bytes.
    """

    name = "Q3_K"
    makes = weighs = True
    bits, zero, groups = 3, 4, 16

    def codes(self, blocks: Tensor) -> Tensor:
        return planes(blocks[:, 32:96], 2, 32) | (planes(blocks[:, :32], 1, 32) << 2)

    def scales(self, blocks: Tensor) -> Scales:
        steps = planes(blocks[:, 96:104], 4, 8) | (planes(blocks[:, 104:108], 2, 4) << 4)
        signed = steps.to(torch.int8) - 32
        return Scales(half(blocks, 108), signed)

    def put(self, codes: Tensor, scales: Scales) -> Tensor:
        assert scales.steps is not None
        steps = (scales.steps + 32).to(torch.uint8)
        low, high = join_planes(steps, 4, 8), join_planes(steps >> 4, 2, 4)
        third, codes = join_planes(codes >> 2, 1, 32), join_planes(codes, 2, 32)
        return torch.cat([third, codes, low, high, halves(scales.scale)], dim=1)

    def _quantize(self, values: Tensor, importance: Tensor | None) -> Tensor:
        return self.put(*fit_q3(values, importance))


def _six(packed: Tensor) -> tuple[Tensor, Tensor]:
    """Eight scales and eight minima of 6 bits out of 12 bytes, uint8 ``[blocks, 8]`` each.

    The first four of each fill the low bits of bytes 0 to 3 and 4 to 7; the last four have their
    low nibbles in bytes 8 to 11 and their high bits above the first four. Four bytes are taken as
    one integer; what a shift brings in from the next byte is masked out.
    """
    first, second, rest = packed.contiguous().view(torch.int32).unbind(1)
    low, nibble, pair = 0x3F3F3F3F, 0x0F0F0F0F, 0x30303030
    scales = torch.stack([first & low, (rest & nibble) | ((first >> 2) & pair)], dim=1)
    minima = torch.stack([second & low, ((rest >> 4) & nibble) | ((second >> 2) & pair)], dim=1)
    return scales.view(torch.uint8), minima.view(torch.uint8)


def _join_six(scales: Tensor, minima: Tensor) -> Tensor:
    first = scales[:, :4] | ((scales[:, 4:] & 48) << 2)
    second = minima[:, :4] | ((minima[:, 4:] & 48) << 2)
    rest = (scales[:, 4:] & 15) | ((minima[:, 4:] & 15) << 4)
    return torch.cat([first, second, rest], dim=1)


class Q4_K(AffineType):  # noqa: N801
    """float16 scale and minimum, 12 bytes of 6-bit scales and minima, 128 bytes of codes."""

    name = "Q4_K"
    makes = weighs = True
    bits, groups = 4, 8

    def codes(self, blocks: Tensor) -> Tensor:
        return planes(blocks[:, 16:], 4, 32)

    def scales(self, blocks: Tensor) -> Scales:
        steps, minima = _six(blocks[:, 4:16])
        return Scales(half(blocks, 0), steps, half(blocks, 2), minima)

    def put(self, codes: Tensor, scales: Scales) -> Tensor:
        return torch.cat([*_head(scales), join_planes(codes, 4, 32)], dim=1)

    def _quantize(self, values: Tensor, importance: Tensor | None) -> Tensor:
        return self.put(*_six_bit(values, importance, 4, (-1.0, 0.1, 20, False)))


def _six_bit(
    values: Tensor, importance: Tensor | None, bits: int, search: tuple[float, float, int, bool]
) -> tuple[Tensor, Scales]:
    return fit_ranged(
        values,
        importance,
        bits=bits,
        groups=8,
        levels=63,
        plain_weights=_level_weights,
        search=search,
        energy=2.0,
    )


def _level_weights(values: Tensor) -> Tensor:
    """The magnitude over the root mean square of its group ``[width, groups]``."""
    mean = in_order(values * values) / values.shape[0]  # a power of two: exact either way
    return square_root(mean) + values.abs()


def _head(scales: Scales) -> list[Tensor]:
    assert scales.steps is not None and scales.minimum is not None
    assert scales.minimum_steps is not None
    packed = _join_six(scales.steps, scales.minimum_steps)
    return [halves(scales.scale), halves(scales.minimum), packed]


class Q5_K(AffineType):  # noqa: N801
    """Like Q4_K with 32 bytes of fifth bits before the codes."""

    name = "Q5_K"
    makes = weighs = True
    bits, groups = 5, 8

    def codes(self, blocks: Tensor) -> Tensor:
        return planes(blocks[:, 48:], 4, 32) | (planes(blocks[:, 16:48], 1, 32) << 4)

    def scales(self, blocks: Tensor) -> Scales:
        steps, minima = _six(blocks[:, 4:16])
        return Scales(half(blocks, 0), steps, half(blocks, 2), minima)

    def put(self, codes: Tensor, scales: Scales) -> Tensor:
        high = join_planes(codes >> 4, 1, 32)
        return torch.cat([*_head(scales), high, join_planes(codes, 4, 32)], dim=1)

    def _quantize(self, values: Tensor, importance: Tensor | None) -> Tensor:
        return self.put(*_six_bit(values, importance, 5, (-0.5, 0.1, 15, False)))


class Q6_K(AffineType):  # noqa: N801
    """128 bytes of low nibbles, 64 of high bits, 16 signed scales, float16 scale."""

    name = "Q6_K"
    makes = weighs = True
    bits, zero, groups, step_bits = 6, 32, 16, 8

    def codes(self, blocks: Tensor) -> Tensor:
        return planes(blocks[:, :128], 4, 64) | (planes(blocks[:, 128:192], 2, 32) << 4)

    def scales(self, blocks: Tensor) -> Scales:
        steps = blocks[:, 192:208].contiguous().view(torch.int8)
        return Scales(half(blocks, 208), steps)

    def put(self, codes: Tensor, scales: Scales) -> Tensor:
        assert scales.steps is not None
        low, high = join_planes(codes, 4, 64), join_planes(codes >> 4, 2, 32)
        steps = scales.steps.contiguous().view(torch.uint8)
        return torch.cat([low, high, steps, halves(scales.scale)], dim=1)

    def _quantize(self, values: Tensor, importance: Tensor | None) -> Tensor:
        return self.put(*fit_q6(values, importance))


class Q8_K(BlockType):  # noqa: N801
    """float32 scale, 256 signed bytes, sums of 16 codes each that decoding does not need."""

    name = "Q8_K"

    def _decode(self, blocks: Tensor) -> Tensor:
        scale = blocks[:, :4].contiguous().view(torch.float32)
        return blocks[:, 4:260].contiguous().view(torch.int8).to(torch.float32) * scale
