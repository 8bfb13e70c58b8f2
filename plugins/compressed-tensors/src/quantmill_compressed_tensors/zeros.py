"""Zero points of integer weights: where they lie, and how they are packed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quantmill.forms import Channel, Codes, Group, Grouping, PerTensor
from quantmill.targeting.types import Target
from quantmill_compressed_tensors.damage import refuse
from quantmill_compressed_tensors.forms import Layout, StoredAffine
from quantmill_compressed_tensors.words import pack_rows, row_words, unpack_rows

__all__ = ["Seen", "zero_layout", "zeros_in", "zeros_out"]


@dataclass(frozen=True)
class Seen:
    """Dtype and shape of a tensor, in a header or in memory."""

    dtype: torch.dtype
    shape: tuple[int, ...]


def zero_layout(
    zeros: Seen | None, bits: int, grouping: Grouping, shape: tuple[int, int], target: Target
) -> Layout:
    """Where the zero points of packed codes lie."""
    if zeros is None:
        return Layout()
    size = grouping.scale_shape(shape)
    if isinstance(grouping, Group | Channel) and zeros.dtype == torch.int32:
        if zeros.shape == (row_words(shape[0], bits), *(size[1:] or (1,))):
            return Layout(zeros="packed")
    elif (
        isinstance(grouping, PerTensor) and zeros.dtype == torch.int8 and zeros.shape in ((), (1,))
    ):
        return Layout(zeros="plain", zeros_shape=zeros.shape)
    raise refuse(
        target,
        f"weight_zero_point is {zeros.dtype} {list(zeros.shape)} for scales {list(size)} of"
        f" {bits} bits",
    )


def zeros_in(zeros: Tensor | None, form: StoredAffine, device: torch.device) -> Tensor | None:
    """The zero points of a form from ``weight_zero_point``."""
    size, layout = form.grouping.scale_shape(form.shape), form.layout
    if not layout.packed:
        return None if zeros is None else zeros.reshape(size)
    bits = form.codes.bits
    middle = 2 ** (bits - 1)
    if zeros is None:
        return torch.full(size, middle, dtype=torch.uint8, device=device)
    if layout.zeros == "plain":
        return (zeros.to(torch.int16) + middle).to(torch.uint8).reshape(size)
    streams = zeros.t().contiguous()
    return unpack_rows(streams, bits, form.shape[0]).unpack().t().reshape(size).contiguous()


def zeros_out(form: StoredAffine) -> Tensor:
    """``weight_zero_point`` of a form that has one."""
    zeros, layout = form.offset, form.layout
    assert isinstance(zeros, Tensor)
    if layout.zeros == "packed":
        zeros = zeros.reshape(form.shape[0], -1)
        if zeros.is_meta:
            words = row_words(form.shape[0], form.codes.bits)
            return torch.empty(words, zeros.shape[1], dtype=torch.int32, device="meta")
        codes = Codes.pack(zeros.t().contiguous(), form.codes.bits, "dense")
        return pack_rows(codes).t().contiguous()
    assert layout.zeros_shape is not None
    if layout.packed:
        zeros = (zeros.to(torch.int16) - 2 ** (form.codes.bits - 1)).to(torch.int8)
    return zeros.reshape(layout.zeros_shape)
