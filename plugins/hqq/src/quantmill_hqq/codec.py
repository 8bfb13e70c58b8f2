"""The disk layout of HQQ as a codec over the affine form.

Both hqq's safetensors files and transformers' hold, per module, the state of an ``HQQLinear`` with
every setting as a tensor. With ``n`` weights and groups of ``size``, relative to the module::

    W_q            uint8, or int32 with 3 bits; see quantmill_hqq.packing
                   axis 1: [n / size / codes per word, size], axis 0: [size / ..., n / size]
    scale, zero    float [n / size, 1] (axis 1) or [1, n / size] (axis 0): w = (code - zero) * scale
    shape          int64 [2]: of the weight
    nbits, group_size, axis                                  int32 []
    channel_wise, optimize, round_zero, view_as_float, quant_scale, quant_zero, offload_meta,
    stores_quant_config, encoded_state_dict                  uint8 []: booleans
    packing, unpack_view_dtype, compute_dtype                uint8 [length]: ASCII text

With ``view_as_float`` the words are stored as floats, of as many bytes a row. ``nbits`` may be 5 or
6 in 8-bit words, and 1.58 (a float32) in 2-bit ones. Tensors outrank the config; settings that
contradict the shapes of ``W_q`` and ``scale`` are an error. Source: the bytes of the checkpoints in
``tests/data``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from quantmill.backend import Codec, Fit
from quantmill.checkpoint.headers import TensorHeader
from quantmill.checkpoint.reader import torch_dtype
from quantmill.findings import QuantmillError, declare
from quantmill.forms import Affine, Codes, Flat, Form, Group, Strided
from quantmill.forms.convert import not_exact
from quantmill.forms.fit import Conditions, fit_integers
from quantmill.targeting.types import Target
from quantmill_hqq.config import HqqConfig
from quantmill_hqq.forms import Layout, Settings, StoredAffine, abstract_form, grouping_of
from quantmill_hqq.packing import NAMES, WORDS, fits, pack, unpack, words_of

__all__ = ["HqqCodec"]

BAD_TENSORS = declare("QM-HQQ-001", "A quantized weight's tensors contradict each other")
UNREADABLE = declare("QM-HQQ-002", "A weight is stored in a variant of HQQ that is not read")

_FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_NUMBERS = ("nbits", "group_size", "axis")
_ON = ("channel_wise", "stores_quant_config", "encoded_state_dict")
_OFF = ("quant_scale", "quant_zero")
_FREE = ("optimize", "round_zero", "offload_meta", "view_as_float")
_WIDER = {5: 8, 6: 8, 1.58: 2}
"""Bits that hqq has without a packing of their own, to those of the words they lie in."""
_TEXTS = ("packing", "unpack_view_dtype", "compute_dtype")


def _refuse(target: Target, cause: str) -> QuantmillError:
    return QuantmillError(
        BAD_TENSORS(target.name, cause, "the checkpoint is damaged: get it again")
    )


class HqqCodec(Codec[HqqConfig]):
    """1, 2, 3, 4 and 8 bits, both axes."""

    suffixes: ClassVar[tuple[str, ...]] = (
        *("W_q", "scale", "zero", "shape"),
        *_NUMBERS,
        *_ON,
        *_OFF,
        *_FREE,
        *_TEXTS,
    )

    def encoding_bytes(self, form: Form) -> int:
        assert isinstance(form, Affine)
        return Codes.unpacking_bytes(form.codes.count, form.codes.bits)

    def decoding_bytes(self, form: Form) -> int:
        assert isinstance(form, Affine)
        return Codes.reordering_bytes(form.codes.count, form.codes.bits)

    def encode(self, form: Form) -> dict[str, Tensor]:
        assert isinstance(form, Affine)
        assert isinstance(form.scale, Tensor) and isinstance(form.offset, Tensor)
        bits, count = form.codes.bits, form.codes.count
        axis = 0 if isinstance(form.grouping, Strided) else 1
        assert isinstance(form.grouping, Strided | Flat | Group)
        layout = Layout(bits, form.grouping.size, axis)
        rows, columns = layout.matrix(count)
        if form.codes.data.is_meta:
            words = torch.empty(words_of(rows, bits), columns, dtype=WORDS[bits], device="meta")
        else:
            words = pack(form.codes.unpack().reshape(rows, columns), bits)
        settings = (
            form.settings
            if isinstance(form, StoredAffine)
            else Settings(optimize=self.config.optimize, round_zero=bits == 4)
        )
        if settings.view is not None:
            words = words.view(settings.view)
        device = form.codes.data.device
        stored = {
            "W_q": words,
            "scale": form.scale.reshape(layout.column(count)),
            "zero": form.offset.reshape(layout.column(count)),
            "shape": torch.tensor(form.shape, dtype=torch.int64, device=device),
        }
        for name, number in zip(_NUMBERS, (settings.nbits or bits, layout.size, axis), strict=True):
            kind = torch.float32 if isinstance(number, float) else torch.int32
            stored[name] = torch.tensor(number, dtype=kind, device=device)
        flags = {
            **dict.fromkeys(_ON, True),
            **dict.fromkeys(_OFF, False),
            "optimize": settings.optimize,
            "round_zero": settings.round_zero,
            "offload_meta": settings.offload_meta,
            "view_as_float": settings.view is not None,
        }
        for name, flag in flags.items():
            stored[name] = torch.tensor(int(flag), dtype=torch.uint8, device=device)
        for name, text in _texts(bits, form.scale.dtype).items():
            stored[name] = torch.tensor(list(text.encode()), dtype=torch.uint8, device=device)
        return stored

    def decode(self, tensors: Mapping[str, Tensor], target: Target, dtype: torch.dtype) -> Form:
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        kind = tensors["W_q"].dtype if "W_q" in tensors else torch.uint8
        layout = _measure(shapes, kind, target)
        settings = _settings(tensors, layout, target, self.config.optimize)
        words, scale, zero = tensors["W_q"], tensors["scale"], tensors["zero"]
        if settings.view is not None:
            words = words.contiguous().view(WORDS[layout.bits])
        for name, tensor in (("scale", scale), ("zero", zero)):
            if tensor.dtype not in _FLOATS.values() or tensor.dtype != scale.dtype:
                raise _refuse(target, f"{name} is {tensor.dtype}, scale is {scale.dtype}")
            if not bool(torch.isfinite(tensor).all()):
                raise _refuse(target, f"{name} holds NaN or infinity")
        if not bool((scale > 0).all()):
            raise _refuse(target, "scale holds a number that is not positive")
        shape = (target.out_features, target.in_features)
        count = target.out_features * target.in_features
        codes = unpack(words, layout.bits, layout.matrix(count)[0]).reshape(shape)
        grouping = grouping_of(layout.size, layout.axis, target.in_features)
        groups = grouping.scale_shape(shape)
        return StoredAffine(
            Codes.pack(codes, layout.bits, "dense"),
            scale.reshape(groups),
            grouping,
            zero.reshape(groups),
            "zero",
            dtype=dtype,
            settings=settings,
        )

    @classmethod
    def fit(cls, form: Form, target: Target, wanted: Mapping[str, Any]) -> Fit:
        seen = Conditions()
        bits, size = wanted.get("nbits"), wanted.get("group_size")
        # Groups that cross rows, or lie apart, are no other layout's: nothing to fit there.
        if not (isinstance(form, Affine) and isinstance(form.grouping, Strided | Flat)):
            form = fit_integers(
                form,
                bits=(1, 2, 3, 4, 8) if bits is None else (bits,),
                zeros="float",
                scales=tuple(_FLOATS.values()),
                size=target.in_features if size is None and "group_size" in wanted else size,
                positive=True,
                seen=seen,
            )
        assert isinstance(form.grouping, Strided | Flat | Group)
        found: dict[str, Any] = {
            "nbits": form.codes.bits,
            "group_size": form.grouping.size,
            "axis": 0 if isinstance(form.grouping, Strided) else 1,
        }
        if isinstance(form.grouping, Group) and form.grouping.size >= target.in_features != size:
            found["group_size"] = None
        for name, value in found.items():
            if wanted.get(name, value) != value:
                raise not_exact(target.name, f"its {name} is {value}, asked is {wanted[name]}")
        if target.weights % form.grouping.size:
            raise not_exact(target.name, f"groups of {form.grouping.size} are cut at a row's end")
        scale, zero = form.scale, form.offset
        assert isinstance(scale, Tensor) and isinstance(zero, Tensor)
        if scale.is_meta:
            seen.unless.append("a scale is zero")
        elif not bool((scale > 0).all()):
            raise not_exact(target.name, "a scale is zero or negative, which HQQ does not have")
        return Fit(form, found, tuple(seen.unless), tuple(seen.notes))

    def describe(
        self, headers: Mapping[str, TensorHeader], target: Target, dtype: torch.dtype
    ) -> Form | None:
        if "W_q" not in headers:
            return None
        shapes = {name: tuple(item.shape) for name, item in headers.items()}
        kind = torch_dtype(headers["W_q"].dtype)
        layout = _measure(shapes, kind, target)
        scale = _FLOATS.get(headers["scale"].dtype)
        if scale is None:
            raise _refuse(target, f"scale is {headers['scale'].dtype}")
        nbits = headers.get("nbits")
        settings = Settings(
            view=kind if kind in _FLOATS.values() else None,
            nbits=1.58 if nbits is not None and nbits.dtype == "F32" else None,
        )
        shape = (target.out_features, target.in_features)
        return abstract_form(layout, shape, scale, dtype, settings)


def _texts(bits: int, scale: torch.dtype) -> dict[str, str]:
    return {
        "packing": NAMES[bits],
        "unpack_view_dtype": str(WORDS[bits]),
        "compute_dtype": str(scale),
    }


def _measure(shapes: Mapping[str, tuple[int, ...]], kind: torch.dtype, target: Target) -> Layout:
    """Bits, group size and axis, from the shapes; ``kind`` is the dtype of ``W_q``."""
    missing = [name for name in ("W_q", "scale", "zero") if name not in shapes]
    if missing:
        raise _refuse(target, f"{' and '.join(missing)} are missing")
    words, column = shapes["W_q"], shapes["scale"]
    count = target.out_features * target.in_features
    if len(words) != 2 or len(column) != 2 or 1 not in column:
        raise _refuse(
            target,
            f"W_q is {list(words)} and scale {list(column)}: no matrix and a row or column",
        )
    if shapes["zero"] != column:
        raise _refuse(
            target, f"scale is {list(column)} and zero {list(shapes['zero'])}: they must be alike"
        )
    groups = column[0] * column[1]
    if groups == 0 or count % groups:
        raise _refuse(target, f"{groups} scales do not divide {count} weights")
    size = count // groups
    for axis in (1, 0):
        for bits in (8, 4, 3, 2, 1):
            layout = Layout(bits, size, axis)
            rows, columns = layout.matrix(count)
            length = columns * WORDS[bits].itemsize
            packed = (words_of(rows, bits), length // kind.itemsize)
            if (
                layout.column(count) == column
                and fits(rows, bits)
                and (
                    kind == WORDS[bits] or (kind in _FLOATS.values() and not length % kind.itemsize)
                )
                and words == packed
            ):
                return layout
    raise _refuse(
        target,
        f"W_q is {kind} {list(words)} and scale {list(column)}: that is no packing of"
        f" {target.out_features} x {target.in_features} weights",
    )


def _settings(
    tensors: Mapping[str, Tensor], layout: Layout, target: Target, optimize: bool
) -> Settings:
    """What is written beside the codes, held against what their shapes say."""
    for name in (*_ON, *_OFF):
        value = tensors.get(name)
        if value is not None and _flag(value, name, target) != (name in _ON):
            raise QuantmillError(
                UNREADABLE(
                    target.name,
                    f"its setting {name} is {value.tolist()}",
                    "save it anew with hqq's present defaults",
                )
            )
    seen = tensors["W_q"].dtype
    view = seen if seen in _FLOATS.values() else None
    free = {
        "optimize": optimize,
        "round_zero": layout.bits == 4,
        "offload_meta": False,
        "view_as_float": view is not None,
    }
    free |= {name: _flag(tensors[name], name, target) for name in free if name in tensors}
    if free.pop("view_as_float") != (view is not None):
        raise _refuse(
            target, f"view_as_float is {tensors['view_as_float'].tolist()}, W_q is {seen}"
        )
    wanted = {"nbits": layout.bits, "group_size": layout.size, "axis": layout.axis}
    nbits: float | None = None
    for name, number in wanted.items():
        value = tensors.get(name)
        if value is None:
            continue
        said = round(float(value.item()), 2) if value.numel() == 1 else None
        if name == "nbits" and said in _WIDER and _WIDER[said] == number:
            nbits = said if said == 1.58 else int(said)
        elif said != number:
            raise _refuse(target, f"{name} is {value.tolist()}, its tensors are made for {number}")
    shape = tensors.get("shape")
    if shape is not None and shape.tolist() != [target.out_features, target.in_features]:
        raise _refuse(
            target,
            f"shape is {shape.tolist()}, the model wants"
            f" {[target.out_features, target.in_features]}",
        )
    expected = _texts(layout.bits, tensors["scale"].dtype)
    for name in ("packing", "unpack_view_dtype"):
        value = tensors.get(name)
        if value is None or value.dtype != torch.uint8:
            continue
        text = bytes(value.reshape(-1).tolist()).decode("ascii", "replace")
        if text != expected[name]:
            raise _refuse(target, f"{name} is {text!r}, its tensors are {expected[name]!r}")
    return Settings(**free, view=view, nbits=nbits)


def _flag(value: Tensor, name: str, target: Target) -> bool:
    if value.numel() != 1:
        raise _refuse(target, f"{name} is {list(value.shape)}, not one truth value")
    return bool(value.item())
