"""Exact conversions between forms: the dequantized bits are the same, or it is refused.

Requantization, which changes values, is a quantizer's business and never happens here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import prod
from typing import Any, TypeVar

import torch
from torch import Tensor

from quantmill.findings import QuantmillError, declare
from quantmill.forms.affine import Affine
from quantmill.forms.base import Form, value_of
from quantmill.forms.codebook import Codebook
from quantmill.forms.codes import Codes
from quantmill.forms.grouping import Blocks, Channel, Flat, Group, Grouping, PerTensor
from quantmill.forms.scaled_float import ScaledFloat

__all__ = [
    "group_words",
    "kind_words",
    "not_exact",
    "regroup",
    "scaled_float_to_codebook",
    "to_codebook",
    "to_unsigned",
]

NOT_EXACT = declare("QM-FORM-001", "A conversion between forms would change values")


def not_exact(what: str, cause: str) -> QuantmillError:
    """The error that says why ``what`` can't be converted without changing values."""
    return QuantmillError(NOT_EXACT(what, cause, "requantize: quantize the dequantized weight"))


_KINDS = {
    "affine": "codes on an even grid",
    "codebook": "codes of a table",
    "scaled_float": "narrow floats",
}


def kind_words(form: Form) -> str:
    """What a form holds, in words for messages."""
    return _KINDS.get(form.kind, f"blocks of a kind of their own ({form.kind})")


def group_words(grouping: Grouping) -> str:
    """What shares a scale, in words for messages."""
    if isinstance(grouping, Group):
        return f"{grouping.size} columns"
    if isinstance(grouping, Blocks):
        return f"{grouping.rows} x {grouping.columns} weights"
    if isinstance(grouping, Channel):
        return "a row" if grouping.axis == 0 else "a column"
    return "the whole weight" if isinstance(grouping, PerTensor) else f"weights by {grouping.kind}"


def to_unsigned(form: Affine) -> Affine:
    """Signed codes (``i8``) as unsigned ones with a zero point of ``2**(bits - 1)``.

    ``(q + 128) - 128`` is exact in float32, so every value keeps its bits.
    """
    if form.codes.packing != "i8":
        return form
    if form.offset_kind != "none":
        raise not_exact("affine", "signed codes with an offset have no unsigned twin here")
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
        raise not_exact("affine", "a group index, factor or minimum has no place in a codebook")
    zero = 0.0
    if form.offset is not None:
        values = value_of(form.offset)
        zero = float(values.reshape(-1)[0]) if values.numel() else 0.0
        if not bool((values == zero).all()):
            raise not_exact("affine", "its groups have different zero points")
    count = 2**form.codes.bits
    table = torch.arange(count, dtype=torch.float32, device=form.codes.data.device) - zero
    return Codebook(form.codes, table, form.scale, form.grouping, dtype=form.dtype)


def scaled_float_to_codebook(form: ScaledFloat) -> Codebook:
    """An 8-bit float form as a codebook of its 256 bit patterns."""
    if form.values.element_size() != 1:
        raise not_exact("scaled_float", "its values are not 8 bits wide")
    patterns = torch.arange(256, dtype=torch.int16).to(torch.uint8).to(form.values.device)
    table = patterns.view(form.values.dtype).to(torch.float32)
    codes = Codes(form.values.view(torch.uint8), 8, form.shape, "u8")
    return Codebook(codes, table, form.scale, form.grouping, dtype=form.dtype)


AnyForm = TypeVar("AnyForm", Affine, ScaledFloat)


def regroup(form: AnyForm, grouping: Grouping) -> AnyForm:
    """The same values with more, smaller groups: scales and offsets are repeated.

    Raises:
        QuantmillError: a new group would lie in two old ones.
    """
    shape, old = form.shape, form.grouping
    if getattr(form, "group_index", None) is not None:
        raise not_exact("affine", "a group index fixes its groups")
    offset = getattr(form, "offset", None)
    if isinstance(form.scale, Form):
        raise not_exact(form.kind, "its scales are a form of their own")
    if isinstance(offset, Form):
        raise not_exact(form.kind, "its offsets are a form of their own")
    spread = _spreading(old, grouping, shape)
    if spread is None:
        raise not_exact(
            form.kind,
            f"one scale belongs to {group_words(old)}, and the layout has one for"
            f" {group_words(grouping)}",
        )
    changes: dict[str, Any] = {"scale": spread(form.scale), "grouping": grouping}
    if isinstance(offset, Tensor):
        changes["offset"] = spread(offset)
    return replace(form, **changes)


def _spreading(
    old: Grouping, new: Grouping, shape: tuple[int, ...]
) -> Callable[[Tensor], Tensor] | None:
    """What repeats values of old groups for new ones, or None where these do not nest."""
    wanted = new.scale_shape(shape)
    if isinstance(old, PerTensor):
        return lambda value: value.reshape(()).expand(wanted).contiguous()
    if isinstance(new, Group) and len(shape) == 2:
        size = {"channel": shape[1], "group": getattr(old, "size", 0)}.get(old.kind, 0)
        if isinstance(old, Channel) and old.axis != 0:
            size = 0
        if size and (size % new.size == 0 or size >= shape[1]):

            def repeat(value: Tensor) -> Tensor:
                value = value.reshape(shape[0], -1)
                wide = value.repeat_interleave(-(-size // new.size), dim=1)
                return wide[:, : wanted[1]].contiguous()

            return repeat
    # An index of the whole matrix: for what is rare.
    count = prod(old.scale_shape(shape))
    index = torch.arange(count).reshape(old.scale_shape(shape))
    owner = old.expand(index, shape).expand(shape).contiguous()
    if not isinstance(new, Group | Channel | Flat | Blocks):
        return None
    pick = new.reduce(owner, "amin")
    if not torch.equal(pick, new.reduce(owner, "amax")):
        return None
    flat = pick.reshape(-1)
    return lambda value: value.reshape(-1)[flat.to(value.device)].reshape(wanted)
