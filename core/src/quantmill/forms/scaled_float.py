"""Scaled float form: narrow floats times a scale (FP8 and its block formats).

Evaluation: values to float32, times the spread scale in float32, one rounding to the asked dtype.
``scale`` multiplies (peers that store the inverse invert it in their codec, exactly or not at
all: they keep what the file holds and say so).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from quantmill.forms.base import Form, FormValue, cut_value, value_of
from quantmill.forms.grouping import Blocks, Group, Grouping

__all__ = ["ScaledFloat"]


@dataclass(frozen=True, slots=True, eq=False)
class ScaledFloat(Form):
    """Narrow floats (``float8_e4m3fn``, ``float8_e5m2``, ...) with one scale per group."""

    kind: ClassVar[str] = "scaled_float"

    values: Tensor
    scale: FormValue
    """One per group of ``grouping``: float or ``float8_e8m0fnu``; or a form (two levels)."""
    grouping: Grouping
    dtype: torch.dtype = torch.bfloat16

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return tuple(self.values.shape)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        spread = self.grouping.expand(value_of(self.scale), self.shape)
        return (self.values.to(torch.float32) * spread).to(dtype or self.dtype)

    def cut(self, first: int, last: int) -> ScaledFloat | None:
        scale = cut_value(self.scale, self.grouping, self.shape, first, last)
        return None if scale is None else replace(self, values=self.values[first:last], scale=scale)

    def traits(self) -> Mapping[str, Any]:
        size: tuple[int, ...] | None = None
        if isinstance(self.grouping, Blocks):
            size = (self.grouping.rows, self.grouping.columns)
        elif isinstance(self.grouping, Group):
            size = (self.grouping.size,)
        return {
            "values": str(self.values.dtype).removeprefix("torch."),
            "grouping": self.grouping.kind,
            "group_size": size,
            "nested": isinstance(self.scale, Form),
        }

    @classmethod
    def quantize(cls, weight: Tensor, values: torch.dtype, grouping: Grouping) -> ScaledFloat:
        """Scale each group so that its absmax is the largest finite value, round to nearest."""
        work = weight.to(torch.float32)
        top = torch.finfo(values).max
        absmax = grouping.reduce(work.abs(), "amax")
        scale = torch.where(absmax > 0, absmax / top, torch.ones_like(absmax))
        scaled = (work / grouping.expand(scale, tuple(weight.shape))).clamp(-top, top)
        return cls(scaled.to(values), scale, grouping, dtype=weight.dtype)
