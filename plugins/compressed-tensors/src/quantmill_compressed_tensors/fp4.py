"""4-bit floats (E2M1) in groups: NVFP4 and MXFP4, as their writers store them.

Relative to the module, for a weight ``[out, in]``; two codes in a byte, the first in the low half::

    nvfp4-pack-quantized (compressed-tensors)      value = fp4 * (scale / global)
      weight_packed        uint8 [out, in / 2]
      weight_scale         float8_e4m3fn [out, in / 16]
      weight_global_scale  float32 [1]
      input_global_scale   float32 [1]             of 4-bit activations
    mxfp4-pack-quantized (compressed-tensors)      value = fp4 * 2 ** (scale - 127)
      weight_packed        uint8 [out, in / 2]
      weight_scale         uint8 [out, in / 32]
    nvfp4 (ModelOpt)                               value = fp4 * scale * scale_2
      weight               uint8 [out, in / 2]
      weight_scale         float8_e4m3fn [out, in / 16]
      weight_scale_2       float32 []
      input_scale          float32 []              of 4-bit activations
    mxfp4 (gpt-oss)                                as above
      weight_blocks        uint8 [out, in / 32, 16]
      weight_scales        uint8 [out, in / 32]

A code's highest bit is the sign; the others index 0, 0.5, 1, 1.5, 2, 3, 4, 6. Source: OCP
Microscaling Formats 1.0, and compressed-tensors 0.20.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Final

import torch
from torch import Tensor

from quantmill.backend import WeightSource
from quantmill.findings import QuantmillError, declare
from quantmill.finite import FiniteCheck
from quantmill.forms import Codebook, Codes, Group, PerTensor, ScaledFloat, register_table
from quantmill.forms.convert import not_exact
from quantmill.rounding import ByteRounding, nearest_e2m1
from quantmill.targeting.types import Target

__all__ = [
    "E8M0",
    "FP4",
    "STYLES",
    "StoredFp4",
    "Style",
    "abstract_fp4",
    "decode_fp4",
    "e2m1",
    "encode_fp4",
    "fp4_working_bytes",
    "measure_fp4",
    "power_scales",
    "quantize_fp4",
    "restyled",
]

BAD_FP4 = declare("QM-CT-020", "The tensors of a weight of 4-bit floats contradict each other")
BAD_SCALE = declare("QM-CT-021", "A scale of 4-bit floats is no scale")
_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
TABLE: Final = "e2m1"
E8M0 = torch.float8_e8m0fnu
FP4: Final = torch.float4_e2m1fn_x2
_SCALE_BYTES: Final = 13
"""For each scale of a block: the largest magnitude, and two steps from it to what is stored."""


def _table() -> Tensor:
    return torch.tensor([*_VALUES, *(-value for value in _VALUES)], dtype=torch.float32)


register_table(TABLE, _table)


@dataclass(frozen=True, slots=True)
class Style:
    """One way to store 4-bit floats."""

    codes: str
    scale: str
    group: int
    whole: str = ""
    """Name of the scale of the whole weight; empty where there is none."""
    inverse: bool = False
    """That scale divides."""
    inputs: str = ""
    """Name of the scale of activations."""
    blocked: bool = False
    """Codes lie by groups, ``[out, groups, bytes]``."""

    @property
    def names(self) -> tuple[str, ...]:
        """All its tensors."""
        return tuple(n for n in (self.codes, self.scale, self.whole, self.inputs) if n)


STYLES: Final[dict[str, Style]] = {
    "nvfp4-pack-quantized": Style(
        "weight_packed", "weight_scale", 16, "weight_global_scale", True, "input_global_scale"
    ),
    "mxfp4-pack-quantized": Style("weight_packed", "weight_scale", 32),
    "nvfp4": Style("weight", "weight_scale", 16, "weight_scale_2", False, "input_scale"),
    "mxfp4": Style("weight_blocks", "weight_scales", 32, blocked=True),
}


@dataclass(frozen=True, slots=True, eq=False)
class StoredFp4(Codebook):
    """Codes of 4-bit floats with the scales that a file has beside them."""

    style: str = ""
    whole: Tensor | None = None
    """The scale of the whole weight, as it is stored."""
    inputs: Tensor | None = None
    """The scale of activations, as it is stored."""
    scale_dtype: torch.dtype = torch.uint8
    """In the file; exponents are of one byte in either."""


def _refuse(target: Target, cause: str) -> QuantmillError:
    return QuantmillError(BAD_FP4(target.name, cause, "the checkpoint is damaged: get it again"))


def abstract_fp4(
    shape: tuple[int, ...],
    style: str,
    dtype: torch.dtype,
    *,
    whole: tuple[int, ...] = (1,),
    inputs: tuple[int, ...] | None = None,
    scale_dtype: torch.dtype = torch.uint8,
) -> StoredFp4:
    """A form ``[out, in]`` on the meta device."""
    meta, known = torch.device("meta"), STYLES[style]
    size = (*shape[:-1], shape[-1] // known.group)
    one = torch.empty(whole, dtype=torch.float32, device=meta) if known.whole else None
    eight = torch.float8_e4m3fn if known.whole else E8M0
    scale: Tensor | ScaledFloat = torch.empty(size, dtype=eight, device=meta)
    if one is not None:
        assert isinstance(scale, Tensor)
        scale = ScaledFloat(scale, one.reshape(()), PerTensor(), dtype=torch.float32)
    return StoredFp4(
        Codes.empty(shape, 4, "dense", meta),
        torch.empty(16, dtype=torch.float32, device=meta),
        scale,
        Group(known.group),
        None,
        TABLE,
        dtype,
        style,
        one,
        None if inputs is None else torch.empty(inputs, dtype=torch.float32, device=meta),
        eight if known.whole else scale_dtype,
    )


def measure_fp4(
    seen: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    style: str,
    target: Target,
    dtype: torch.dtype,
) -> StoredFp4:
    """The form on the meta device of tensors given by dtype and shape.

    Raises:
        QuantmillError: they do not fit together.
    """
    known = STYLES[style]
    needed = [name for name in (known.codes, known.scale, known.whole) if name]
    missing = [name for name in needed if name not in seen]
    if missing:
        raise _refuse(target, f"{' and '.join(missing)} are missing")
    shape = (target.out_features, target.in_features)
    if shape[1] % known.group:
        raise _refuse(target, f"its width {shape[1]} is no multiple of {known.group}")
    groups = (shape[0], shape[1] // known.group)
    lies = (*groups, known.group // 2) if known.blocked else (shape[0], shape[1] // 2)
    scales = (torch.float8_e4m3fn,) if known.whole else (torch.uint8, E8M0)
    for name, dtypes, size in (
        (known.codes, (torch.uint8, torch.int8), lies),
        (known.scale, scales, groups),
    ):
        found, there = seen[name]
        if found not in dtypes or there != size:
            raise _refuse(
                target,
                f"{name} is {found} {list(there)}, a weight of the model's {list(shape)} has"
                f" {dtypes[0]} {list(size)}",
            )
    shapes: dict[str, tuple[int, ...] | None] = {"whole": (1,), "inputs": None}
    for field, name in (("whole", known.whole), ("inputs", known.inputs)):
        if name and name in seen:
            found, there = seen[name]
            if found != torch.float32 or there not in ((), (1,)):
                raise _refuse(target, f"{name} is {found} {list(there)}, not one float32")
            shapes[field] = there
    return abstract_fp4(
        shape,
        style,
        dtype,
        whole=shapes["whole"] or (),
        inputs=shapes["inputs"],
        scale_dtype=seen[known.scale][0],
    )


def decode_fp4(
    tensors: Mapping[str, Tensor], style: str, target: Target, dtype: torch.dtype
) -> StoredFp4:
    """The form that the tensors hold.

    Raises:
        QuantmillError: they do not fit together, or scales are no scales.
    """
    known = STYLES[style]
    seen = {name: (item.dtype, tuple(item.shape)) for name, item in tensors.items()}
    form = measure_fp4(seen, style, target, dtype)
    stored = tensors[known.scale]
    data = tensors[known.codes].contiguous().view(torch.uint8).reshape(-1)
    eight = stored if known.whole else stored.view(E8M0)
    _sound(eight.to(torch.float32), known.scale, target, zeros=bool(known.whole))
    whole = tensors.get(known.whole) if known.whole else None
    scale: Tensor | ScaledFloat = eight
    if whole is not None:
        _sound(whole, known.whole, target, zeros=False)
        factor = whole.reciprocal() if known.inverse else whole
        scale = ScaledFloat(eight, factor.reshape(()), PerTensor(), dtype=torch.float32)
    return replace(
        form,
        codes=Codes(data, 4, form.shape, "dense"),
        table=_table().to(data.device),
        scale=scale,
        whole=whole,
        inputs=tensors.get(known.inputs) if known.inputs else None,
    )


def encode_fp4(form: StoredFp4) -> dict[str, Tensor]:
    """The tensors of a form, by name."""
    known = STYLES[form.style]
    rows, columns = form.shape
    groups = columns // known.group
    lies = (rows, groups, known.group // 2) if known.blocked else (rows, columns // 2)
    eight = form.scale.values if isinstance(form.scale, ScaledFloat) else form.scale
    assert isinstance(eight, Tensor)
    stored = {known.codes: form.codes.data.reshape(lies), known.scale: eight}
    if form.scale_dtype == torch.uint8:
        stored[known.scale] = eight.view(torch.uint8)
    if form.whole is not None:
        stored[known.whole] = form.whole
    if form.inputs is not None:
        stored[known.inputs] = form.inputs
    return stored


def restyled(form: StoredFp4) -> StoredFp4:
    """The same values as compressed-tensors stores them.

    Raises:
        QuantmillError: the scale of the whole weight has no exact reciprocal.
    """
    if form.style.endswith("-pack-quantized"):
        return form
    style = f"{form.style}-pack-quantized"
    if form.whole is None:
        return replace(form, style=style)
    whole = form.whole.reciprocal().reshape(1)
    if not whole.is_meta and not torch.equal(whole.reciprocal(), form.whole.reshape(1)):
        raise not_exact(
            "scale",
            f"{float(form.whole)} scales the weight, and its reciprocal, which is stored, is not"
            " exact",
        )
    inputs = None if form.inputs is None else form.inputs.reciprocal().reshape(1)
    return replace(form, style=style, whole=whole, inputs=inputs)


def quantize_fp4(form: StoredFp4, weight: WeightSource, rounding: ByteRounding) -> StoredFp4:
    """Fill a form of the meta device: scales from each group's range, values to the nearest.

    NVFP4 has its whole scale such that the largest scale of a group is the largest E4M3; MXFP4 the
    power of two that brings the largest of a group below 7 (OCP's rule clips from 6 on).
    """
    size, columns = STYLES[form.style].group, form.shape[1]
    device = rounding.device
    form = form.map_tensors(lambda item: torch.empty_like(item, device=device))
    whole = None
    nested = form.scale
    stored = nested.values if isinstance(nested, ScaledFloat) else nested
    assert isinstance(stored, Tensor)
    codes = form.codes.data.view(FP4).reshape(form.shape[0], columns // 2)
    with FiniteCheck(weight.name) as finite:
        if form.whole is not None:
            top = torch.zeros((), dtype=torch.float32, device=device)
            for start, rows in weight.row_blocks():
                most = rounding.absmax(rows, columns)
                finite.look(rows, start * columns, maxima=most)
                top = torch.maximum(top, most.amax())
            scale = (448.0 * 6.0 / top).clamp(max=torch.finfo(torch.float32).max)
            whole = torch.where(top > 0, scale, torch.ones_like(top)).reshape(1)
        for start, rows in weight.row_blocks():
            most = rounding.absmax(rows, size)
            finite.look(rows, start * columns, maxima=most)
            stop = start + rows.shape[0]
            scale, wide = _scales(most, whole)
            stored[start:stop] = scale
            rounding.store(rows, wide, codes[start:stop], size)
    form = replace(form, table=_table().to(device))
    if whole is None:
        return form
    factor = whole.reciprocal().reshape(())
    nested = ScaledFloat(stored, factor, PerTensor(), dtype=torch.float32)
    return replace(form, scale=nested, whole=whole)


def fp4_working_bytes(form: StoredFp4, weights: int, rounding: ByteRounding) -> int:
    """Memory that :func:`quantize_fp4` takes for row blocks of so many weights."""
    return rounding.working_bytes(weights, form.shape[1], STYLES[form.style].group, _SCALE_BYTES)


def _scales(most: Tensor, whole: Tensor | None) -> tuple[Tensor, Tensor]:
    """Scales of groups with those largest magnitudes, as stored, and in float32 with ``whole``."""
    if whole is not None:
        scale = (most / 6.0 * whole).clamp(2.0**-9, 448.0).to(torch.float8_e4m3fn)
        return scale, scale.to(torch.float32) / whole
    scale = power_scales(most, 2)
    return scale, scale.to(torch.float32)


def power_scales(most: Tensor, offset: int) -> Tensor:
    """Powers of two for groups with those largest magnitudes: the one at or below, which from 7/8
    of the next is the next, over ``2 ** offset``; 1 for zeros."""
    exponent = torch.frexp(most * (8.0 / 7.0))[1] - 1 - offset
    power = torch.where(most > 0, exponent, torch.zeros_like(exponent)).clamp(-127, 127)
    return (power + 127).to(torch.uint8).view(E8M0)


def e2m1(values: Tensor) -> Tensor:
    """float32 ``values`` as the nearest 4-bit floats."""
    return _table().to(values.device)[nearest_e2m1(values).to(torch.int32)]


def _sound(wide: Tensor, name: str, target: Target, *, zeros: bool) -> None:
    good = torch.isfinite(wide) & ((wide >= 0) if zeros else (wide > 0))
    if not bool(good.all()):
        index = int(torch.argmin(good.reshape(-1).to(torch.uint8)).item())
        raise QuantmillError(
            BAD_SCALE(
                target.name,
                f"{name} is {float(wide.reshape(-1)[index])} at element {index}, and a scale is"
                " finite and positive",
                "the checkpoint is damaged: get it again",
            )
        )
