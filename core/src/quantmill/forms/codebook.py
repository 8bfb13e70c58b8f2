"""Codebook form: ``value = table[code] * scale + offset``.

Evaluation in float32 and in this order: look up, multiply by the group's scale, add the offset
where there is one, round once to the asked dtype. The scale may itself be a codebook form: that
is the double quantization of QLoRA (arXiv 2305.14314), whose offset is the mean of the scales.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from quantmill.forms.base import Form, FormValue, cut_value, value_of
from quantmill.forms.codes import Codes
from quantmill.forms.grouping import Blocks, Flat, Group, Grouping

__all__ = ["Codebook", "nearest_on_grid", "register_table", "table_values"]

_TABLES: dict[str, Callable[[], Tensor]] = {}


def register_table(name: str, values: Callable[[], Tensor]) -> None:
    """Name a table: ``values()`` gives a float32 tensor of 2**bits entries in order of code."""
    _TABLES[name] = values


def table_values(name: str) -> Tensor:
    """The float32 entries of a named table.

    Raises:
        KeyError: no table of that name is registered.
    """
    return _TABLES[name]()


def nearest_on_grid(table: Tensor) -> Tensor:
    """uint8 ``[65536]``: for each of 65536 even steps over [-1, 1] the code of the nearest entry
    of an ascending float32 ``table [256]``."""
    grid = -1.0 + torch.arange(65536, dtype=torch.float64) * (2.0 / 65535.0)
    entries = table.to("cpu", torch.float64)
    return torch.bucketize(grid, (entries[1:] + entries[:-1]) / 2).to(torch.uint8)


@dataclass(frozen=True, slots=True, eq=False)
class Codebook(Form):
    """Codes that index a table of float32 values."""

    kind: ClassVar[str] = "codebook"

    codes: Codes
    table: Tensor
    """float32 ``[2**bits]``."""
    scale: FormValue
    """One per group, float32; or a form of that shape."""
    grouping: Grouping
    offset: Tensor | None = None
    """A float32 scalar added to every value."""
    table_name: str = ""
    dtype: torch.dtype = torch.float32

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return self.codes.shape

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        values = self.table.to(torch.float32)[self.codes.unpack().to(torch.int64)]
        values = values * self.grouping.expand(value_of(self.scale), self.shape)
        if self.offset is not None:
            values = values + self.offset.to(torch.float32)
        return values.to(dtype or self.dtype)

    def cut(self, first: int, last: int) -> Codebook | None:
        codes = self.codes.cut(first, last)
        scale = cut_value(self.scale, self.grouping, self.shape, first, last)
        if codes is None or scale is None:
            return None
        return replace(self, codes=codes, scale=scale)

    def traits(self) -> Mapping[str, Any]:
        block = self.grouping.size if isinstance(self.grouping, Flat | Group) else None
        return {
            "bits": self.codes.bits,
            "packing": self.codes.packing,
            "table": self.table_name,
            "grouping": self.grouping.kind,
            "group_size": block,
            "nested": isinstance(self.scale, Form),
            "blocks": isinstance(self.grouping, Blocks),
        }

    @classmethod
    def quantize(
        cls,
        weight: Tensor,
        table: Tensor,
        block: int,
        *,
        bits: int,
        packing: str,
        table_name: str = "",
    ) -> Codebook:
        """Quantize over flat blocks: each value scaled by its block's absmax goes to the nearest
        table entry (the lower one on a tie). Reference, in float32.

        Full blocks multiply by the reciprocal of the absmax and a ragged last one divides by it,
        as bitsandbytes does: the two differ in the last bit.
        """
        flat = weight.reshape(-1).to(torch.float32)
        full = flat.numel() // block * block
        body = flat[:full].reshape(-1, block)
        absmax = body.abs().amax(dim=1)
        scaled = (body * (1.0 / absmax.clamp(min=1e-38)).unsqueeze(1)).clamp(-1, 1).reshape(-1)
        if full < flat.numel():
            tail = flat[full:]
            last = tail.abs().amax().clamp(min=1e-38)
            absmax = torch.cat([absmax, last.unsqueeze(0)])
            scaled = torch.cat([scaled, (tail / last).clamp(-1, 1)])
        order = torch.argsort(table, stable=True)
        ordered = table[order]
        edges = (ordered[1:] + ordered[:-1]) / 2
        codes = order[torch.bucketize(scaled, edges)]
        # The unused half of the last byte holds the code of zero.
        pad = int(order[torch.bucketize(torch.zeros((), device=edges.device), edges)].item())
        return cls(
            Codes.pack(codes.reshape(weight.shape), bits, packing, pad=pad),
            table,
            absmax,
            Flat(block),
            table_name=table_name,
            dtype=weight.dtype,
        )

    @classmethod
    def quantize_dynamic(
        cls, values: Tensor, table: Tensor, block: int, *, table_name: str = ""
    ) -> Codebook:
        """Quantize a flat float32 tensor to 8 bits over blocks (nested scales).

        A value over its block's absmax goes to the nearest of 65536 even steps over [-1, 1], and
        from there to the nearest entry of the ascending ``table [256]``: the two roundings are
        bitsandbytes', kept so that its bytes are met.
        """
        count = values.numel()
        padded = torch.nn.functional.pad(values, (0, -count % block)).reshape(-1, block)
        absmax = padded.abs().amax(dim=1)
        inverse = torch.where(absmax > 0, 1.0 / absmax, torch.zeros_like(absmax))
        scaled = padded * inverse.unsqueeze(1)
        steps = ((scaled + 1.0) * 32767.5 + 0.5).floor().clamp(0, 65535).to(torch.int64)
        codes = nearest_on_grid(table).to(values.device)[steps].reshape(-1)
        if codes.numel() != count:
            codes = codes[:count].clone()  # a view would keep the padding in memory
        return cls(
            Codes(codes, 8, (count,), "u8"), table, absmax, Flat(block), table_name=table_name
        )
