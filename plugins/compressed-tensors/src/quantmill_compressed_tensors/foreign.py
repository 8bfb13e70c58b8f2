"""Forms of other layouts as forms of this one, when a checkpoint is converted."""

from __future__ import annotations

import torch
from torch import Tensor

from quantmill.findings import QuantmillError, declare
from quantmill.forms import (
    Affine,
    Blocks,
    Channel,
    Form,
    Group,
    Grouping,
    PerTensor,
    ScaledFloat,
)
from quantmill_compressed_tensors.forms import Layout, StoredAffine, StoredFloat

__all__ = ["stored_form"]

NO_PLACE = declare("QM-CT-003", "A form has no exact place in the layouts of compressed-tensors")


def _refuse(cause: str) -> QuantmillError:
    return QuantmillError(
        NO_PLACE("form", cause, "dequantize it, and quantize the float weight anew")
    )


def stored_form(form: Form) -> StoredAffine | StoredFloat:
    """A form ``[out, in]`` with the layout that its kind has on disk.

    Raises:
        QuantmillError: the layout could hold it only with other values.
    """
    if isinstance(form, StoredAffine | StoredFloat):
        return form
    grouping = form.grouping if isinstance(form, Affine | ScaledFloat) else None
    if not isinstance(grouping, Group | Channel | PerTensor | Blocks) or (
        isinstance(grouping, Channel) and grouping.axis != 0
    ):
        raise _refuse(f"its kind is {form.kind}, with scales by {grouping and grouping.kind}")
    assert isinstance(form, Affine | ScaledFloat)
    if not isinstance(form.scale, Tensor):
        raise _refuse("its scales are a form of their own")
    if isinstance(form, ScaledFloat):
        size, lies = _shapes(grouping, form.shape)
        return StoredFloat(
            form.values, form.scale.reshape(size), grouping, form.dtype, Layout(False, lies)
        )
    return _integers(form, form.scale, grouping)


def _shapes(grouping: Grouping, shape: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shape of scales in memory and on disk."""
    size = grouping.scale_shape(shape)
    return size, {0: (1,), 1: (shape[0], 1)}.get(len(size), size)


def _integers(form: Affine, scale: Tensor, grouping: Grouping) -> StoredAffine:
    signed = form.codes.packing == "i8"
    if form.factor != 1.0 or form.offset_kind == "minimum" or isinstance(form.offset, Form):
        raise _refuse("it has a constant factor, a minimum or zero points of a form of their own")
    if isinstance(grouping, Blocks) or (form.offset is None and not signed):
        raise _refuse("integers by blocks, or unsigned without zero points, are not stored")
    size, lies = _shapes(grouping, form.shape)
    layout, zeros = Layout(not signed, lies), form.offset
    if zeros is not None:
        zeros = zeros.reshape(size)
        middle = 2 ** (form.codes.bits - 1)
        if not zeros.is_meta and bool((zeros != zeros.round()).any()):
            raise _refuse("its zero points are no integers")
        if signed:
            layout = Layout(False, lies, "plain", lies)
        elif zeros.is_meta or bool((zeros != middle).any()):
            plain = isinstance(grouping, PerTensor)
            layout = Layout(True, lies, "plain" if plain else "packed", lies if plain else None)
        zeros = zeros.to(torch.int8 if signed else torch.uint8)
    return StoredAffine(
        form.codes,
        scale.reshape(size),
        grouping,
        zeros,
        form.offset_kind,
        form.group_index,
        1.0,
        form.dtype,
        layout,
    )
