"""The disk layout of optimum-quanto as a codec over the affine and the scaled float form.

Relative to the module, for a weight ``[out, in]``::

    weight._data         8 bits: int8, or an 8-bit float, [out, in]
    weight._data._data   fewer: uint8 [ceil(rows / per byte), columns]; the codes [rows, columns]
                         are [out * in / group, group], or [out, in] without groups. Cut into as
                         many slices of rows as codes fit a byte, the first in the lowest bits
    weight._scale        float [rows, 1]; a scalar for 8 bits and a single row
    weight._shift        fewer than 8 bits: float [rows, 1], w = code * scale - shift,
                         or uint8, w = (code - shift) * scale
    input_scale, output_scale   float []: 1 where activations are not quantized

There is no setting in the file: 8 bits show in the dtype of the data, groups in its columns.
Source: the bytes of the checkpoints in ``tests/data``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from quantmill.backend import Codec, Fit
from quantmill.checkpoint.headers import TensorHeader
from quantmill.checkpoint.reader import torch_dtype
from quantmill.findings import QuantmillError, declare
from quantmill.forms import Affine, Channel, Codes, Form, Group, Grouping, ScaledFloat
from quantmill.forms.convert import not_exact
from quantmill.forms.fit import Conditions, fit_floats, fit_integers
from quantmill.targeting.types import Target
from quantmill_quanto.config import FLOATS, QuantoConfig
from quantmill_quanto.forms import joined, parted

__all__ = ["QuantoCodec", "abstract_form", "group_size", "grouping_of", "pack", "unpack"]

BAD_TENSORS = declare("QM-QUANTO-001", "A quantized weight's tensors contradict each other")
SCALED_ACTIVATIONS = declare("QM-QUANTO-002", "A module was stored with quantized activations")

_FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_FLOAT8 = {name: getattr(torch, kind) for name, kind in FLOATS.items()}
_BYTES, _PACKED = "weight._data", "weight._data._data"
_SCALE, _SHIFT = "weight._scale", "weight._shift"
_ACTIVATIONS = ("input_scale", "output_scale")


def _refuse(target: Target, cause: str) -> QuantmillError:
    return QuantmillError(
        BAD_TENSORS(target.name, cause, "the checkpoint is damaged: get it again")
    )


def group_size(columns: int) -> int | None:
    """Columns per group of a row of fewer than 8 bits, None for the whole row."""
    if columns <= 128:
        return None
    return next((size for size in (128, 96, 64, 32) if columns % size == 0), None)


def grouping_of(columns: int, size: int | None) -> Grouping:
    """The grouping for ``size`` columns per group."""
    return Channel(0) if size is None or size == columns else Group(size)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Bytes ``[ceil(rows / per byte), columns]`` of uint8 codes ``[rows, columns]``."""
    step = -(-codes.shape[0] * bits // 8)
    packed = torch.zeros(step, codes.shape[1], dtype=torch.uint8, device=codes.device)
    for index in range(8 // bits):
        part = codes[index * step : (index + 1) * step]
        packed[: part.shape[0]] |= part << bits * index
    return packed


def unpack(packed: Tensor, bits: int, rows: int) -> Tensor:
    """uint8 codes ``[rows, columns]``: the inverse."""
    mask = (1 << bits) - 1
    slices = [(packed >> bits * index) & mask for index in range(8 // bits)]
    return torch.cat(slices)[:rows]


def abstract_form(
    shape: tuple[int, int],
    bits: int,
    size: int | None,
    scale: torch.dtype,
    dtype: torch.dtype,
    values: torch.dtype = torch.int8,
    shift: torch.dtype | None = None,
) -> Affine | ScaledFloat:
    """A form on the meta device.

    Args:
        shape: of the weight.
        bits: per weight.
        size: columns per group, None for rows.
        scale: dtype of scales.
        dtype: of the tensor that it stands for.
        values: int8 or an 8-bit float, for 8 bits.
        shift: dtype of shifts if not that of scales.
    """
    meta = torch.device("meta")
    grouping = grouping_of(shape[1], size)
    scales = torch.empty(grouping.scale_shape(shape), dtype=scale, device=meta)
    if bits < 8:
        offset = scales if shift is None else scales.to(shift)
        kind = "minimum" if offset.dtype.is_floating_point else "zero"
        codes = Codes.empty(shape, bits, "dense", meta)
        return Affine(codes, scales, grouping, offset, kind, dtype=dtype)
    if values == torch.int8:
        return Affine(Codes.empty(shape, 8, "i8", meta), scales, grouping, dtype=dtype)
    data = torch.empty(shape, dtype=values, device=meta)
    return ScaledFloat(data, scales, grouping, dtype=dtype)


class QuantoCodec(Codec[QuantoConfig]):
    """qint2, qint4, qint8 and qfloat8 weights."""

    suffixes: ClassVar[tuple[str, ...]] = (_BYTES, _PACKED, _SCALE, _SHIFT, *_ACTIVATIONS)

    def encoding_bytes(self, form: Form) -> int:
        if not isinstance(form, Affine) or form.codes.bits == 8:
            return 0
        return Codes.unpacking_bytes(form.codes.count, form.codes.bits)

    def decoding_bytes(self, form: Form) -> int:
        if not isinstance(form, Affine) or form.codes.bits == 8:
            return 0
        return Codes.reordering_bytes(form.codes.count, form.codes.bits)

    def encode(self, form: Form) -> dict[str, Tensor]:
        assert isinstance(form, Affine | ScaledFloat) and isinstance(form.scale, Tensor)
        form, active = parted(form)
        assert isinstance(form.scale, Tensor)
        scale = form.scale.reshape(-1, 1)
        if isinstance(form, Affine) and form.codes.bits < 8:
            stored = self._encode_packed(form, scale)
        else:
            data = form.values if isinstance(form, ScaledFloat) else form.codes.data
            # The peer scales a single row as a whole tensor.
            stored = {_BYTES: data, _SCALE: scale.reshape(()) if form.shape[0] == 1 else scale}
        for name, value in zip(_ACTIVATIONS, active, strict=True):
            one = torch.ones((), dtype=scale.dtype, device=scale.device)
            stored[name] = one if value is None else value
        return stored

    def _encode_packed(self, form: Affine, scale: Tensor) -> dict[str, Tensor]:
        assert isinstance(form.offset, Tensor)
        bits, rows = form.codes.bits, scale.shape[0]
        if scale.is_meta:
            size = (-(-rows * bits // 8), form.codes.count // rows)
            packed = torch.empty(size, dtype=torch.uint8, device="meta")
        else:
            packed = pack(form.codes.unpack().reshape(rows, -1), bits)
        shift = form.offset.reshape(-1, 1)
        if form.offset_kind == "minimum":
            shift = -shift
        return {_PACKED: packed, _SCALE: scale, _SHIFT: shift}

    def decode(self, tensors: Mapping[str, Tensor], target: Target, dtype: torch.dtype) -> Form:
        form = self._decode(tensors, target, dtype)
        if self.config.activations is None:
            _check_activations(tensors, target)
            return form
        return joined(form, _active(tensors, target))

    def _decode(
        self, tensors: Mapping[str, Tensor], target: Target, dtype: torch.dtype
    ) -> Affine | ScaledFloat:
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        bits, size = self._measure(shapes, target)
        shape = (target.out_features, target.in_features)
        grouping = grouping_of(shape[1], size)
        groups = grouping.scale_shape(shape)
        scale = tensors[_SCALE]
        if scale.dtype not in _FLOATS.values():
            raise _refuse(target, f"{_SCALE} is {scale.dtype}")
        if not bool((torch.isfinite(scale) & (scale >= 0)).all()):
            raise _refuse(target, f"{_SCALE} holds a negative number, NaN or infinity")
        scale = scale.reshape(groups)
        if bits == 8:
            data = tensors[_BYTES]
            zero = scale.reshape(-1) == 0
            if bool(zero.any()) and bool(data[zero].to(torch.float32).any()):
                raise _refuse(target, f"{_SCALE} is 0 for a row of weights that are not")
            if data.dtype == torch.int8:
                return Affine(Codes(data, 8, shape, "i8"), scale, grouping, dtype=dtype)
            if data.dtype not in _FLOAT8.values():
                raise _refuse(target, f"{_BYTES} is {data.dtype}")
            return ScaledFloat(data, scale, grouping, dtype=dtype)
        packed, shift = tensors[_PACKED], tensors[_SHIFT]
        if packed.dtype != torch.uint8:
            raise _refuse(target, f"{_PACKED} is {packed.dtype}, not uint8")
        if shift.dtype not in (scale.dtype, torch.uint8):
            raise _refuse(target, f"{_SHIFT} is {shift.dtype}, {_SCALE} {scale.dtype}")
        if not bool(torch.isfinite(shift).all()):
            raise _refuse(target, f"{_SHIFT} holds NaN or infinity")
        real = shift.dtype.is_floating_point
        codes = unpack(packed, bits, scale.numel())
        zero = scale.reshape(-1) == 0
        if bool(zero.any()) and bool(codes[zero].any()):
            raise _refuse(target, f"{_SCALE} is 0 for a group of codes that are not")
        codes = codes.reshape(shape)
        offset = (-shift if real else shift).reshape(groups)
        kind = "minimum" if real else "zero"
        packed_codes = Codes.pack(codes, bits, "dense")
        return Affine(packed_codes, scale, grouping, offset, kind, dtype=dtype)

    @classmethod
    def fit(cls, form: Form, target: Target, wanted: Mapping[str, Any]) -> Fit:
        seen = Conditions()
        weights = wanted.get("weights")
        scales = tuple(_FLOATS.values())
        if isinstance(form, ScaledFloat):
            kinds = tuple(_FLOAT8.values()) if weights not in _FLOAT8 else (_FLOAT8[weights],)
            floats = fit_floats(form, values=kinds, scales=scales, grouping=Channel(0), seen=seen)
            found = next(name for name, kind in _FLOAT8.items() if kind == floats.values.dtype)
            made: Affine | ScaledFloat = floats
        else:
            narrow = isinstance(form, Affine) and form.codes.bits <= 4
            if weights is not None:
                narrow = weights in ("int4", "int2")
            made = _fit_integers(form, target, narrow, weights, scales, seen)
            found = f"int{made.codes.bits}"
        if weights not in (None, found):
            raise not_exact(target.name, f"it fits as {found}, and {weights} is asked for")
        assert isinstance(made.scale, Tensor)
        if not made.scale.is_meta and bool((made.scale < 0).any()):
            raise not_exact(target.name, "a scale is negative, which Quanto does not have")
        return Fit(made, {"weights": found}, tuple(seen.unless), tuple(seen.notes))

    def describe(
        self, headers: Mapping[str, TensorHeader], target: Target, dtype: torch.dtype
    ) -> Form | None:
        if _BYTES not in headers and _PACKED not in headers:
            return None
        form = self._describe(headers, target, dtype)
        if self.config.activations is None:
            return form
        scales = [
            torch.empty(headers[name].shape, dtype=_FLOATS[headers[name].dtype], device="meta")
            if name in headers and headers[name].dtype in _FLOATS
            else None
            for name in _ACTIVATIONS
        ]
        return joined(form, (scales[0], scales[1]))

    def _describe(
        self, headers: Mapping[str, TensorHeader], target: Target, dtype: torch.dtype
    ) -> Affine | ScaledFloat:
        shapes = {name: tuple(item.shape) for name, item in headers.items()}
        bits, size = self._measure(shapes, target)
        scale = _FLOATS.get(headers[_SCALE].dtype)
        if scale is None:
            raise _refuse(target, f"{_SCALE} is {headers[_SCALE].dtype}")
        shape = (target.out_features, target.in_features)
        if bits < 8:
            shift = torch.uint8 if headers[_SHIFT].dtype == "U8" else None
            return abstract_form(shape, bits, size, scale, dtype, shift=shift)
        values = torch_dtype(headers[_BYTES].dtype)
        if values not in (torch.int8, *_FLOAT8.values()):
            raise _refuse(target, f"{_BYTES} is {headers[_BYTES].dtype}")
        return abstract_form(shape, 8, None, scale, dtype, values)

    def _measure(
        self, shapes: Mapping[str, tuple[int, ...]], target: Target
    ) -> tuple[int, int | None]:
        """Bits and columns per group, from the shapes."""
        shape = (target.out_features, target.in_features)
        wide = _BYTES in shapes
        data = _BYTES if wide else _PACKED
        missing = [
            name for name in (data, _SCALE, *([] if wide else [_SHIFT])) if name not in shapes
        ]
        if missing:
            raise _refuse(target, f"{' and '.join(missing)} are missing")
        found, scale = shapes[data], shapes[_SCALE]
        if wide:
            if _PACKED in shapes or _SHIFT in shapes:
                raise _refuse(target, f"it has {_BYTES} and tensors of fewer bits")
            if found != shape or scale not in ((shape[0], 1), *([()] if shape[0] == 1 else [])):
                raise _refuse(
                    target,
                    f"{data} is {list(found)} and {_SCALE} {list(scale)}, the weight {list(shape)}",
                )
            return 8, None
        size = group_size(shape[1]) or shape[1]
        rows = shape[0] * shape[1] // size
        # Half of a 4-bit weight would be a 2-bit one: only what the config names is read.
        for bits in self.config.packed_bits:
            if found == (-(-rows * bits // 8), size) and scale == shapes[_SHIFT] == (rows, 1):
                return bits, None if size == shape[1] else size
        raise _refuse(
            target,
            f"{data} is {list(found)}, {_SCALE} {list(scale)} and {_SHIFT} {list(shapes[_SHIFT])};"
            f" a weight {list(shape)} of {self.config.weights} has {rows} groups of {size}",
        )


def _fit_integers(
    form: Form,
    target: Target,
    narrow: bool,
    weights: str | None,
    scales: tuple[torch.dtype, ...],
    seen: Conditions,
) -> Affine:
    columns = target.in_features
    if not narrow:
        made = fit_integers(
            form,
            bits=(8,),
            zeros="signed",
            scales=scales,
            size=columns,
            positive=True,
            seen=seen,
        )
        assert isinstance(made.scale, Tensor)
        return replace(made, scale=made.scale.reshape(-1), grouping=Channel(0))
    size = group_size(columns)
    added = isinstance(form, Affine) and form.offset_kind == "minimum"
    made = fit_integers(
        form,
        bits=(2, 4) if weights is None else (int(weights.removeprefix("int")),),
        zeros="minimum" if added else "integer",
        scales=scales,
        size=size or columns,
        positive=True,
        seen=seen,
    )
    grouping = grouping_of(columns, size)
    shape = grouping.scale_shape(made.shape)
    scale, offset = made.scale, made.offset
    assert isinstance(scale, Tensor) and isinstance(offset, Tensor)
    return replace(
        made, scale=scale.reshape(shape), offset=offset.reshape(shape), grouping=grouping
    )


def _active(tensors: Mapping[str, Tensor], target: Target) -> tuple[Tensor, Tensor]:
    """Scales of inputs and outputs."""
    for name in _ACTIVATIONS:
        value = tensors.get(name)
        if value is None:
            raise _refuse(target, f"{name} is missing, and its activations are quantized")
        if value.numel() != 1 or value.dtype not in _FLOATS.values():
            raise _refuse(target, f"{name} is {value.dtype} {list(value.shape)}, not one float")
        if not 0 < float(value) < float("inf"):
            raise _refuse(target, f"{name} is {float(value)}, not finite and positive")
    return tensors[_ACTIVATIONS[0]], tensors[_ACTIVATIONS[1]]


def _check_activations(tensors: Mapping[str, Tensor], target: Target) -> None:
    for name in _ACTIVATIONS:
        value = tensors.get(name)
        if value is not None and not (value.numel() == 1 and float(value.item()) == 1.0):
            raise QuantmillError(
                SCALED_ACTIVATIONS(
                    target.name,
                    f"its {name} is {value.tolist()}, and its config has no activations",
                    "say in the config which activations it has: int8 or float8",
                )
            )
