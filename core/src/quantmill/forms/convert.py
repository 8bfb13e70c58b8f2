"""Exact conversions between forms: the dequantized bits are the same, or it is refused.

Requantization, which changes values, is a quantizer's business and never happens here.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from quantmill.findings import QuantmillError, declare
from quantmill.forms.affine import Affine
from quantmill.forms.base import Form, value_of
from quantmill.forms.codebook import Codebook
from quantmill.forms.codes import Codes
from quantmill.forms.grouping import Blocks, Channel, Flat, Group, Grouping, PerTensor
from quantmill.forms.scaled_float import ScaledFloat

__all__ = ["regroup", "scaled_float_to_codebook", "to_codebook", "to_unsigned"]

NOT_EXACT = declare("QM-FORM-001", "A conversion between forms would change values")


def _refuse(what: str, cause: str) -> QuantmillError:
    return QuantmillError(NOT_EXACT(what, cause, "requantize: quantize the dequantized weight"))


def to_unsigned(form: Affine) -> Affine:
    """Signed codes (``i8``) as unsigned ones with a zero point of ``2**(bits - 1)``.

    ``(q + 128) - 128`` is exact in float32, so every value keeps its bits.
    """
    if form.codes.packing != "i8":
        return form
    if form.offset_kind != "none":
        raise _refuse("affine", "signed codes with an offset have no unsigned twin here")
    half = 2 ** (form.codes.bits - 1)
    codes = (form.codes.unpack().to(torch.int16) + half).to(torch.uint8)
    zero = torch.full(form.grouping.scale_shape(form.shape), float(half), device=codes.device)
    return replace(
        form,
        codes=Codes(codes, form.codes.bits, form.shape, "u8"),
        offset=zero,
        offset_kind="zero",
    )


def to_codebook(form: Affine) -> Codebook:
    """An affine form as a codebook: one table of ``code - zero``.

    Exact when the zero point is one integer for all groups and there is neither a group index
    nor a constant factor.
    """
    form = to_unsigned(form)
    if form.group_index is not None or form.factor != 1.0 or form.offset_kind == "minimum":
        raise _refuse("affine", "a group index, factor or minimum has no place in a codebook")
    zero = 0.0
    if form.offset is not None:
        values = value_of(form.offset)
        zero = float(values.reshape(-1)[0]) if values.numel() else 0.0
        if not bool((values == zero).all()):
            raise _refuse("affine", "its groups have different zero points")
    count = 2**form.codes.bits
    table = torch.arange(count, dtype=torch.float32, device=form.codes.data.device) - zero
    return Codebook(form.codes, table, form.scale, form.grouping, dtype=form.dtype)


def scaled_float_to_codebook(form: ScaledFloat) -> Codebook:
    """An 8-bit float form as a codebook of its 256 bit patterns."""
    if form.values.element_size() != 1:
        raise _refuse("scaled_float", "its values are not 8 bits wide")
    patterns = torch.arange(256, dtype=torch.int16).to(torch.uint8).to(form.values.device)
    table = patterns.view(form.values.dtype).to(torch.float32)
    codes = Codes(form.values.view(torch.uint8), 8, form.shape, "u8")
    return Codebook(codes, table, form.scale, form.grouping, dtype=form.dtype)


def regroup(form: Affine, grouping: Grouping) -> Affine:
    """The same values with more, smaller groups: scales and offsets are repeated.

    Raises:
        QuantmillError: a new group would lie in two old ones.
    """
    shape = form.shape
    if form.group_index is not None:
        raise _refuse("affine", "a group index fixes its groups")
    index = torch.arange(_groups(form.grouping, shape)).reshape(form.grouping.scale_shape(shape))
    owner = form.grouping.expand(index, shape).expand(shape)
    if not _nests(form.grouping, grouping, owner):
        raise _refuse(
            "affine", f"groups {grouping} do not lie within groups {form.grouping} of {shape}"
        )
    pick = grouping.reduce(owner.contiguous(), "amin").reshape(-1)

    def spread(value: Tensor) -> Tensor:
        return value.reshape(-1)[pick.to(value.device)].reshape(grouping.scale_shape(shape))

    if isinstance(form.scale, Form):
        raise _refuse("affine", "its scales are a form of their own")
    offset = form.offset
    if isinstance(offset, Form):
        raise _refuse("affine", "its offsets are a form of their own")
    return replace(
        form,
        scale=spread(form.scale),
        offset=None if offset is None else spread(offset),
        grouping=grouping,
    )


def _groups(grouping: Grouping, shape: tuple[int, ...]) -> int:
    count = 1
    for size in grouping.scale_shape(shape):
        count *= size
    return count


def _nests(old: Grouping, new: Grouping, owner: Tensor) -> bool:
    """Whether every new group lies in one old group."""
    if isinstance(old, PerTensor):
        return True
    if isinstance(old, Group) and isinstance(new, Group) and old.size % new.size == 0:
        return True
    if old == Channel(0) and isinstance(new, Group):
        return True
    if not isinstance(new, Group | Channel | Flat | Blocks):
        return False
    flat = owner.contiguous()
    return torch.equal(new.reduce(flat, "amin"), new.reduce(flat, "amax"))
