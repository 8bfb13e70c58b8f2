"""The core's forms with what torchao's files say beside the codes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quantmill.forms import Affine, Blocks, Channel, Codes, Group, Grouping, PerTensor, ScaledFloat

__all__ = ["AoAffine", "AoFloat", "Layout", "abstract_affine", "abstract_float", "grouping_of"]

META = torch.device("meta")


@dataclass(frozen=True, slots=True)
class Layout:
    """How a weight is stored."""

    tensor: str = ""
    """Class of torchao's tensor."""
    block: tuple[int, int] = (1, 1)
    """Rows and columns that share a scale."""
    zero: torch.dtype | None = None
    """Dtype of stored zero points; None where there are none."""
    note: str = ""
    """Its entry in the file's ``__metadata__``."""


@dataclass(frozen=True, slots=True, eq=False)
class AoAffine(Affine):
    """Integers of ``Int8Tensor``, ``IntxUnpackedToInt8Tensor`` or ``Int4Tensor``."""

    layout: Layout = Layout()
    float_zero: Tensor | None = None
    """``Int4Tensor``: zero points as stored, ``[groups, out]``; :attr:`offset` follows from
    them."""
    act_quant_scale: Tensor | None = None
    act_quant_zero_point: Tensor | None = None
    """Of activations with stored scales."""
    act_pre_scale: Tensor | None = None
    """What inputs are multiplied with."""


@dataclass(frozen=True, slots=True, eq=False)
class AoFloat(ScaledFloat):
    """8-bit floats of ``Float8Tensor``."""

    layout: Layout = Layout()


def grouping_of(block: tuple[int, int], shape: tuple[int, int]) -> Grouping:
    """The grouping for blocks of rows and columns of a weight ``[out, in]``."""
    rows, columns = block
    if rows == 1 and columns == shape[1]:
        return Channel(0)
    if block == shape:
        return PerTensor()
    return Group(columns) if rows == 1 else Blocks(rows, columns)


def abstract_affine(
    shape: tuple[int, int],
    bits: int,
    layout: Layout,
    scale: torch.dtype,
    dtype: torch.dtype,
    *,
    zeros: bool = False,
) -> AoAffine:
    """An integer form on the meta device; ``zeros`` for 8 bits with zero points other than 0."""
    grouping = grouping_of(layout.block, shape)
    size = grouping.scale_shape(shape)
    scales = torch.empty(size, dtype=scale, device=META)
    if layout.tensor == "Int4Tensor":
        return AoAffine(
            Codes.empty(shape, 4, "dense", META),
            scales,
            grouping,
            torch.empty(size, dtype=torch.float32, device=META),
            "minimum",
            dtype=dtype,
            layout=layout,
            float_zero=torch.empty(
                (shape[1] // layout.block[1], shape[0]), dtype=layout.zero, device=META
            ),
        )
    if bits == 8 and not zeros:
        return AoAffine(
            Codes.empty(shape, 8, "i8", META), scales, grouping, dtype=dtype, layout=layout
        )
    real = layout.zero is not None and layout.zero.is_floating_point
    kind = torch.float32 if real else torch.int8 if bits == 8 else torch.uint8
    return AoAffine(
        Codes.empty(shape, bits, "i8" if bits == 8 else "dense", META),
        scales,
        grouping,
        torch.empty(size, dtype=kind, device=META),
        "zero",
        dtype=dtype,
        layout=layout,
    )


def abstract_float(
    shape: tuple[int, int], values: torch.dtype, layout: Layout, dtype: torch.dtype
) -> AoFloat:
    """An 8-bit float form on the meta device."""
    grouping = grouping_of(layout.block, shape)
    return AoFloat(
        torch.empty(shape, dtype=values, device=META),
        torch.empty(grouping.scale_shape(shape), dtype=torch.float32, device=META),
        grouping,
        dtype,
        layout,
    )
