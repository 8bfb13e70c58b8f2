"""Forms of other layouts as torchao's, when a checkpoint is converted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from quantmill.backend import Fit
from quantmill.findings import QuantmillError, declare
from quantmill.forms import Affine, Blocks, Channel, Form, Group, PerTensor, ScaledFloat
from quantmill.forms.convert import not_exact
from quantmill.forms.fit import Conditions, fit_floats, fit_integers, is_symmetric
from quantmill.targeting.types import Target
from quantmill_torchao.config import TorchaoConfig
from quantmill_torchao.forms import AoAffine, AoFloat, Layout
from quantmill_torchao.notes import note_for
from quantmill_torchao.recipes import Grain, Recipe

__all__ = ["fit", "stored_form"]

NO_PLACE = declare("QM-TORCHAO-004", "A form has no exact place in torchao's layouts")
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def _refuse(cause: str) -> QuantmillError:
    return QuantmillError(
        NO_PLACE("form", cause, "dequantize it, and quantize the float weight anew")
    )


def fit(form: Form, target: Target, wanted: Mapping[str, Any]) -> Fit:
    """See :meth:`quantmill.backend.Codec.fit`: int8 and float8 by rows, other integers as intx."""
    seen = Conditions()
    asked: Recipe | None = None
    if wanted.get("quant_type") is not None:
        asked = TorchaoConfig.from_checkpoint(wanted)[0].recipe_of(target.name)
    if isinstance(form, AoAffine) and form.layout.tensor == "Int4Tensor":
        made: Form = form
        group = form.layout.block[1]
        options: dict[str, Any] = {"quant_type": "Int4WeightOnlyConfig", "group_size": group}
    elif isinstance(form, ScaledFloat):
        whole = asked.grain.kind == "tensor" if asked else isinstance(form.grouping, PerTensor)
        made = fit_floats(
            form,
            values=(torch.float8_e4m3fn,),
            scales=(torch.float32,),
            grouping=PerTensor() if whole else Channel(0),
            seen=seen,
        )
        grain = "PerTensor" if whole else "PerRow"
        options = {"quant_type": "Float8WeightOnlyConfig", "granularity": grain}
    else:
        made, options = _fit_integers(form, target, asked, seen)
    if isinstance(made, Affine) and isinstance(made.scale, Tensor) and made is not form:
        if made.scale.is_meta:
            seen.unless.append("a scale is zero")
        elif not bool((made.scale > 0).all()):
            raise not_exact(target.name, "a scale is zero or negative, which torchao does not have")
    if asked is not None:
        found = TorchaoConfig.from_user(options).recipe
        same = ("tensor", "bits", "grain", "mapping")
        if any(getattr(found, name) != getattr(asked, name) for name in same):
            raise not_exact(target.name, f"it fits as {found.words}, asked is {asked.words}")
        # The user's words for the same weight, with its activations.
        options = {"quant_type": wanted["quant_type"]}
    return Fit(made, options, tuple(seen.unless), tuple(seen.notes))


def _fit_integers(
    form: Form, target: Target, asked: Recipe | None, seen: Conditions
) -> tuple[Affine, dict[str, Any]]:
    columns = target.in_features
    byte = asked.tensor == "Int8Tensor" if asked else _is_rows_of_bytes(form, columns)
    if byte:
        even = fit_integers(
            form,
            bits=(8,),
            zeros="signed",
            scales=_FLOATS,
            size=columns,
            positive=True,
            seen=seen,
        )
        assert isinstance(even.scale, Tensor)
        made = replace(even, scale=even.scale.reshape(-1), grouping=Channel(0))
        return made, {"quant_type": "Int8WeightOnlyConfig"}
    size = asked.grain.size[0] if asked and asked.grain.kind == "group" else None
    even = fit_integers(
        form,
        bits=(asked.bits,) if asked else tuple(range(1, 8)),
        zeros="middle" if asked and asked.mapping != "ASYMMETRIC" else "integer",
        scales=_FLOATS,
        size=columns if asked and asked.grain.kind == "row" else size,
        positive=True,
        seen=seen,
    )
    scale, offset = even.scale, even.offset
    assert isinstance(even.grouping, Group)
    assert isinstance(scale, Tensor) and isinstance(offset, Tensor)
    width = even.grouping.size
    if columns % width:
        raise not_exact(target.name, f"groups of {width} are cut at a row's end")
    granularity = f"PerGroup({width})"
    if width >= columns:
        granularity = "PerAxis(0)"
        even = replace(
            even, scale=scale.reshape(-1), offset=offset.reshape(-1), grouping=Channel(0)
        )
    symmetric = not offset.is_meta and is_symmetric(even)
    options = {
        "quant_type": "IntxWeightOnlyConfig",
        "weight_dtype": f"int{even.codes.bits}",
        "granularity": granularity,
        "mapping_type": "SYMMETRIC" if symmetric else "ASYMMETRIC",
    }
    return even, options


def _is_rows_of_bytes(form: Form, columns: int) -> bool:
    """8-bit codes with a scale per row, or per weight."""
    if not isinstance(form, Affine) or form.codes.bits < 8:
        return False
    grouping = form.grouping
    rows = isinstance(grouping, PerTensor | Channel)
    return rows or (isinstance(grouping, Group) and grouping.size >= columns)


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
