"""Forms of other layouts as forms of this one, when a checkpoint is converted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from quantmill.backend import Fit
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
from quantmill.forms.convert import kind_words, not_exact
from quantmill.forms.fit import Conditions, fit_floats, fit_integers, is_symmetric
from quantmill.targeting.types import Target
from quantmill_compressed_tensors.config import CompressedConfig
from quantmill_compressed_tensors.forms import Layout, StoredAffine, StoredFloat
from quantmill_compressed_tensors.fp4 import STYLES, StoredFp4, restyled
from quantmill_compressed_tensors.schemes import Args, Scheme

__all__ = ["fit", "stored_form"]

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


_FLOATS = (torch.float16, torch.bfloat16, torch.float32)
_WIDTHS = (2, 3, 4, 5, 6, 7, 8)


def fit(form: Form, target: Target, wanted: Mapping[str, Any]) -> Fit:
    """See :meth:`quantmill.backend.Codec.fit`: packed integers, or bytes where ``wanted`` asks for
    quantized activations; FP8 for narrow floats."""
    group = _group(target, wanted)
    args = group.weights if group is not None else None
    seen = Conditions()
    made: Affine | ScaledFloat
    if isinstance(form, StoredFp4):
        if args is not None and (args.type, args.num_bits) != ("float", 4):
            raise not_exact(target.name, f"it holds 4-bit floats, and {args.words} is asked for")
        found = restyled(form)
        size = STYLES[found.style].group
        kind = {"strategy": "tensor_group" if found.whole is not None else "group"}
        return Fit(found, {"num_bits": 4, "type": "float", "group_size": size, **kind})
    if isinstance(form, ScaledFloat):
        made, options = _fit_floats(form, args, seen)
    else:
        made, options = _fit_integers(form, target, group, seen)
    if group is not None and group.input_activations is not None:
        options["dynamic_activations"] = group.input_activations.dynamic
    return Fit(stored_form(made), options, tuple(seen.unless), tuple(seen.notes))


def _group(target: Target, wanted: Mapping[str, Any]) -> Scheme | None:
    """The group of a target in the fields that are fixed."""
    if not wanted.get("config_groups"):
        return None
    config, _ = CompressedConfig.from_checkpoint(wanted)
    return config.scheme_of(target)


def _fit_floats(
    form: ScaledFloat, args: Args | None, seen: Conditions
) -> tuple[ScaledFloat, dict[str, Any]]:
    grouping: Grouping | None = None
    if args is not None:
        if args.type != "float":
            raise not_exact(
                "scaled_float", f"it holds narrow floats, and {args.words} is asked for"
            )
        grouping = {"channel": Channel(0), "tensor": PerTensor()}.get(args.means)
        if args.means == "block" and args.block is not None:
            grouping = Blocks(*args.block)
        elif args.means == "group" and args.group_size is not None:
            grouping = Group(args.group_size)
    elif isinstance(form.grouping, Blocks) and form.grouping.rows == 1:
        grouping = Group(form.grouping.columns)
    made = fit_floats(
        form, values=(torch.float8_e4m3fn,), scales=_FLOATS, grouping=grouping, seen=seen
    )
    options: dict[str, Any] = {"num_bits": 8, "type": "float"}
    if isinstance(made.grouping, Blocks):
        size = [made.grouping.rows, made.grouping.columns]
        options |= {"strategy": "block", "block_structure": size}
    elif isinstance(made.grouping, Group):
        options |= {"strategy": "group", "group_size": made.grouping.size}
    elif isinstance(made.grouping, Channel | PerTensor):
        options["strategy"] = "channel" if isinstance(made.grouping, Channel) else "tensor"
    return made, options


def _fit_integers(
    form: Form, target: Target, group: Scheme | None, seen: Conditions
) -> tuple[Affine, dict[str, Any]]:
    args = group.weights if group is not None else None
    size = None
    if args is not None:
        if args.type != "int" or args.means not in ("group", "channel"):
            raise not_exact(
                form.kind, f"it holds {kind_words(form)}, and {args.words} is asked for"
            )
        size = args.group_size if args.means == "group" else target.in_features
    plain = group is not None and group.stores_as != "pack-quantized"
    even = fit_integers(
        form,
        bits=(8,) if plain else _WIDTHS if args is None else (args.num_bits,),
        zeros="signed" if plain else "middle" if args is not None and args.symmetric else "integer",
        scales=_FLOATS,
        size=size,
        ordered=not plain,
        positive=True,
        seen=seen,
    )
    scale = even.scale
    assert isinstance(even.grouping, Group) and isinstance(scale, Tensor)
    if not scale.is_meta and bool((scale < 0).any()):
        raise not_exact(target.name, "a scale is negative, which compressed-tensors does not have")
    options: dict[str, Any] = {"num_bits": even.codes.bits, "type": "int"}
    width = even.grouping.size
    if width >= target.in_features and (size is None or size >= target.in_features):
        if even.group_index is None:
            offset = even.offset
            assert offset is None or isinstance(offset, Tensor)
            even = replace(
                even,
                scale=scale.reshape(-1),
                offset=None if offset is None else offset.reshape(-1),
                grouping=Channel(0),
            )
        options["strategy"] = "channel"
    else:
        options |= {"strategy": "group", "group_size": width}
    if even.offset is None or not scale.is_meta:
        options["symmetric"] = is_symmetric(even)
    return even, options
