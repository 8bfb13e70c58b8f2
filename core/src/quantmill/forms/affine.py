"""Affine form: ``value = code * scale`` with an optional offset, 1 to 8 bits.

Evaluation, in float32 and in this order, then one rounding to the asked dtype::

    integer zero or float zero   ((code - zero) * scale) * factor
    additive minimum             (code * scale) * factor + minimum
    none                         (code * scale) * factor

``factor`` is a constant (1/127 for LLM.int8, whose scale is the row's absmax).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from quantmill.forms.base import Form, FormValue, cut_value, value_of
from quantmill.forms.codes import Codes
from quantmill.forms.grouping import Channel, Group, Grouping, gather_groups

__all__ = ["Affine"]


@dataclass(frozen=True, slots=True, eq=False)
class Affine(Form):
    """Codes on an evenly spaced grid."""

    kind: ClassVar[str] = "affine"

    codes: Codes
    scale: FormValue
    """One per group, float; or a form of that shape."""
    grouping: Grouping
    offset: FormValue | None = None
    """One per group, or None for a symmetric form."""
    offset_kind: str = "none"
    """``none``, ``zero`` (subtracted from the code) or ``minimum`` (added at the end)."""
    group_index: Tensor | None = None
    """Group of each input column ``[in]`` (act-order); None for consecutive groups."""
    factor: float = 1.0
    dtype: torch.dtype = torch.float32

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return self.codes.shape

    def _spread(self, value: FormValue) -> Tensor:
        values = value_of(value)
        if self.group_index is not None:
            values = values.reshape(self.grouping.scale_shape(self.shape))
            return gather_groups(values, self.group_index)
        return self.grouping.expand(values, self.shape)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        codes = self.codes.unpack().to(torch.float32)
        if self.offset is not None and self.offset_kind == "zero":
            codes = codes - self._spread(self.offset)
        result = codes * self._spread(self.scale)
        if self.factor != 1.0:
            result = result * self.factor
        if self.offset is not None and self.offset_kind == "minimum":
            result = result + self._spread(self.offset)
        return result.to(dtype or self.dtype)

    def cut(self, first: int, last: int) -> Affine | None:
        codes = self.codes.cut(first, last)
        scale = cut_value(self.scale, self.grouping, self.shape, first, last)
        offset = self.offset
        if offset is not None:
            offset = cut_value(offset, self.grouping, self.shape, first, last)
        if codes is None or scale is None or (offset is None) != (self.offset is None):
            return None
        return replace(self, codes=codes, scale=scale, offset=offset)

    def with_packing(self, packing: str) -> Affine:
        """The same form with its codes packed otherwise."""
        return replace(self, codes=self.codes.repacked(packing))

    def traits(self) -> Mapping[str, Any]:
        return {
            "bits": self.codes.bits,
            "packing": self.codes.packing,
            "grouping": self.grouping.kind,
            "group_size": self.grouping.size if isinstance(self.grouping, Group) else None,
            "offset": self.offset_kind,
            "act_order": self.group_index is not None,
            "nested": isinstance(self.scale, Form),
        }

    @classmethod
    def quantize(
        cls,
        weight: Tensor,
        bits: int,
        grouping: Grouping,
        *,
        symmetric: bool = False,
        offset: str = "zero",
        packing: str = "dense",
        scale_dtype: torch.dtype = torch.float32,
    ) -> Affine:
        """Round to nearest over each group's range: the plainest quantizer, and the reference.

        Args:
            weight: float ``[out, in]``.
            bits: 1 to 8; codes are 0 to ``2**bits - 1``.
            grouping: which elements share a scale.
            symmetric: the zero point is the middle code ``2**(bits - 1)`` and the scale
                ``absmax / (2**(bits - 1) - 1)`` (for 1 bit ``absmax``); otherwise the range
                from the group's minimum to its maximum, both widened to zero, is divided evenly.
            offset: ``zero`` for an integer zero point, ``minimum`` for an additive minimum.
            packing: how the codes are held.
            scale_dtype: scales are rounded to it before codes are chosen, so codes fit them.
        """
        work = weight.to(torch.float32)
        shape = tuple(weight.shape)
        top = float(2**bits - 1)
        low = grouping.reduce(work, "amin").clamp(max=0)
        high = grouping.reduce(work, "amax").clamp(min=0)
        zero: Tensor
        if symmetric:
            middle = float(2 ** (bits - 1))
            scale = torch.maximum(high, -low) / max(1.0, middle - 1)
            zero = torch.full_like(scale, middle)
        else:
            scale = (high - low) / top
            zero = torch.zeros_like(scale)
        scale = torch.where(scale > 0, scale, torch.ones_like(scale))
        scale = scale.to(scale_dtype).to(torch.float32)
        if not symmetric:
            zero = torch.round(-low / scale).clamp(0, top) if offset == "zero" else low
        wide_scale = grouping.expand(scale, shape)
        wide_zero = grouping.expand(zero, shape)
        if offset == "minimum" and not symmetric:
            codes = torch.round((work - wide_zero) / wide_scale)
        else:
            codes = torch.round(work / wide_scale) + wide_zero
        return cls(
            Codes.pack(codes.clamp(0, top).to(torch.uint8), bits, packing),
            scale.to(scale_dtype),
            grouping,
            zero,
            "minimum" if offset == "minimum" and not symmetric else "zero",
            dtype=weight.dtype,
        )

    @classmethod
    def quantize_rows_int8(cls, weight: Tensor, dtype: torch.dtype | None = None) -> Affine:
        """Row-wise symmetric int8 with the absmax as scale (LLM.int8, arXiv 2208.07339).

        ``weight`` is a float ``[out, in]``. Codes are ``round(w * ((1 / absmax) * 127))``, half
        to even, in float32; a row of zeros has codes of zero.
        """
        values = weight.to(torch.float32)
        absmax = values.abs().amax(dim=1)
        codes = torch.round(values * (absmax.reciprocal() * 127.0).unsqueeze(1))
        codes = torch.nan_to_num(codes, nan=0.0).to(torch.int8)
        return cls(
            Codes(codes, 8, tuple(weight.shape), "i8"),
            absmax,
            Channel(0),
            factor=1.0 / 127.0,
            dtype=dtype or weight.dtype,
        )
