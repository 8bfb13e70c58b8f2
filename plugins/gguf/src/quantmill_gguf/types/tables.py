"""Types whose 4-bit codes index a table: IQ4, and the block floats MXFP4 and NVFP4."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar, Final

import torch
from torch import Tensor

from quantmill.forms import Affine, Codebook, Codes, Form, Group, PerTensor
from quantmill.forms.base import FormValue
from quantmill_gguf.types.affine import inverse_of
from quantmill_gguf.types.base import Unpack, half, halves, join_planes, planes
from quantmill_gguf.types.coded import CodedType
from quantmill_gguf.types.kfit import columns, mean_square, spread_weights
from quantmill_gguf.types.search import TINY, divide, farthest, in_order, nearest

__all__ = ["IQ4_NL", "IQ4_XS", "MXFP4", "NVFP4", "Q1_0", "TableType"]

_IQ4_VALUES: Final = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
# Twice the values of e2m1 (OCP Microscaling Formats 1.0): integers. The scale is halved.
_E2M1: Final = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)


class TableType(CodedType):
    """``value = table[code] * scale``."""

    table: ClassVar[tuple[int, ...]] = _IQ4_VALUES
    table_name: ClassVar[str] = "iq4"
    bits = 4
    groups: ClassVar[int] = 1
    """Groups of a block, each with a scale of its own."""

    @abstractmethod
    def scale(self, blocks: Tensor, rows: int) -> FormValue:
        """One per group, ``[rows, groups of a row]``."""

    @abstractmethod
    def put(self, codes: Tensor, scale: FormValue) -> Tensor:
        """Bytes uint8 ``[blocks, block bytes]`` of codes ``[blocks, block]``."""

    def _values(self, device: torch.device) -> Tensor:
        return torch.tensor(self.table, dtype=torch.float32, device=device)

    def _decode(self, blocks: Tensor) -> Tensor:
        values = self._values(blocks.device)[self.codes(blocks).to(torch.int64)]
        scale = self.scale(blocks, blocks.shape[0])
        wide = scale.dequantize(torch.float32) if isinstance(scale, Form) else scale.float()
        spread = wide.reshape(blocks.shape[0], self.groups, 1)
        return (values.reshape(blocks.shape[0], self.groups, -1) * spread).reshape(values.shape)

    def form(
        self, raw: Tensor, dtype: torch.dtype = torch.float32, unpack: Unpack | None = None
    ) -> Form:
        return Codebook(
            self.packed(raw, unpack),
            self._values(raw.device),
            self.scale(self.blocks(raw), raw.shape[0]),
            Group(self.info.block // self.groups),
            table_name=self.table_name,
            dtype=dtype,
        )

    def raw(self, form: Form) -> Tensor:
        if not isinstance(form, Codebook):
            return super().raw(form)
        codes = form.codes.unpack().reshape(-1, self.info.block)
        return self.put(codes, form.scale).reshape(form.shape[0], -1)


class _IQ4(TableType):
    """Blocks of the uneven grid of 4 bits; scales are searched for as ggml does
    (``quantize_row_iq4_nl_impl``): with importance or, without it, with squares as weights."""

    makes = weighs = True

    def _quantize(self, values: Tensor, importance: Tensor | None) -> Tensor:
        if importance is None:
            weights = values * values
        else:
            weights = spread_weights(values, importance, mean_square(values, 2.0))
        work = columns(values, 32)
        scale = _grid_scale(work, columns(weights, 32), self._values(values.device))
        return self._join(work, scale.reshape(values.shape[0], -1))

    @abstractmethod
    def _join(self, values: Tensor, scale: Tensor) -> Tensor:
        """Bytes of blocks: values ``[32, groups]``, scale float32 ``[blocks, groups of one]``."""

    def _coded(self, values: Tensor, inverse: Tensor) -> Tensor:
        """Codes ``[blocks, block]`` of ``[32, groups]`` times ``[groups]``."""
        found = _nearest_entry(inverse * values, self._values(values.device))
        return found.t().to(torch.uint8).reshape(-1, self.info.block)


def _nearest_entry(values: Tensor, table: Tensor) -> Tensor:
    """Index of the nearest entry; of two as near the upper one."""
    upper = torch.bucketize(values, table, right=True).clamp_(1, table.numel() - 1)
    below, above = values - table[upper - 1], table[upper] - values
    return torch.where(below < above, upper - 1, upper)


def _grid_scale(values: Tensor, weights: Tensor, table: Tensor) -> Tensor:
    """The scale of each group of ``[32, groups]``: the best of sixteen tries."""
    top = farthest(values)

    def sums(inverse: Tensor) -> tuple[Tensor, Tensor]:
        grid = table[_nearest_entry(inverse * values, table)]
        return in_order(weights * grid * values), in_order(weights * grid * grid)

    product, square = sums(divide(1.0, divide(-top, table[0])))
    scale = torch.where(square > 0, product / square, torch.zeros_like(square))
    best = scale * product
    for step in range(-7, 8):
        product, square = sums(divide(float(step + _IQ4_VALUES[0]), top))
        better = (square > 0) & (product * product > best * square)
        candidate = product / square
        scale = torch.where(better, candidate, scale)
        best = torch.where(better, candidate * product, best)
    return scale.masked_fill(top.abs() < TINY, 0.0)


class IQ4_NL(_IQ4):  # noqa: N801 ggml's name
    """float16 scale, 16 bytes of code pairs like Q4_0's."""

    name = "IQ4_NL"

    def codes(self, blocks: Tensor) -> Tensor:
        return planes(blocks[:, 2:], 4, 16)

    def scale(self, blocks: Tensor, rows: int) -> FormValue:
        return half(blocks, 0).reshape(rows, -1)

    def put(self, codes: Tensor, scale: FormValue) -> Tensor:
        assert isinstance(scale, Tensor)
        return torch.cat([halves(scale.reshape(-1, 1)), join_planes(codes, 4, 16)], dim=1)

    def _join(self, values: Tensor, scale: Tensor) -> Tensor:
        return self.put(self._coded(values, inverse_of(scale.reshape(-1))), scale)


class IQ4_XS(_IQ4):  # noqa: N801
    """float16 scale, eight 6-bit scales (two high bits each in two bytes, then low nibbles),
    eight runs of 16 bytes of code pairs."""

    name = "IQ4_XS"
    groups = 8
    scales_at = (0,)

    def codes(self, blocks: Tensor) -> Tensor:
        return planes(blocks[:, 8:], 4, 16)

    def scale(self, blocks: Tensor, rows: int) -> FormValue:
        high, low = planes(blocks[:, 2:4], 2, 1), planes(blocks[:, 4:8], 4, 1)
        steps = ((low | (high << 4)).to(torch.int8) - 32).reshape(rows, -1)
        codes = Codes(steps, 6, tuple(steps.shape), "i8")
        return Affine(codes, half(blocks, 0).reshape(rows, -1), Group(8))

    def put(self, codes: Tensor, scale: FormValue) -> Tensor:
        assert isinstance(scale, Affine) and isinstance(scale.scale, Tensor)
        steps = (scale.codes.unpack().reshape(-1, 8) + 32).to(torch.uint8)
        head = [halves(scale.scale.reshape(-1, 1)), join_planes(steps >> 4, 2, 1)]
        return torch.cat([*head, join_planes(steps, 4, 1), join_planes(codes, 4, 16)], dim=1)

    def _join(self, values: Tensor, scale: Tensor) -> Tensor:
        whole = divide(-farthest(scale.t()).unsqueeze(1), 32.0)
        steps = nearest(inverse_of(whole) * scale).clamp_(-32, 31)
        codes = self._coded(values, inverse_of((whole * steps).reshape(-1)))
        signed = Codes(steps.to(torch.int8), 6, tuple(steps.shape), "i8")
        return self.put(codes, Affine(signed, whole.to(torch.float16), Group(8)))


def _bytewise(raw: Tensor, rows: int, table: Tensor, name: str) -> Codebook:
    """Scales of 8 bits: their bytes are kept, so that they go back as they came."""
    data = raw.reshape(rows, -1).contiguous()
    one = torch.ones(1, device=raw.device)
    codes = Codes(data, 8, tuple(data.shape), "u8")
    return Codebook(codes, table.to(raw.device), one, PerTensor(), table_name=name)


def _bytes_of(scale: FormValue, groups: int) -> Tensor:
    assert isinstance(scale, Codebook)
    return scale.codes.unpack().reshape(-1, groups)


class MXFP4(TableType):
    """An exponent byte (e8m0), 16 bytes of e2m1 pairs like Q4_0's codes."""

    name = "MXFP4"
    makes = True
    table, table_name = _E2M1, "e2m1x2"

    def codes(self, blocks: Tensor) -> Tensor:
        return planes(blocks[:, 1:], 4, 16)

    def scale(self, blocks: Tensor, rows: int) -> FormValue:
        # Half of 2 ** (e - 127); the two least are subnormal and exact in float32.
        powers = torch.pow(2.0, torch.arange(256, dtype=torch.float64) - 128).to(torch.float32)
        return _bytewise(blocks[:, :1], rows, powers, "e8m0/2")

    def put(self, codes: Tensor, scale: FormValue) -> Tensor:
        return torch.cat([_bytes_of(scale, 1), join_planes(codes, 4, 16)], dim=1)

    def _quantize(self, values: Tensor, importance: Tensor | None) -> Tensor:
        most = values.abs().amax(dim=1, keepdim=True)
        # The logarithm as C's log2f gives it: one that is rounded up to a whole number counts.
        power = torch.log2(most.to(torch.float64)).to(torch.float32).floor() + 125
        exponent = power.clamp_(0, 254).masked_fill(most == 0, 0.0)
        scale = torch.pow(2.0, exponent.to(torch.float64) - 128).to(torch.float32)
        # Nearest of the entries in their order: the first one wins, so there is no minus zero.
        best = values.abs()
        found = torch.zeros_like(values, dtype=torch.uint8)
        for index in range(1, 16):
            away = (self.table[index] * scale - values).abs()
            nearer = away < best
            best = torch.where(nearer, away, best)
            found = found.masked_fill(nearer, index)
        return torch.cat([exponent.to(torch.uint8), join_planes(found, 4, 16)], dim=1)


class NVFP4(TableType):
    """Four scale bytes (e4m3 without sign), four runs of 8 bytes of e2m1 pairs."""

    name = "NVFP4"
    table, table_name, groups = _E2M1, "e2m1x2", 4

    def codes(self, blocks: Tensor) -> Tensor:
        return planes(blocks[:, 4:], 4, 8)

    def scale(self, blocks: Tensor, rows: int) -> FormValue:
        code = torch.arange(256, dtype=torch.float64)
        exponent, mantissa = (code / 8).floor() % 16, code % 8
        normal = (1 + mantissa / 8) * torch.pow(2.0, exponent - 7)
        values = torch.where(exponent == 0, mantissa / 512, normal) / 2
        values[0x7F] = 0.0
        return _bytewise(blocks[:, :4], rows, values.to(torch.float32), "ue4m3/2")

    def put(self, codes: Tensor, scale: FormValue) -> Tensor:
        return torch.cat([_bytes_of(scale, 4), join_planes(codes, 4, 8)], dim=1)


class Q1_0(TableType):  # noqa: N801
    """float16 scale, 128 bits in order: minus or plus the scale."""

    name = "Q1_0"
    makes = True
    table, table_name, bits = (-1, 1), "sign", 1

    def codes(self, blocks: Tensor) -> Tensor:
        return planes(blocks[:, 2:], 1, 1)

    def scale(self, blocks: Tensor, rows: int) -> FormValue:
        return half(blocks, 0).reshape(rows, -1)

    def put(self, codes: Tensor, scale: FormValue) -> Tensor:
        assert isinstance(scale, Tensor)
        return torch.cat([halves(scale.reshape(-1, 1)), join_planes(codes, 1, 1)], dim=1)

    def _quantize(self, values: Tensor, importance: Tensor | None) -> Tensor:
        scale = divide(in_order(values.abs().t().contiguous()), float(values.shape[1]))
        return self.put((values >= 0).to(torch.uint8), scale.to(torch.float16).unsqueeze(1))
