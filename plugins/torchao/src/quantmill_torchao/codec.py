"""The disk layout of torchao's safetensors files as a codec over affine and scaled float forms.

Relative to the module, for a weight ``[out, in]`` whose blocks of ``b0 x b1`` share a scale::

    Int8Tensor                 value = (qdata - zero_point) * scale
      _weight_qdata            int8 [out, in]
      _weight_scale            float [out / b0, in / b1]
      _weight_zero_point       int8, of the shape of the scale; zeros, as torchao makes it
      _weight_act_quant_scale, _weight_act_quant_zero_point, _weight_act_pre_scale
    IntxUnpackedToInt8Tensor   the same, with 1 to 8 bits in each byte; zero points int8 or float
    Int4Tensor                 value = qdata * scale + zero_point
      _weight_qdata            int8 [out, in / 2], signed, the first code in the low half
      _weight_scale, _weight_zero_point    float [in / b1, out]
    Float8Tensor               value = qdata * scale
      _weight_qdata            float8 [out, in]
      _weight_scale            float32 [out / b0, in / b1]

The class and its attributes are in the ``__metadata__`` of the file; they outrank the config, which
decides where a file has none. Codes of fewer than 8 bits are packed in memory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from quantmill.backend import Codec, Fit
from quantmill.checkpoint.headers import TensorHeader
from quantmill.checkpoint.reader import torch_dtype
from quantmill.findings import QuantmillError, declare
from quantmill.forms import Codes, Form
from quantmill.targeting.types import Target
from quantmill_torchao.config import TorchaoConfig
from quantmill_torchao.foreign import fit, stored_form
from quantmill_torchao.forms import (
    AoAffine,
    AoFloat,
    Layout,
    abstract_affine,
    abstract_float,
)
from quantmill_torchao.notes import (
    NOTE_BYTES,
    file_metadata,
    inputs_of,
    note_for,
    parse,
    plain_dtype,
)

__all__ = ["TorchaoCodec"]

BAD_TENSORS = declare("QM-TORCHAO-001", "A quantized weight's tensors contradict each other")
UNREADABLE = declare("QM-TORCHAO-002", "A weight is stored as a tensor that is not read")
BAD_SCALE = declare("QM-TORCHAO-003", "A scale of a quantized weight is no scale")

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
_KNOWN = ("Int8Tensor", "IntxUnpackedToInt8Tensor", "Int4Tensor", "Float8Tensor")
_EXTRA = ("act_quant_scale", "act_quant_zero_point", "act_pre_scale")


@dataclass(frozen=True)
class _Seen:
    """Dtype and shape of a tensor, in a header or in memory."""

    dtype: torch.dtype
    shape: tuple[int, ...]


def _refuse(target: Target, cause: str) -> QuantmillError:
    return QuantmillError(
        BAD_TENSORS(target.name, cause, "the checkpoint is damaged: get it again")
    )


class TorchaoCodec(Codec[TorchaoConfig]):
    """Int8, intx, int4 and float8 tensors."""

    suffixes: ClassVar[tuple[str, ...]] = tuple(
        f"_weight_{name}"
        for name in ("qdata", "scale", "zero_point", "scale_and_zero", "per_tensor_scale", *_EXTRA)
    )
    note_bytes: ClassVar[int] = NOTE_BYTES

    def encoding_bytes(self, form: Form) -> int:
        if not isinstance(form, AoAffine) or form.codes.packing != "dense":
            return 0
        if form.layout.tensor == "Int4Tensor":
            return form.codes.nbytes  # In pairs already.
        return Codes.unpacking_bytes(form.codes.count, form.codes.bits)

    def decoding_bytes(self, form: Form) -> int:
        if not isinstance(form, AoAffine) or form.codes.packing != "dense":
            return 0
        if form.layout.tensor == "Int4Tensor":
            return form.codes.nbytes  # In pairs already.
        return Codes.reordering_bytes(form.codes.count, form.codes.bits)

    def encode(self, form: Form) -> dict[str, Tensor]:
        form = stored_form(form, self.config)
        assert isinstance(form.scale, Tensor)
        rows, columns = form.shape
        block = form.layout.block
        if isinstance(form, AoFloat):
            size = (rows // block[0], columns // block[1])
            return {"_weight_qdata": form.values, "_weight_scale": form.scale.reshape(size)}
        if form.layout.tensor == "Int4Tensor":
            assert form.float_zero is not None
            groups = (rows, columns // block[1])
            found = {
                "_weight_qdata": _nibbles_out(form.codes),
                "_weight_scale": form.scale.reshape(groups).t().contiguous(),
                "_weight_zero_point": form.float_zero,
            }
        else:
            size = (rows // block[0], columns // block[1])
            found = {
                "_weight_qdata": _bytes_out(form.codes),
                "_weight_scale": form.scale.reshape(size),
            }
            if form.layout.zero is not None:
                found["_weight_zero_point"] = _zeros_out(form, size, form.layout.zero)
        for name in _EXTRA:
            value = getattr(form, name)
            if value is not None:
                found[f"_weight_{name}"] = value
        return found

    def annotate(self, form: Form, name: str) -> dict[str, str]:
        return {name: stored_form(form, self.config).layout.note}

    def metadata(self, tensors: Sequence[str], notes: Mapping[str, str]) -> dict[str, str]:
        return file_metadata(tensors, notes)

    def decode(self, tensors: Mapping[str, Tensor], target: Target, dtype: torch.dtype) -> Form:
        seen = {name: _Seen(item.dtype, tuple(item.shape)) for name, item in tensors.items()}
        skeleton = self._measure(seen, target, dtype)
        if skeleton is None:
            raise _refuse(target, f"it has only {', '.join(sorted(seen)) or 'nothing'}")
        qdata, scale = tensors["_weight_qdata"], tensors["_weight_scale"]
        if isinstance(skeleton, AoFloat):
            _sound(scale, qdata.to(torch.float32) if bool((scale == 0).any()) else None, target)
            return replace(skeleton, values=qdata, scale=scale.reshape(skeleton.scale.shape))
        extra: dict[str, Any] = {name: tensors.get(f"_weight_{name}") for name in _EXTRA}
        zero = tensors.get("_weight_zero_point")
        if zero is not None and not bool(torch.isfinite(zero).all()):
            raise _refuse(target, "_weight_zero_point holds NaN or infinity")
        if skeleton.layout.tensor == "Int4Tensor":
            assert zero is not None
            _sound(scale, None, target)
            scales = scale.t().contiguous()
            least = zero.t().to(torch.float32) - 8 * scales.to(torch.float32)
            return replace(
                skeleton,
                codes=_nibbles_in(qdata, skeleton.shape),
                scale=scales.reshape(skeleton.scale.shape),
                offset=least.reshape(skeleton.scale.shape),
                float_zero=zero,
                **extra,
            )
        bits = skeleton.codes.bits
        _sound(scale, None, target)
        if bits == 8:
            codes = Codes(qdata, 8, skeleton.shape, "i8")
            plain = zero is None or (
                not zero.is_floating_point() and not bool(zero.to(torch.int16).any())
            )
            if plain:
                return replace(
                    skeleton, codes=codes, scale=scale.reshape(skeleton.scale.shape), **extra
                )
            assert zero is not None
            shape = (target.out_features, target.in_features)
            skeleton = abstract_affine(shape, 8, skeleton.layout, scale.dtype, dtype, zeros=True)
            offset = zero.to(torch.float32) if zero.is_floating_point() else zero
        else:
            assert zero is not None
            codes = _packed(qdata, bits, target)
            middle = 2 ** (bits - 1)
            if zero.is_floating_point():
                offset = zero.to(torch.float32) + middle
            else:
                offset = (zero.to(torch.int16) + middle).to(torch.uint8)
        size = skeleton.scale.shape
        return replace(
            skeleton, codes=codes, scale=scale.reshape(size), offset=offset.reshape(size), **extra
        )

    @classmethod
    def fit(cls, form: Form, target: Target, wanted: Mapping[str, Any]) -> Fit:
        return fit(form, target, wanted)

    def describe(
        self, headers: Mapping[str, TensorHeader], target: Target, dtype: torch.dtype
    ) -> Form | None:
        seen = {
            name: _Seen(torch_dtype(item.dtype), tuple(item.shape))
            for name, item in headers.items()
        }
        form = self._measure(seen, target, dtype)
        if isinstance(form, AoAffine):
            extra: dict[str, Any] = {
                name: torch.empty(item.shape, dtype=item.dtype, device="meta")
                for name in _EXTRA
                if (item := seen.get(f"_weight_{name}")) is not None
            }
            return replace(form, **extra)
        return form

    def _measure(
        self, seen: Mapping[str, _Seen], target: Target, dtype: torch.dtype
    ) -> AoAffine | AoFloat | None:
        """The form on the meta device; None where there are no quantized tensors."""
        if not any(name in seen for name in ("_weight_qdata", "_weight_scale")):
            return None
        note = self._note(seen, target)
        kind, data = note["_type"], note["_data"]
        if kind not in _KNOWN:
            raise QuantmillError(
                UNREADABLE(
                    target.name,
                    f"it is a {kind}; read are {', '.join(_KNOWN)}",
                    "dequantize it with torchao on the device it was made for, and quantize anew",
                )
            )
        if note.get("_version", 1) != 1:
            raise QuantmillError(
                UNREADABLE(
                    target.name,
                    f"its {kind} has version {note['_version']!r}; version 1 is read",
                    "take a newer quantmill-torchao, or quantize the float model anew",
                )
            )
        needed = ["qdata", "scale"]
        needed += ["zero_point"] if kind in ("IntxUnpackedToInt8Tensor", "Int4Tensor") else []
        listed = note.get("_tensor_data_names")
        needed += [name for name in listed or () if isinstance(name, str) and name not in needed]
        missing = [name for name in needed if f"_weight_{name}" not in seen]
        if missing:
            raise _refuse(target, f"_weight_{' and _weight_'.join(missing)} are missing")
        try:
            inputs_of(note)
        except ValueError as error:
            raise QuantmillError(
                UNREADABLE(target.name, str(error), "quantize the float model anew")
            ) from None
        shape = (target.out_features, target.in_features)
        block = _block(data.get("block_size"), shape, target)
        zero = seen.get("_weight_zero_point")
        layout = Layout(kind, block, zero.dtype if zero else None, target.note or note["text"])
        scale = seen["_weight_scale"]
        if scale.dtype not in _FLOATS:
            raise _refuse(target, f"_weight_scale is {scale.dtype}, not a float")
        groups = (shape[0] // block[0], shape[1] // block[1])
        stored = shape
        if kind == "Int4Tensor":
            groups, stored = (groups[1], groups[0]), (shape[0], shape[1] // 2)
        qdata = seen["_weight_qdata"]
        allowed = _FLOAT8 if kind == "Float8Tensor" else (torch.int8,)
        if qdata.dtype not in allowed or qdata.shape != stored:
            raise _refuse(
                target,
                f"_weight_qdata is {qdata.dtype} {list(qdata.shape)}, a {kind} of the model's"
                f" {list(shape)} has {list(stored)}",
            )
        if scale.shape != groups and not (scale.shape in ((), (1,)) and groups == (1, 1)):
            raise _refuse(
                target,
                f"_weight_scale is {list(scale.shape)}, blocks {list(block)} of a weight"
                f" {list(shape)} need {list(groups)}",
            )
        if zero is not None and (
            zero.shape != scale.shape or zero.dtype not in (torch.int8, *_FLOATS)
        ):
            raise _refuse(
                target,
                f"_weight_zero_point is {zero.dtype} {list(zero.shape)}, the scale is"
                f" {list(scale.shape)}",
            )
        if kind == "Float8Tensor":
            return abstract_float(shape, qdata.dtype, layout, dtype)
        bits = 4 if kind == "Int4Tensor" else 8
        if kind == "IntxUnpackedToInt8Tensor":
            said = plain_dtype(data.get("target_dtype")).removeprefix("int")
            if said not in ("1", "2", "3", "4", "5", "6", "7", "8"):
                raise _refuse(target, f"its note says target_dtype {said!r}")
            bits = int(said)
        return abstract_affine(shape, bits, layout, scale.dtype, dtype)

    def _note(self, seen: Mapping[str, _Seen], target: Target) -> dict[str, Any]:
        """The weight's note; where the file has none, what the config makes of it."""
        if target.note:
            found = parse(target.note)
            if found is None or "_data" not in found:
                raise _refuse(target, f"its note in __metadata__ is {target.note[:80]!r}")
            return {**found, "text": target.note}
        recipe = self.config.recipe_of(target.name) or self.config.recipe
        text = note_for(recipe, (target.out_features, target.in_features), torch.bfloat16)
        made = parse(text)
        assert made is not None
        return {**made, "text": text}


def _block(value: Any, shape: tuple[int, int], target: Target) -> tuple[int, int]:
    if value in ([], None):
        return shape
    fits = (
        isinstance(value, list | tuple)
        and len(value) == 2
        and all(isinstance(n, int) and n > 0 for n in value)
    )
    if not fits or shape[0] % value[0] or shape[1] % value[1]:
        raise _refuse(target, f"block_size {value} does not divide a weight {list(shape)}")
    return int(value[0]), int(value[1])


def _sound(scale: Tensor, values: Tensor | None, target: Target) -> None:
    """Refuse scales that no quantizer makes; zero is for zeros."""
    wide = scale.to(torch.float32)
    bad = ~(torch.isfinite(wide) & (wide > 0))
    if values is not None and bool((wide[bad] == 0).all()):
        bad &= bool(values[_under(wide == 0, values)].any())
    if not bool(bad.any()):
        return
    index = int(torch.argmax(bad.reshape(-1).to(torch.uint8)).item())
    raise QuantmillError(
        BAD_SCALE(
            target.name,
            f"_weight_scale is {float(wide.reshape(-1)[index])} at element {index}, and a scale is"
            " finite and positive",
            "the checkpoint is damaged: get it again",
        )
    )


def _under(zero: Tensor, values: Tensor) -> Tensor:
    """Mask of the values under a scale of zero."""
    grid = zero if zero.ndim == 2 else zero.reshape(1, 1)
    tall = grid.repeat_interleave(values.shape[0] // grid.shape[0], dim=0)
    return tall.repeat_interleave(values.shape[1] // grid.shape[1], dim=1)


def _packed(qdata: Tensor, bits: int, target: Target) -> Codes:
    """Signed bytes as packed unsigned codes."""
    middle = 2 ** (bits - 1)
    low, high = (int(item) for item in qdata.aminmax()) if qdata.numel() else (0, 0)
    if low < -middle or high >= middle:
        raise _refuse(target, f"_weight_qdata holds {low} to {high}, which are no {bits} bits")
    return Codes.pack((qdata + middle).to(torch.uint8), bits, "dense")


def _bytes_out(codes: Codes) -> Tensor:
    """Codes as signed bytes ``[out, in]``."""
    if codes.packing == "i8":
        return codes.data.reshape(codes.shape)
    if codes.data.is_meta:
        return torch.empty(codes.shape, dtype=torch.int8, device="meta")
    return codes.unpack().to(torch.int8) - 2 ** (codes.bits - 1)


def _zeros_out(form: AoAffine, size: tuple[int, int], dtype: torch.dtype) -> Tensor:
    if form.offset is None:
        return torch.zeros(size, dtype=dtype, device=form.codes.data.device)
    assert isinstance(form.offset, Tensor)
    middle = 0 if form.codes.packing == "i8" else 2 ** (form.codes.bits - 1)
    offset = form.offset if form.offset.is_floating_point() else form.offset.to(torch.int16)
    return (offset - middle).to(dtype).reshape(size)


def _nibbles_out(codes: Codes) -> Tensor:
    """Signed codes in pairs, ``[out, in / 2]``; the dense packing has the same order."""
    rows, columns = codes.shape
    if codes.data.is_meta:
        return torch.empty(rows, columns // 2, dtype=torch.int8, device="meta")
    # The middle code becomes 0: the highest bit of each half is turned.
    return (codes.data.reshape(rows, columns // 2) ^ 0x88).view(torch.int8)


def _nibbles_in(qdata: Tensor, shape: tuple[int, ...]) -> Codes:
    return Codes((qdata.contiguous().view(torch.uint8) ^ 0x88).reshape(-1), 4, shape, "dense")
