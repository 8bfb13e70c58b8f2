"""Steps from one affine form to another with the same values: what :mod:`quantmill.forms.fit` is
made of. Each gives the form that it was asked for, or raises ``QM-FORM-001`` with the reason."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from math import frexp
from typing import Literal

import torch
from torch import Tensor

from quantmill.forms.affine import Affine
from quantmill.forms.base import Form, value_of
from quantmill.forms.codes import Codes
from quantmill.forms.convert import kind_words, not_exact, regroup
from quantmill.forms.grouping import Blocks, Channel, Flat, Group, Strided

Zeros = Literal["integer", "middle", "signed", "float", "minimum"]
"""Where a layout has zero points: an unsigned integer per group; none, codes being unsigned
around ``2**(bits - 1)``; none, codes being signed bytes; a float of the scale's dtype; an additive
minimum of the scale's dtype."""
_CHUNK = 1 << 22
"""Codes that are shifted at a time."""


@dataclass(slots=True)
class Conditions:
    """What was found on the way."""

    unless: list[str] = field(default_factory=list)
    """Facts of the data, unknown on the meta device, that would rule the answer out."""
    notes: list[str] = field(default_factory=list)
    """What is different although the values are the same."""

    def note(self, text: str) -> None:
        """Add a note once."""
        if text not in self.notes:
            self.notes.append(text)


def holds_all(wide: torch.dtype, narrow: torch.dtype) -> bool:
    """Whether every number of ``narrow`` is one of ``wide``."""
    if wide in (torch.float32, torch.float64):
        return True
    return narrow == getattr(torch, "float8_e8m0fnu", None) and wide == torch.bfloat16


def dtype_name(dtype: torch.dtype) -> str:
    """As PyTorch users say it."""
    return str(dtype).removeprefix("torch.")


def listed(numbers: Iterable[int]) -> str:
    """With commas."""
    return ", ".join(map(str, numbers))


def tensor_of(value: object) -> Tensor:
    """A scale or an offset that is no form."""
    assert isinstance(value, Tensor)
    return value


def is_float(value: object) -> bool:
    """Whether it is a tensor of floats."""
    return isinstance(value, Tensor) and value.dtype.is_floating_point


def flat_scale(value: Form) -> Tensor:
    """A nested scale as the float32 numbers that it stands for."""
    if any(tensor.is_meta for tensor in value.tensors().values()):
        return torch.empty(value.shape, dtype=torch.float32, device="meta")
    return value_of(value)


def drop_extras(form: Form, plain: Form, seen: Conditions) -> None:
    """Note tensors that a plugin's subclass holds beside the weight: no layout but its own has a
    place for them, and they say nothing about the weight's values."""
    kept = {item.name for item in dataclasses.fields(plain)}  # type: ignore[arg-type]
    for item in dataclasses.fields(form):  # type: ignore[arg-type]
        if item.name not in kept and isinstance(getattr(form, item.name), Tensor):
            seen.note(f"{item.name} (of quantized activations) is left out")


def even(form: Form, seen: Conditions) -> Affine:
    """An affine form without subclass, nested scales and constant factor."""
    if not isinstance(form, Affine):
        raise not_exact(form.kind, f"it holds {kind_words(form)}, the layout codes on an even grid")
    if len(form.shape) != 2:
        raise not_exact("affine", f"it has the shape {list(form.shape)}, and is no matrix")
    even = Affine(
        *(form.codes, form.scale, form.grouping, form.offset, form.offset_kind),
        *(form.group_index, form.factor, form.dtype),
    )
    drop_extras(form, even, seen)
    if isinstance(even.scale, Form):
        even = replace(even, scale=flat_scale(even.scale))
        seen.note("nested scales become plain ones")
    if isinstance(even.offset, Form):
        even = replace(even, offset=flat_scale(even.offset))
    if even.factor != 1.0:
        if frexp(even.factor)[0] != 0.5:
            raise not_exact(
                "affine",
                f"each value is multiplied by {even.factor:.6g} after its scale, which rounds"
                " otherwise than one multiplication",
            )
        scale = tensor_of(even.scale).to(torch.float32) * even.factor
        even = replace(even, scale=scale, factor=1.0)
    return even


def grouped(form: Affine, size: int | None) -> Affine:
    """Groups of columns within a row: the form's own where that is what they are."""
    columns = form.shape[1]
    old = form.grouping
    if form.group_index is not None:
        assert isinstance(old, Group)
        if size is not None and size != old.size:
            raise not_exact("affine", f"groups of {old.size} columns in act-order can't be split")
        return form
    if isinstance(old, Strided) or (isinstance(old, Channel) and old.axis != 0):
        raise not_exact("affine", f"its groups are columns of a view ({old.kind})")
    if isinstance(old, Channel):
        form = _regrouped(form, Group(columns))
    elif isinstance(old, Flat) and columns % old.size == 0:
        form = _regrouped(form, Group(old.size))
    old = form.grouping
    if not isinstance(old, Group):
        return regroup(form, Group(size or (old.columns if isinstance(old, Blocks) else columns)))
    if size is None or size == old.size:
        return form
    if size >= columns and old.size >= columns:
        return _regrouped(form, Group(size))
    if size > old.size or (old.size % size and old.size < columns):
        raise not_exact("affine", f"its groups have {old.size} columns, asked are {size}")
    return regroup(form, Group(size))


def _regrouped(form: Affine, grouping: Group) -> Affine:
    """Other words for the same groups."""
    shape = grouping.scale_shape(form.shape)
    offset = None if form.offset is None else tensor_of(form.offset).reshape(shape)
    return replace(
        form, scale=tensor_of(form.scale).reshape(shape), offset=offset, grouping=grouping
    )


def ordered(form: Affine, allowed: bool, seen: Conditions) -> Affine:
    """Without a group index that says nothing, or that the layout has no place for."""
    index = form.group_index
    if index is None:
        return form
    assert isinstance(form.grouping, Group)
    if index.is_meta:
        if allowed:
            return form
        seen.unless.append("its columns are in act-order (a group index)")
        return replace(form, group_index=None)
    plain = torch.arange(form.shape[1], device=index.device) // form.grouping.size
    if torch.equal(index.to(plain.dtype), plain):
        return replace(form, group_index=None)
    if not allowed:
        raise not_exact("affine", "its columns are in act-order, and the layout has no group index")
    return form


def mirrored(form: Affine, zeros: Zeros, seen: Conditions) -> Affine:
    """Without negative scales: ``(c - z) * s == ((top - c) - (top - z)) * -s``, exactly."""
    scale = tensor_of(form.scale)
    if scale.is_meta:
        if zeros in ("middle", "signed"):
            seen.unless.append("a scale is negative")
        return form
    below = scale < 0
    if form.offset_kind == "minimum" or not bool(below.any()):
        return form
    top, half = 2**form.codes.bits - 1, 128 if signed_codes(form) else 0
    old = torch.zeros_like(scale) if form.offset is None else tensor_of(form.offset)
    old = old.to(torch.float32).reshape(scale.shape) + half
    points = torch.where(below, top - old, old)
    if not torch.equal(torch.where(below, top - points, points), old):
        return form
    codes = form.codes.unpack()
    codes = codes.to(torch.int16).add_(half).to(torch.uint8) if half else codes
    for part in _row_parts(form.shape):
        mirrored = _spread(form, below[part])
        codes[part] = torch.where(mirrored, top - codes[part], codes[part])
    return replace(
        form,
        codes=Codes.pack(codes, form.codes.bits, "dense"),
        scale=scale.abs(),
        offset=points,
        offset_kind="zero",
    )


def narrowed(values: Tensor, dtype: torch.dtype, what: str, seen: Conditions) -> Tensor:
    """The same numbers in another dtype."""
    if values.is_meta:
        if values.dtype != dtype and not holds_all(dtype, values.dtype):
            seen.unless.append(f"its {what} are not exact in {dtype_name(dtype)}")
        return values.to(dtype)
    narrow = values.to(dtype)
    if not torch.equal(narrow.to(torch.float32), values.to(torch.float32)):
        raise not_exact("affine", f"its {what} are not all exact in {dtype_name(dtype)}")
    return narrow


def width(form: Affine, bits: Sequence[int], seen: Conditions) -> Affine:
    """The same unsigned codes in a width that the layout has."""
    have = form.codes.bits
    fitting = sorted(item for item in bits if item >= have)
    if not fitting or form.codes.packing == "i8":
        raise not_exact("affine", f"its codes have {have} bits, the layout has {listed(bits)}")
    if fitting[0] == have:
        return form
    seen.note(f"codes of {have} bits are stored in {fitting[0]}")
    if form.codes.data.is_meta:
        return replace(form, codes=Codes.empty(form.shape, fitting[0], "dense", "meta"))
    return replace(form, codes=Codes.pack(form.codes.unpack(), fitting[0], "dense"))


def signed_codes(form: Affine) -> bool:
    """Whether codes are signed bytes."""
    return form.codes.packing == "i8"


def integer_zeros(form: Affine, seen: Conditions) -> Tensor | None:
    """int16 zero points ``[out, groups]`` of the codes as unsigned ones; None on the meta device,
    unless they are known without data.

    Raises:
        QuantmillError: they are no integers.
    """
    scale = tensor_of(form.scale)
    offset, half = form.offset, 128 if signed_codes(form) else 0
    if offset is None:
        device = "cpu" if scale.is_meta else scale.device
        return torch.full(tuple(scale.shape), half, dtype=torch.int16, device=device)
    zeros = tensor_of(offset).reshape(scale.shape)
    if zeros.is_meta:
        if zeros.dtype.is_floating_point:
            seen.unless.append("its zero points are no integers")
        return None
    if form.offset_kind == "minimum":
        return _zeros_of_minima(form, zeros)
    wide = zeros.to(torch.float32)
    if not torch.equal(wide.round(), wide):
        raise not_exact("affine", "its zero points are no integers")
    if bool((wide.abs() > 255).any()):
        raise not_exact("affine", "its zero points lie outside the codes")
    return wide.to(torch.int16) + half


def _zeros_of_minima(form: Affine, minima: Tensor) -> Tensor:
    """The integers ``z`` with ``(code - z) * scale == code * scale + minimum`` for every code."""
    scale, low = tensor_of(form.scale).to(torch.float32), minima.to(torch.float32)
    zeros = torch.where(scale != 0, (-low / scale).round(), torch.zeros_like(low))
    if not bool((zeros.abs() <= 255).all()):
        raise not_exact("affine", "its minima are no multiples of its scales")
    for code in range(2**form.codes.bits):
        if not torch.equal((code - zeros) * scale, code * scale + low):
            raise not_exact("affine", "its minima are no multiples of its scales")
    return zeros.to(torch.int16)


def with_minimum(
    form: Affine,
    signed: bool,
    zeros: Tensor | None,
    bits: Sequence[int],
    packing: str,
    seen: Conditions,
) -> Affine:
    """With an additive minimum in place of zero points."""
    if signed:
        raise not_exact("affine", "its codes are signed, and the layout adds a minimum")
    scale = tensor_of(form.scale)
    wider = width(form, bits, seen)
    if scale.is_meta or zeros is None:
        seen.unless.append("a product of zero point and scale is not exact")
        low = torch.empty(scale.shape, dtype=scale.dtype, device="meta")
        return replace(wider, offset=low, offset_kind="minimum").with_packing(packing)
    wide = scale.to(torch.float32)
    # Plus zero: minus nothing is nothing, and not the other zero.
    low = (-(zeros * wide) + 0.0).to(scale.dtype)
    narrow = low.to(torch.float32)
    for code in range(2**form.codes.bits):
        if not torch.equal((code - zeros) * wide, code * wide + narrow):
            raise not_exact(
                "affine", f"zero points times scales are not exact in {dtype_name(scale.dtype)}"
            )
    return replace(wider, offset=low, offset_kind="minimum").with_packing(packing)


def at_width(
    form: Affine, zeros: Tensor | None, width: int, kind: Zeros, packing: str, seen: Conditions
) -> Affine:
    """The form with codes of ``width`` bits and zero points of a kind.

    ``zeros`` are those of unsigned codes of the form's own width.
    """
    have, middle = form.codes.bits, 2 ** (width - 1)
    scale = tensor_of(form.scale)
    symmetric = zeros is not None and bool((zeros == 2 ** (have - 1)).all())
    if scale.is_meta:
        if kind in ("middle", "signed") and not symmetric:
            seen.unless.append(f"a zero point is not the middle code {2 ** (have - 1)}")
        return _without_data(form, width, kind, packing)
    assert zeros is not None
    if kind in ("integer", "float") and not symmetric:
        wanted = zeros
        if kind == "integer" and not bool(((zeros >= 0) & (zeros < 2**width)).all()):
            raise not_exact("affine", f"its zero points lie outside of {width} bits")
    else:
        wanted = torch.full_like(zeros, middle)
    if kind == "signed":
        codes = form.codes
        if not signed_codes(form) or not symmetric:
            moved = _shifted(form, wanted - zeros, width)
            codes = Codes((moved ^ 0x80).view(torch.int8), 8, form.shape, "i8")
        return replace(form, codes=codes, offset=None, offset_kind="none")
    if width == have and not signed_codes(form) and torch.equal(wanted, zeros):
        packed = form.codes.repacked(packing)
    else:
        packed = Codes.pack(_shifted(form, wanted - zeros, width), width, packing)
    offset = wanted.to(torch.uint8)
    if kind == "float":
        offset = narrowed(wanted.to(torch.float32), scale.dtype, "zero points", seen)
    return replace(form, codes=packed, offset=offset, offset_kind="zero")


def _without_data(form: Affine, width: int, kind: Zeros, packing: str) -> Affine:
    scale = tensor_of(form.scale)
    if kind == "signed":
        codes = Codes.empty(form.shape, 8, "i8", "meta")
        return replace(form, codes=codes, offset=None, offset_kind="none")
    dtype = scale.dtype if kind == "float" else torch.uint8
    return replace(
        form,
        codes=Codes.empty(form.shape, width, packing, "meta"),
        offset=torch.empty(scale.shape, dtype=dtype, device="meta"),
        offset_kind="zero",
    )


def _shifted(form: Affine, shift: Tensor, width: int) -> Tensor:
    """uint8 codes ``[out, in]``: the unsigned ones plus ``shift [out, groups]``.

    Raises:
        QuantmillError: one would leave its ``width`` bits.
    """
    signed = signed_codes(form)
    codes = form.codes.unpack()
    out = torch.empty(form.shape, dtype=torch.uint8, device=codes.device)
    for part in _row_parts(form.shape):
        moved = codes[part].to(torch.int16)
        if signed:
            moved = moved + 128
        if bool(shift[part].any()):
            moved = moved + _spread(form, shift[part])
            if int(moved.min()) < 0 or int(moved.max()) >= 2**width:
                raise not_exact(
                    "affine",
                    f"codes around its zero points do not fit into {width} bits around the middle",
                )
        out[part] = moved.to(torch.uint8)
    return out


def _row_parts(shape: tuple[int, ...]) -> Iterator[slice]:
    """Rows of ``[out, in]`` codes that are worked on at a time."""
    step = max(1, _CHUNK // max(1, shape[1]))
    for first in range(0, shape[0], step):
        yield slice(first, first + step)


def _spread(form: Affine, values: Tensor) -> Tensor:
    """``[rows, groups]`` for every column: ``[rows, in]``."""
    if form.group_index is not None:
        return torch.index_select(values, 1, form.group_index.to(torch.int64))
    return form.grouping.expand(values, (values.shape[0], form.shape[1]))
