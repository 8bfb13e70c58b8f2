"""Types on an evenly spaced grid: the plain ones of ggml, and what K-quants share.

A block is taken apart into codes and :class:`Scales`, and everything follows from them: the float
values, the core's affine form (with nested scales), and, put together again, the same bytes.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from quantmill.forms import Affine, Codes, Form, Group
from quantmill.forms.base import FormValue
from quantmill_gguf.types.base import Unpack, half, halves, join_planes, planes
from quantmill_gguf.types.coded import CodedType
from quantmill_gguf.types.search import (
    divide,
    farthest,
    fit_range,
    fit_symmetric,
    in_order,
    lowest,
    square_root,
)

__all__ = ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "AffineType", "Scales"]


@dataclass(frozen=True, slots=True)
class Scales:
    """A block's numbers beside its codes, before any arithmetic."""

    scale: Tensor
    """float16 ``[blocks, 1]``."""
    steps: Tensor | None = None
    """What the scale is multiplied by for each group: uint8 or int8 ``[blocks, groups]``."""
    minimum: Tensor | None = None
    """float16 ``[blocks, 1]``: added, or with ``minimum_steps`` subtracted."""
    minimum_steps: Tensor | None = None
    """uint8 ``[blocks, groups]``."""


class AffineType(CodedType):
    """``value = (code - zero) * scale``, or ``code * scale + minimum``."""

    zero: ClassVar[int] = 0
    """Subtracted from every code."""
    groups: ClassVar[int] = 1
    """Groups of a block, each with a scale of its own."""
    step_bits: ClassVar[int] = 6
    """Of these scales."""

    @abstractmethod
    def scales(self, blocks: Tensor) -> Scales:
        """The other numbers in uint8 ``[blocks, block bytes]``."""

    @abstractmethod
    def put(self, codes: Tensor, scales: Scales) -> Tensor:
        """The exact inverse of :meth:`codes` and :meth:`scales`."""

    def _decode(self, blocks: Tensor) -> Tensor:
        codes, scales = self.codes(blocks).to(torch.float32), self.scales(blocks)
        scale = scales.scale.to(torch.float32)
        if scales.steps is not None:
            scale = scale * scales.steps.to(torch.float32)
        if self.zero:
            codes = codes - float(self.zero)
        values = codes.reshape(blocks.shape[0], self.groups, -1) * scale.unsqueeze(-1)
        if scales.minimum is not None:
            minimum = scales.minimum.to(torch.float32)
            if scales.minimum_steps is not None:
                minimum = -(minimum * scales.minimum_steps.to(torch.float32))
            values = values + minimum.unsqueeze(-1)
        return values.reshape(blocks.shape[0], -1)

    def form(
        self, raw: Tensor, dtype: torch.dtype = torch.float32, unpack: Unpack | None = None
    ) -> Form:
        rows = raw.shape[0]
        codes = self.packed(raw, unpack)
        columns = codes.shape[1]
        scales = self.scales(self.blocks(raw))
        scale = self._nested(scales.scale, scales.steps, rows)
        grouping = Group(self.info.block // self.groups)
        if scales.minimum is not None:
            low = scales.minimum if scales.minimum_steps is None else -scales.minimum
            offset = self._nested(low, scales.minimum_steps, rows)
            return Affine(codes, scale, grouping, offset, "minimum", dtype=dtype)
        if not self.zero:
            return Affine(codes, scale, grouping, dtype=dtype)
        # The core's form has a zero point per group, where ggml has one number for all.
        shape = (rows, columns // grouping.size)
        if raw.is_meta:  # Without data, only this says that all are one.
            zero = torch.empty(1, dtype=torch.uint8, device="meta").expand(shape)
        else:
            zero = torch.full(shape, self.zero, dtype=torch.uint8, device=raw.device)
        return Affine(codes, scale, grouping, zero, "zero", dtype=dtype)

    def _nested(self, scale: Tensor, steps: Tensor | None, rows: int) -> FormValue:
        level = scale.reshape(rows, -1)
        if steps is None:
            return level.contiguous()
        shape = (rows, steps.numel() // rows)
        packing = "i8" if steps.dtype == torch.int8 else "u8"
        codes = Codes(steps.reshape(shape), self.step_bits, shape, packing)
        return Affine(codes, level.contiguous(), Group(steps.shape[1]))

    def raw(self, form: Form) -> Tensor:
        if not isinstance(form, Affine):
            return super().raw(form)
        rows = form.shape[0]
        scale, steps = _flat(form.scale, self.groups)
        minimum, minimum_steps = None, None
        if form.offset_kind == "minimum" and form.offset is not None:
            minimum, minimum_steps = _flat(form.offset, self.groups)
            if minimum_steps is not None:
                minimum = -minimum
        codes = form.codes.unpack().reshape(-1, self.info.block)
        return self.put(codes, Scales(scale, steps, minimum, minimum_steps)).reshape(rows, -1)


def _flat(value: FormValue, groups: int) -> tuple[Tensor, Tensor | None]:
    if isinstance(value, Tensor):
        return value.reshape(-1, 1), None
    assert isinstance(value, Affine) and isinstance(value.scale, Tensor)
    return value.scale.reshape(-1, 1), value.codes.unpack().reshape(-1, groups)


def inverse_of(scale: Tensor) -> Tensor:
    """``1 / scale``, and 0 of 0."""
    return divide(1.0, scale).masked_fill(scale == 0, 0.0)


def _codes_of(values: Tensor, top: int) -> Tensor:
    """Truncated and clipped, uint8."""
    return finite(values).trunc().clamp(0, top).to(torch.uint8)


def finite(values: Tensor) -> Tensor:
    """What a scale too small to invert makes infinite or NaN is 0, as a byte of it is in C on
    x86."""
    return values.where(values.abs() < 2.0**31, 0.0)


class _Weighed(AffineType):
    """Plain types of 32 values. With importance ggml searches for the scale that costs least."""

    makes = weighs = True

    def _quantize_rows(self, rows: Tensor, importance: Tensor | None) -> Tensor:
        if importance is None:
            return self._quantize(rows.reshape(-1, 32), None)
        # Beside a column's importance, a value counts by its own size and that of its row.
        energy = divide(in_order((rows * rows).t().contiguous()), float(rows.shape[1]))
        spread = importance.to(rows) * square_root(energy.unsqueeze(1) + rows * rows)
        return self._quantize(rows.reshape(-1, 32), spread.reshape(-1, 32))


class _Centred(_Weighed):
    """The value of the largest magnitude gets the lowest code."""

    def _quantize(self, values: Tensor, importance: Tensor | None) -> Tensor:
        if importance is not None:
            weights = importance.t().contiguous()
            fit = fit_symmetric(values.t().contiguous(), self.zero, weights)
            codes = fit.codes.t().to(torch.uint8)
            return self.put(codes, Scales(fit.scale.to(torch.float16).unsqueeze(1)))
        scale = divide(farthest(values.t()).unsqueeze(1), -float(self.zero))
        codes = _codes_of(values * inverse_of(scale) + (self.zero + 0.5), 2 * self.zero - 1)
        return self.put(codes, Scales(scale.to(torch.float16)))


class _Ranged(_Weighed):
    """The range of a block is divided evenly."""

    def _quantize(self, values: Tensor, importance: Tensor | None) -> Tensor:
        top = 2**self.bits - 1
        if importance is not None:
            work, weights = values.t().contiguous(), importance.t().contiguous()
            fit = fit_range(work, top, weights, first=-0.9, step=0.05, steps=36)
            minimum = (-fit.low).to(torch.float16).unsqueeze(1)
            codes = fit.codes.t().to(torch.uint8)
            return self.put(codes, Scales(fit.scale.to(torch.float16).unsqueeze(1), None, minimum))
        low = lowest(values.t()).unsqueeze(1)
        # A range of zeros of both signs is no minus zero.
        scale = divide(values.amax(dim=1, keepdim=True) - low + 0.0, float(top))
        codes = _codes_of((values - low) * inverse_of(scale) + 0.5, top)
        minimum = low.to(torch.float16)
        return self.put(codes, Scales(scale.to(torch.float16), None, minimum))


class Q4_0(_Centred):  # noqa: N801 ggml's name
    """float16 scale, 16 bytes of code pairs: the first 16 codes in the low halves."""

    name = "Q4_0"
    bits, zero = 4, 8

    def codes(self, blocks: Tensor) -> Tensor:
        return planes(blocks[:, 2:], 4, 16)

    def scales(self, blocks: Tensor) -> Scales:
        return Scales(half(blocks, 0))

    def put(self, codes: Tensor, scales: Scales) -> Tensor:
        return torch.cat([halves(scales.scale), join_planes(codes, 4, 16)], dim=1)


class Q4_1(_Ranged):  # noqa: N801
    """float16 scale and minimum, then codes like Q4_0."""

    name = "Q4_1"
    bits = 4

    def codes(self, blocks: Tensor) -> Tensor:
        return planes(blocks[:, 4:], 4, 16)

    def scales(self, blocks: Tensor) -> Scales:
        return Scales(half(blocks, 0), None, half(blocks, 2))

    def put(self, codes: Tensor, scales: Scales) -> Tensor:
        assert scales.minimum is not None
        head = [halves(scales.scale), halves(scales.minimum)]
        return torch.cat([*head, join_planes(codes, 4, 16)], dim=1)


def _five(low: Tensor, high: Tensor) -> Tensor:
    """5-bit codes of 16 bytes like Q4_0's and 32 fifth bits in order."""
    return planes(low, 4, 16) | (planes(high, 1, 1) << 4)


def _join_five(codes: Tensor) -> list[Tensor]:
    return [join_planes(codes >> 4, 1, 1), join_planes(codes, 4, 16)]


class Q5_0(_Centred):  # noqa: N801
    """float16 scale, 32 fifth bits, 16 bytes of low halves."""

    name = "Q5_0"
    bits, zero = 5, 16

    def codes(self, blocks: Tensor) -> Tensor:
        return _five(blocks[:, 6:], blocks[:, 2:6])

    def scales(self, blocks: Tensor) -> Scales:
        return Scales(half(blocks, 0))

    def put(self, codes: Tensor, scales: Scales) -> Tensor:
        return torch.cat([halves(scales.scale), *_join_five(codes)], dim=1)


class Q5_1(_Ranged):  # noqa: N801
    """float16 scale and minimum, then codes like Q5_0."""

    name = "Q5_1"
    bits = 5

    def codes(self, blocks: Tensor) -> Tensor:
        return _five(blocks[:, 8:], blocks[:, 4:8])

    def scales(self, blocks: Tensor) -> Scales:
        return Scales(half(blocks, 0), None, half(blocks, 2))

    def put(self, codes: Tensor, scales: Scales) -> Tensor:
        assert scales.minimum is not None
        head = [halves(scales.scale), halves(scales.minimum)]
        return torch.cat([*head, *_join_five(codes)], dim=1)


class Q8_0(AffineType):  # noqa: N801
    """float16 scale, 32 signed bytes."""

    name = "Q8_0"
    makes = True
    bits = 8

    def codes(self, blocks: Tensor) -> Tensor:
        return blocks[:, 2:].contiguous().view(torch.int8)

    def scales(self, blocks: Tensor) -> Scales:
        return Scales(half(blocks, 0))

    def put(self, codes: Tensor, scales: Scales) -> Tensor:
        codes = codes.contiguous().view(torch.uint8)
        return torch.cat([halves(scales.scale), codes], dim=1)

    def _quantize(self, values: Tensor, importance: Tensor | None) -> Tensor:
        scale = divide(values.abs().amax(dim=1, keepdim=True), 127.0)
        codes = round_away(finite(values * inverse_of(scale))).clamp(-128, 127)
        return self.put(codes.to(torch.int8), Scales(scale.to(torch.float16)))


def round_away(values: Tensor) -> Tensor:
    """To the nearest integer, halves away from zero, like C's ``roundf``."""
    size = values.abs()
    whole = size.floor()
    return torch.copysign(whole + (2 * (size - whole)).floor(), values)
