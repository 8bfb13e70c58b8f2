"""Fitting a form into what a layout can hold: the same values, or the reason why not.

A codec's :meth:`~quantmill.backend.Codec.fit` is made of these functions. "The same values" are
equal float32 numbers of ``dequantize``. Forms on the meta device are taken too: what only data can
tell is noted as a condition then, and the answer holds unless one of them is met.

What may change without changing a value: how codes are packed, their width (3-bit codes in 4 bits),
signed for unsigned codes, a shift of codes and zero points alike, smaller groups with repeated
scales, scales of another dtype that holds the same numbers, nested scales as plain ones.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from math import frexp
from typing import Literal

import torch
from torch import Tensor

from quantmill.findings import QuantmillError
from quantmill.forms.affine import Affine
from quantmill.forms.base import Form, value_of
from quantmill.forms.codes import Codes
from quantmill.forms.convert import group_words, kind_words, not_exact, regroup
from quantmill.forms.grouping import Blocks, Channel, Flat, Group, Grouping, Strided
from quantmill.forms.scaled_float import ScaledFloat

__all__ = ["Conditions", "Zeros", "fit_floats", "fit_integers", "fit_scale", "is_symmetric"]

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


def fit_integers(
    form: Form,
    *,
    bits: Sequence[int],
    zeros: Zeros,
    scales: Sequence[torch.dtype],
    size: int | None = None,
    ordered: bool = False,
    positive: bool = False,
    packing: str = "dense",
    seen: Conditions | None = None,
) -> Affine:
    """An affine form ``[out, in]`` in groups of columns, as a layout of these kinds holds it.

    Args:
        form: any form.
        bits: widths of codes that the layout has; the smallest that serves is taken. Signed ones
            always have 8.
        zeros: where it has zero points.
        scales: dtypes of scales that it has, the preferred one first; the form's own if possible.
        size: columns per group, None for those of the form.
        ordered: the layout has a group index (act-order).
        positive: the layout has no negative scales: codes and zero points of such groups are
            mirrored. What can't be (groups with a minimum) keeps them.
        packing: of the codes in the result; ``signed`` zeros always give ``i8``.
        seen: takes conditions and notes.

    Returns:
        Grouping ``Group``, scale ``[out, groups]``, offset of that shape (uint8 for ``integer``
        and ``middle``, None for ``signed``), no factor.

    Raises:
        QuantmillError: ``QM-FORM-001``, a value would change; the cause says why.
    """
    seen = seen if seen is not None else Conditions()
    even = _ordered(_grouped(_even(form, seen), size), ordered, seen)
    if positive:
        even = _mirrored(even, zeros, seen)
    scale = fit_scale(_tensor(even.scale), scales, seen)
    even = replace(even, scale=scale)
    if zeros == "float" and even.offset_kind == "zero" and _is_float(even.offset):
        offset = _narrowed(_tensor(even.offset), scale.dtype, "zero points", seen)
        return replace(_width(even, bits, seen), offset=offset).with_packing(packing)
    if zeros == "minimum" and even.offset_kind == "minimum":
        offset = _narrowed(_tensor(even.offset), scale.dtype, "minima", seen)
        return replace(_width(even, bits, seen), offset=offset).with_packing(packing)
    signed = _signed_codes(even)
    points = _integer_zeros(even, seen)
    if zeros == "minimum":
        return _with_minimum(even, signed, points, bits, packing, seen)
    if zeros == "signed":
        bits = (8,)
    refusal: QuantmillError | None = None
    for width in sorted(item for item in bits if item >= even.codes.bits):
        try:
            found = _at_width(even, points, width, zeros, packing, seen)
        except QuantmillError as error:
            refusal = refusal or error
            continue
        if width != even.codes.bits:
            seen.note(f"codes of {even.codes.bits} bits are stored in {width}")
        return found
    raise refusal or not_exact(
        "affine", f"its codes have {even.codes.bits} bits, and the layout has {_list(bits)}"
    )


def is_symmetric(form: Affine) -> bool:
    """Whether every zero point of a form with integer ones is the middle code. A form without
    data is taken for symmetric only where it has no zero points."""
    if form.offset is None:
        return True
    if form.offset_kind != "zero" or isinstance(form.offset, Form) or form.offset.is_meta:
        return False
    return bool((form.offset == 2 ** (form.codes.bits - 1)).all())


def fit_floats(
    form: Form,
    *,
    values: Sequence[torch.dtype],
    scales: Sequence[torch.dtype],
    grouping: Grouping | None = None,
    seen: Conditions | None = None,
) -> ScaledFloat:
    """A scaled float form with values, scales and groups that a layout has.

    Args:
        form: any form.
        values: dtypes of values.
        scales: dtypes of scales, as in :func:`fit_integers`.
        grouping: the groups to have, None for those of the form.
        seen: takes conditions and notes.

    Raises:
        QuantmillError: ``QM-FORM-001``, a value would change; the cause says why.
    """
    seen = seen if seen is not None else Conditions()
    if not isinstance(form, ScaledFloat):
        raise not_exact(form.kind, f"it holds {kind_words(form)}, the layout narrow floats")
    plain = ScaledFloat(form.values, form.scale, form.grouping, form.dtype)
    _drop_extras(form, plain, seen)
    if plain.values.dtype not in values:
        raise not_exact("scaled_float", f"its values are {_name(plain.values.dtype)}")
    if isinstance(plain.scale, Form):
        plain = replace(plain, scale=_flat_scale(plain.scale))
    if grouping is not None and grouping != plain.grouping:
        plain = regroup(plain, grouping)
        seen.note(f"scales are repeated for {group_words(grouping)}")
    return replace(plain, scale=fit_scale(_tensor(plain.scale), scales, seen))


def fit_scale(scale: Tensor, dtypes: Sequence[torch.dtype], seen: Conditions) -> Tensor:
    """The same numbers in the scale's own dtype, or in the first of ``dtypes`` that has them all.

    Raises:
        QuantmillError: ``QM-FORM-001``, none has.
    """
    if scale.dtype in dtypes:
        return scale
    for dtype in dtypes:
        if scale.is_meta:
            if not _contains(dtype, scale.dtype):
                seen.unless.append(f"a scale is not exact in {_name(dtype)}")
            return scale.to(dtype)
        narrow = scale.to(dtype)
        if torch.equal(narrow.to(torch.float32), scale.to(torch.float32)):
            return narrow
    raise not_exact(
        "scale",
        f"its scales are {_name(scale.dtype)}, and not all of them are exact in"
        f" {' or '.join(_name(dtype) for dtype in dtypes)}",
    )


def _contains(wide: torch.dtype, narrow: torch.dtype) -> bool:
    """Whether every number of ``narrow`` is one of ``wide``."""
    if wide in (torch.float32, torch.float64):
        return True
    return narrow == getattr(torch, "float8_e8m0fnu", None) and wide == torch.bfloat16


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _list(numbers: Iterable[int]) -> str:
    return ", ".join(map(str, numbers))


def _tensor(value: object) -> Tensor:
    assert isinstance(value, Tensor)
    return value


def _is_float(value: object) -> bool:
    return isinstance(value, Tensor) and value.dtype.is_floating_point


def _flat_scale(value: Form) -> Tensor:
    """A nested scale as the float32 numbers that it stands for."""
    if any(tensor.is_meta for tensor in value.tensors().values()):
        return torch.empty(value.shape, dtype=torch.float32, device="meta")
    return value_of(value)


def _drop_extras(form: Form, plain: Form, seen: Conditions) -> None:
    """Note tensors that a plugin's subclass holds beside the weight: no layout but its own has a
    place for them, and they say nothing about the weight's values."""
    kept = {item.name for item in dataclasses.fields(plain)}  # type: ignore[arg-type]
    for item in dataclasses.fields(form):  # type: ignore[arg-type]
        if item.name not in kept and isinstance(getattr(form, item.name), Tensor):
            seen.note(f"{item.name} (of quantized activations) is left out")


def _even(form: Form, seen: Conditions) -> Affine:
    """An affine form without subclass, nested scales and constant factor."""
    if not isinstance(form, Affine):
        raise not_exact(form.kind, f"it holds {kind_words(form)}, the layout codes on an even grid")
    if len(form.shape) != 2:
        raise not_exact("affine", f"it has the shape {list(form.shape)}, and is no matrix")
    even = Affine(
        *(form.codes, form.scale, form.grouping, form.offset, form.offset_kind),
        *(form.group_index, form.factor, form.dtype),
    )
    _drop_extras(form, even, seen)
    if isinstance(even.scale, Form):
        even = replace(even, scale=_flat_scale(even.scale))
        seen.note("nested scales become plain ones")
    if isinstance(even.offset, Form):
        even = replace(even, offset=_flat_scale(even.offset))
    if even.factor != 1.0:
        if frexp(even.factor)[0] != 0.5:
            raise not_exact(
                "affine",
                f"each value is multiplied by {even.factor:.6g} after its scale, which rounds"
                " otherwise than one multiplication",
            )
        scale = _tensor(even.scale).to(torch.float32) * even.factor
        even = replace(even, scale=scale, factor=1.0)
    return even


def _grouped(form: Affine, size: int | None) -> Affine:
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
    offset = None if form.offset is None else _tensor(form.offset).reshape(shape)
    return replace(form, scale=_tensor(form.scale).reshape(shape), offset=offset, grouping=grouping)


def _ordered(form: Affine, allowed: bool, seen: Conditions) -> Affine:
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


def _mirrored(form: Affine, zeros: Zeros, seen: Conditions) -> Affine:
    """Without negative scales: ``(c - z) * s == ((top - c) - (top - z)) * -s``, exactly."""
    scale = _tensor(form.scale)
    if scale.is_meta:
        if zeros in ("middle", "signed"):
            seen.unless.append("a scale is negative")
        return form
    below = scale < 0
    if form.offset_kind == "minimum" or not bool(below.any()):
        return form
    top, half = 2**form.codes.bits - 1, 128 if _signed_codes(form) else 0
    old = torch.zeros_like(scale) if form.offset is None else _tensor(form.offset)
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


def _narrowed(values: Tensor, dtype: torch.dtype, what: str, seen: Conditions) -> Tensor:
    """The same numbers in another dtype."""
    if values.is_meta:
        if values.dtype != dtype and not _contains(dtype, values.dtype):
            seen.unless.append(f"its {what} are not exact in {_name(dtype)}")
        return values.to(dtype)
    narrow = values.to(dtype)
    if not torch.equal(narrow.to(torch.float32), values.to(torch.float32)):
        raise not_exact("affine", f"its {what} are not all exact in {_name(dtype)}")
    return narrow


def _width(form: Affine, bits: Sequence[int], seen: Conditions) -> Affine:
    """The same unsigned codes in a width that the layout has."""
    have = form.codes.bits
    fitting = sorted(item for item in bits if item >= have)
    if not fitting or form.codes.packing == "i8":
        raise not_exact("affine", f"its codes have {have} bits, the layout has {_list(bits)}")
    if fitting[0] == have:
        return form
    seen.note(f"codes of {have} bits are stored in {fitting[0]}")
    if form.codes.data.is_meta:
        return replace(form, codes=Codes.empty(form.shape, fitting[0], "dense", "meta"))
    return replace(form, codes=Codes.pack(form.codes.unpack(), fitting[0], "dense"))


def _signed_codes(form: Affine) -> bool:
    return form.codes.packing == "i8"


def _integer_zeros(form: Affine, seen: Conditions) -> Tensor | None:
    """int16 zero points ``[out, groups]`` of the codes as unsigned ones; None on the meta device,
    unless they are known without data.

    Raises:
        QuantmillError: they are no integers.
    """
    scale = _tensor(form.scale)
    offset, half = form.offset, 128 if _signed_codes(form) else 0
    if offset is None:
        device = "cpu" if scale.is_meta else scale.device
        return torch.full(tuple(scale.shape), half, dtype=torch.int16, device=device)
    zeros = _tensor(offset).reshape(scale.shape)
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
    scale, low = _tensor(form.scale).to(torch.float32), minima.to(torch.float32)
    zeros = torch.where(scale != 0, (-low / scale).round(), torch.zeros_like(low))
    if not bool((zeros.abs() <= 255).all()):
        raise not_exact("affine", "its minima are no multiples of its scales")
    for code in range(2**form.codes.bits):
        if not torch.equal((code - zeros) * scale, code * scale + low):
            raise not_exact("affine", "its minima are no multiples of its scales")
    return zeros.to(torch.int16)


def _with_minimum(
    form: Affine,
    signed: bool,
    zeros: Tensor | None,
    bits: Sequence[int],
    packing: str,
    seen: Conditions,
) -> Affine:
    if signed:
        raise not_exact("affine", "its codes are signed, and the layout adds a minimum")
    scale = _tensor(form.scale)
    wider = _width(form, bits, seen)
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
                "affine", f"zero points times scales are not exact in {_name(scale.dtype)}"
            )
    return replace(wider, offset=low, offset_kind="minimum").with_packing(packing)


def _at_width(
    form: Affine, zeros: Tensor | None, width: int, kind: Zeros, packing: str, seen: Conditions
) -> Affine:
    """The form with codes of ``width`` bits and zero points of a kind.

    ``zeros`` are those of unsigned codes of the form's own width.
    """
    have, middle = form.codes.bits, 2 ** (width - 1)
    scale = _tensor(form.scale)
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
        if not _signed_codes(form) or not symmetric:
            moved = _shifted(form, wanted - zeros, width)
            codes = Codes((moved ^ 0x80).view(torch.int8), 8, form.shape, "i8")
        return replace(form, codes=codes, offset=None, offset_kind="none")
    if width == have and not _signed_codes(form) and torch.equal(wanted, zeros):
        packed = form.codes.repacked(packing)
    else:
        packed = Codes.pack(_shifted(form, wanted - zeros, width), width, packing)
    offset = wanted.to(torch.uint8)
    if kind == "float":
        offset = _narrowed(wanted.to(torch.float32), scale.dtype, "zero points", seen)
    return replace(form, codes=packed, offset=offset, offset_kind="zero")


def _without_data(form: Affine, width: int, kind: Zeros, packing: str) -> Affine:
    scale = _tensor(form.scale)
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
    signed = _signed_codes(form)
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
