"""Forms of other layouts as torchao's, when a checkpoint is converted."""

from __future__ import annotations

import torch
from torch import Tensor

from quantmill.findings import QuantmillError, declare
from quantmill.forms import Affine, Blocks, Channel, Form, Group, PerTensor, ScaledFloat
from quantmill_torchao.config import TorchaoConfig
from quantmill_torchao.forms import AoAffine, AoFloat, Layout
from quantmill_torchao.notes import note_for
from quantmill_torchao.recipes import Grain, Recipe

__all__ = ["stored_form"]

NO_PLACE = declare("QM-TORCHAO-004", "A form has no exact place in torchao's layouts")
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def _refuse(cause: str) -> QuantmillError:
    return QuantmillError(
        NO_PLACE("form", cause, "dequantize it, and quantize the float weight anew")
    )


def stored_form(form: Form, config: TorchaoConfig) -> AoAffine | AoFloat:
    """A form ``[out, in]`` with the layout that its kind has on disk.

    Raises:
        QuantmillError: the layout could hold it only with other values.
    """
    if isinstance(form, AoAffine | AoFloat):
        return form
    if not isinstance(form, Affine | ScaledFloat) or not isinstance(form.scale, Tensor):
        raise _refuse(f"its kind is {form.kind}, or its scales are a form of their own")
    rows, columns = form.shape
    grouping = form.grouping
    if isinstance(grouping, PerTensor):
        grain = Grain("tensor")
    elif isinstance(grouping, Channel) and grouping.axis == 0:
        grain = Grain("row")
    elif isinstance(grouping, Group) and columns % grouping.size == 0:
        grain = Grain("group", (grouping.size,))
    elif (
        isinstance(grouping, Blocks)
        and isinstance(form, ScaledFloat)
        and not (rows % grouping.rows or columns % grouping.columns)
    ):
        grain = Grain("block", (grouping.rows, grouping.columns))
    else:
        raise _refuse(f"its scales lie by {grouping} in a weight {[rows, columns]}")
    shape = (rows, columns)
    block = grain.block(shape)
    dtype = form.dtype if form.dtype in _FLOATS else torch.bfloat16
    if isinstance(form, ScaledFloat):
        recipe = Recipe("Float8Tensor", 8, grain)
        layout = Layout("Float8Tensor", block, None, note_for(recipe, shape, dtype))
        return AoFloat(form.values, form.scale.to(torch.float32), grouping, form.dtype, layout)
    return _integers(form, form.scale, grain, dtype)


def _integers(form: Affine, scale: Tensor, grain: Grain, dtype: torch.dtype) -> AoAffine:
    if form.group_index is not None or form.factor != 1.0 or form.offset_kind == "minimum":
        raise _refuse("it has a group index, a constant factor or a minimum")
    if isinstance(form.offset, Form) or (form.offset is None and form.codes.packing != "i8"):
        raise _refuse("its zero points are a form of their own, or unsigned codes have none")
    shape = (form.shape[0], form.shape[1])
    bits, block = form.codes.bits, grain.block(shape)
    codes, offset = form.codes, form.offset
    whole = grain.kind == "tensor"
    tensor = "Int8Tensor" if whole or codes.packing == "i8" else "IntxUnpackedToInt8Tensor"
    if tensor == "Int8Tensor" and bits != 8:
        raise _refuse(f"{bits} bits with one scale for the whole weight are not stored")
    zero = torch.int8
    if codes.packing != "i8":
        codes = codes.repacked("dense")
        assert offset is not None
        real = offset.to(torch.float32)
        if not real.is_meta and bool((real != real.round()).any()):
            zero = dtype
            if bool(((real - 2 ** (bits - 1)).to(dtype) + 2 ** (bits - 1) != real).any()):
                raise _refuse("its zero points are no integers and need more bits")
            offset = real
        else:
            offset = real.to(torch.uint8)
    recipe = Recipe(tensor, bits, grain)
    layout = Layout(tensor, block, zero, note_for(recipe, shape, dtype))
    return AoAffine(
        codes,
        scale,
        form.grouping,
        offset,
        "none" if offset is None else "zero",
        dtype=form.dtype,
        layout=layout,
    )
