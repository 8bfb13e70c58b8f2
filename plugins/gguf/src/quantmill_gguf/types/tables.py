"""Types whose 4-bit codes index a table: IQ4, and the block floats MXFP4 and NVFP4."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar, Final

import torch
from torch import Tensor

from quantmill.forms import Affine, Codebook, Codes, Form, Group, PerTensor
from quantmill.forms.base import FormValue
from quantmill_gguf.types.base import BlockType, half, halves, join_planes, planes

__all__ = ["IQ4_NL", "IQ4_XS", "MXFP4", "NVFP4", "Q1_0", "TableType"]

_IQ4: Final = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
# Twice the values of e2m1 (OCP Microscaling Formats 1.0): integers. The scale is halved.
_E2M1: Final = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)


class TableType(BlockType):
    """``value = table[code] * scale``."""

    table: ClassVar[tuple[int, ...]] = _IQ4
    table_name: ClassVar[str] = "iq4"
    bits: ClassVar[int] = 4
    groups: ClassVar[int] = 1
    """Groups of a block, each with a scale of its own."""

    @abstractmethod
    def codes(self, blocks: Tensor) -> Tensor:
        """uint8 ``[blocks, block]``."""

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

    def form(self, raw: Tensor, dtype: torch.dtype = torch.float32) -> Form:
        blocks, rows = self.blocks(raw), raw.shape[0]
        codes = self.codes(blocks).reshape(rows, -1)
        return Codebook(
            Codes.pack(codes, self.bits, "lo4" if self.bits == 4 else "dense"),
            self._values(raw.device),
            self.scale(blocks, rows),
            Group(self.info.block // self.groups),
            table_name=self.table_name,
            dtype=dtype,
        )

    def raw(self, form: Form) -> Tensor:
        if not isinstance(form, Codebook):
            return super().raw(form)
        codes = form.codes.unpack().reshape(-1, self.info.block)
        return self.put(codes, form.scale).reshape(form.shape[0], -1)


class IQ4_NL(TableType):  # noqa: N801 ggml's name
    """float16 scale, 16 bytes of code pairs like Q4_0's."""

    name = "IQ4_NL"

    def codes(self, blocks: Tensor) -> Tensor:
        return planes(blocks[:, 2:], 4, 16)

    def scale(self, blocks: Tensor, rows: int) -> FormValue:
        return half(blocks, 0).reshape(rows, -1)

    def put(self, codes: Tensor, scale: FormValue) -> Tensor:
        assert isinstance(scale, Tensor)
        return torch.cat([halves(scale.reshape(-1, 1)), join_planes(codes, 4, 16)], dim=1)


class IQ4_XS(TableType):  # noqa: N801
    """float16 scale, eight 6-bit scales (two high bits each in two bytes, then low nibbles),
    eight runs of 16 bytes of code pairs."""

    name = "IQ4_XS"
    groups = 8

    def codes(self, blocks: Tensor) -> Tensor:
        return planes(blocks[:, 8:], 4, 16)

    def scale(self, blocks: Tensor, rows: int) -> FormValue:
        high, low = planes(blocks[:, 2:4], 2, 1), planes(blocks[:, 4:8], 4, 1)
        steps = ((low | (high << 4)).to(torch.int8) - 32).reshape(rows, -1)
        codes = Codes(steps, 8, tuple(steps.shape), "i8")
        return Affine(codes, half(blocks, 0).reshape(rows, -1), Group(8))

    def put(self, codes: Tensor, scale: FormValue) -> Tensor:
        assert isinstance(scale, Affine) and isinstance(scale.scale, Tensor)
        steps = (scale.codes.unpack().reshape(-1, 8) + 32).to(torch.uint8)
        head = [halves(scale.scale.reshape(-1, 1)), join_planes(steps >> 4, 2, 1)]
        return torch.cat([*head, join_planes(steps, 4, 1), join_planes(codes, 4, 16)], dim=1)


def _coded(raw: Tensor, rows: int, table: Tensor, name: str) -> Codebook:
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
    table, table_name = _E2M1, "e2m1x2"

    def codes(self, blocks: Tensor) -> Tensor:
        return planes(blocks[:, 1:], 4, 16)

    def scale(self, blocks: Tensor, rows: int) -> FormValue:
        # Half of 2 ** (e - 127); the two least are subnormal and exact in float32.
        powers = torch.pow(2.0, torch.arange(256, dtype=torch.float64) - 128).to(torch.float32)
        return _coded(blocks[:, :1], rows, powers, "e8m0/2")

    def put(self, codes: Tensor, scale: FormValue) -> Tensor:
        return torch.cat([_bytes_of(scale, 1), join_planes(codes, 4, 16)], dim=1)


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
        return _coded(blocks[:, :4], rows, values.to(torch.float32), "ue4m3/2")

    def put(self, codes: Tensor, scale: FormValue) -> Tensor:
        return torch.cat([_bytes_of(scale, 4), join_planes(codes, 4, 8)], dim=1)


class Q1_0(TableType):  # noqa: N801
    """float16 scale, 128 bits in order: minus or plus the scale."""

    name = "Q1_0"
    table, table_name, bits = (-1, 1), "sign", 1

    def codes(self, blocks: Tensor) -> Tensor:
        return planes(blocks[:, 2:], 1, 1)

    def scale(self, blocks: Tensor, rows: int) -> FormValue:
        return half(blocks, 0).reshape(rows, -1)

    def put(self, codes: Tensor, scale: FormValue) -> Tensor:
        assert isinstance(scale, Tensor)
        return torch.cat([halves(scale.reshape(-1, 1)), join_planes(codes, 1, 1)], dim=1)
