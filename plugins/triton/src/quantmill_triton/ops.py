"""The kernels as PyTorch operators, with fake implementations: ``torch.compile`` sees one node."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch.library import Library, register_fake

from quantmill_triton.available import interpreted
from quantmill_triton.facts import Facts
from quantmill_triton.launch import Weight, dequantize, matmul, matmul_grouped
from quantmill_triton.launches import on_its_device

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["LIBRARY", "product"]

_WEIGHT = (
    "Tensor codes, Tensor? high, Tensor scale, Tensor? offset, Tensor? table, Tensor? lut,"
    " Tensor? unit, Tensor? order"
)

LIBRARY = Library("quantmill_triton", "DEF")
LIBRARY.define(f"matmul(Tensor x, {_WEIGHT}, Tensor? bias, int[] facts, float factor) -> Tensor")
LIBRARY.define(
    f"grouped_matmul(Tensor x, Tensor ends, {_WEIGHT}, Tensor? bias, int[] facts, float factor)"
    " -> Tensor"
)
LIBRARY.define(f"dequantize({_WEIGHT}, int[] facts, float factor, ScalarType dtype) -> Tensor")


def _matmul(
    x: Tensor,
    codes: Tensor,
    high: Tensor | None,
    scale: Tensor,
    offset: Tensor | None,
    table: Tensor | None,
    lut: Tensor | None,
    unit: Tensor | None,
    order: Tensor | None,
    bias: Tensor | None,
    facts: list[int],
    factor: float,
) -> Tensor:
    weight = Weight(codes, high, scale, offset, table, lut, unit, order)
    return product(x, weight, bias, Facts(*facts), factor)


@on_its_device
def product(x: Tensor, weight: Weight, bias: Tensor | None, facts: Facts, factor: float) -> Tensor:
    """What the operator ``matmul`` computes, for ``x`` ``[..., columns]``."""
    if x.ndim == 2:
        return matmul(x, weight, bias, facts, factor)
    out = matmul(x.reshape(-1, facts.columns), weight, bias, facts, factor)
    return out.reshape(*x.shape[:-1], facts.rows)


def _grouped_matmul(
    x: Tensor,
    ends: Tensor,
    codes: Tensor,
    high: Tensor | None,
    scale: Tensor,
    offset: Tensor | None,
    table: Tensor | None,
    lut: Tensor | None,
    unit: Tensor | None,
    order: Tensor | None,
    bias: Tensor | None,
    facts: list[int],
    factor: float,
) -> Tensor:
    # Tables are the same for all: the first one's.
    table, lut, unit = (None if item is None else item[0] for item in (table, lut, unit))
    weights = Weight(codes, high, scale, offset, table, lut, unit, order)
    return matmul_grouped(x, weights, ends, bias, Facts(*facts), factor)


def _dequantize(
    codes: Tensor,
    high: Tensor | None,
    scale: Tensor,
    offset: Tensor | None,
    table: Tensor | None,
    lut: Tensor | None,
    unit: Tensor | None,
    order: Tensor | None,
    facts: list[int],
    factor: float,
    dtype: torch.dtype,
) -> Tensor:
    weight = Weight(codes, high, scale, offset, table, lut, unit, order)
    return dequantize(weight, Facts(*facts), factor, dtype)


_KEYS = ("CUDA", "CPU") if interpreted() else ("CUDA",)
for _key in _KEYS:
    LIBRARY.impl("matmul", _matmul, _key)
    LIBRARY.impl("grouped_matmul", on_its_device(_grouped_matmul), _key)
    LIBRARY.impl("dequantize", on_its_device(_dequantize), _key)


@register_fake("quantmill_triton::matmul", lib=LIBRARY)
def _(x: Tensor, *arguments: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], Facts(*arguments[-2]).rows))


@register_fake("quantmill_triton::grouped_matmul", lib=LIBRARY)
def _(x: Tensor, *arguments: Any) -> Tensor:
    return x.new_empty((x.shape[0], Facts(*arguments[-2]).rows))


@register_fake("quantmill_triton::dequantize", lib=LIBRARY)
def _(codes: Tensor, *arguments: Any) -> Tensor:
    facts, _, dtype = arguments[-3:]
    return codes.new_empty((Facts(*facts).rows, Facts(*facts).columns), dtype=dtype)
