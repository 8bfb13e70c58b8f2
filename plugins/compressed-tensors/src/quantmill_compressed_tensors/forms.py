"""The core's forms, with what this layout stores beside them.

Two forms of equal meaning may lie differently on disk (a zero point left out or written, a scale
``[out]`` or ``[out, 1]``). :class:`Layout` remembers which it was, so that what is read is written
back bit for bit, and a module needs no config to know its own tensors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from quantmill.forms import Affine, Codes, Grouping, ScaledFloat

__all__ = ["Layout", "StoredAffine", "StoredFloat", "abstract_float", "abstract_integer"]

META = torch.device("meta")


@dataclass(frozen=True, slots=True)
class Layout:
    """How a form's tensors lie on disk."""

    packed: bool = False
    """Codes in 32-bit words (``weight_packed``), else one per element (``weight``)."""
    scale_shape: tuple[int, ...] | None = None
    """Shape of ``weight_scale``."""
    zeros: Literal["none", "packed", "plain"] = "none"
    """No ``weight_zero_point``, in words along the rows, or one signed byte each."""
    zeros_shape: tuple[int, ...] | None = None
    """Shape of a plain ``weight_zero_point``."""
    shape_dtype: torch.dtype = torch.int64
    """Of ``weight_shape``."""
    unordered: bool = False
    """``weight_g_idx`` is there and holds -1: no activation order."""
    exponents: bool = False
    """``weight_scale`` holds powers of two, a byte each (``mxfp8-quantized``)."""


@dataclass(frozen=True, slots=True, eq=False)
class StoredAffine(Affine):
    """Integers of a compressed-tensors checkpoint.

    Packed codes are unsigned, with zero points that include the middle code ``2**(bits - 1)``;
    others are signed bytes.
    """

    layout: Layout = Layout()
    input_scale: Tensor | None = None
    """Scale of the inputs, where activations are quantized with stored scales."""
    input_zero_point: Tensor | None = None


@dataclass(frozen=True, slots=True, eq=False)
class StoredFloat(ScaledFloat):
    """FP8 values of a compressed-tensors checkpoint."""

    layout: Layout = Layout()
    input_scale: Tensor | None = None
    input_zero_point: Tensor | None = None


def abstract_integer(
    shape: tuple[int, int],
    bits: int,
    grouping: Grouping,
    layout: Layout,
    scale: torch.dtype,
    dtype: torch.dtype,
    *,
    ordered: bool = False,
) -> StoredAffine:
    """An integer form ``[out, in]`` on the meta device, without input scales."""
    size = grouping.scale_shape(shape)
    zeros = None
    if layout.packed or layout.zeros != "none":
        kind = torch.uint8 if layout.packed else torch.int8
        zeros = torch.empty(size, dtype=kind, device=META)
    return StoredAffine(
        Codes.empty(shape, bits, "dense" if layout.packed else "i8", META),
        torch.empty(size, dtype=scale, device=META),
        grouping,
        zeros,
        "none" if zeros is None else "zero",
        torch.empty(shape[1], dtype=torch.int32, device=META) if ordered else None,
        dtype=dtype,
        layout=layout,
    )


def abstract_float(
    shape: tuple[int, int],
    values: torch.dtype,
    grouping: Grouping,
    layout: Layout,
    scale: torch.dtype,
    dtype: torch.dtype,
) -> StoredFloat:
    """An FP8 form ``[out, in]`` on the meta device, without input scales."""
    return StoredFloat(
        torch.empty(shape, dtype=values, device=META),
        torch.empty(grouping.scale_shape(shape), dtype=scale, device=META),
        grouping,
        dtype,
        layout,
    )
